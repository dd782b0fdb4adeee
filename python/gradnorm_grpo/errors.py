"""The one exception a user is meant to read, and the sentences that go with it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn


class UserError(Exception):
    """Something the person at the keyboard can put right: printed as one sentence, without a traceback, exit code 2."""

    exit_code = 2
    shared = False  # every process of the machine raises it, and the first prints it


class StorageError(UserError):
    """The machine, not the request: a disk that is full or gone. Exit code 1."""

    exit_code = 1


class PeerError(UserError):
    """Another process of the run ended, so this one cannot go on. Exit code 1."""

    exit_code = 1


def one_of(setting: str, given: object, allowed: Iterable[str]) -> UserError:
    """An error that names the setting, what was given, what is allowed and the likeliest spelling."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + f" and {len(names) - 24} more"
    return UserError(f"{setting} must be one of {shown}, got {given!r}{hint}")


def all_of(setting: str, given: Iterable[object], allowed: Iterable[str]) -> None:
    """Hold everything that is given to what is allowed: raises :func:`one_of` for the first that is not."""
    names = list(allowed)
    for item in given:
        if item not in names:
            raise one_of(setting, item, names)


class Parser(argparse.ArgumentParser):
    """argparse with one sentence in place of its usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

"""A run's log: metrics.jsonl in its folder, and whatever experiment trackers were asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, one_of

Line = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or leave the old one: a temporary file beside it, then a rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(plain(value), indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl; a last line that a crash tore is left out."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {len(lines) + 1} is not JSON: {text[:80]!r}") from error
    return lines


def report_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """accelerate's trackers by name; one that was asked for and is not installed is an error."""
    wanted = [name for name in names if name != "none"]
    if not wanted:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState()  # accelerate's trackers log through its own logger, which refuses to speak before this
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    trackers = []
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise one_of("report_to", name, [*LOGGER_TYPE_TO_CLASS, "none"])
        if name not in available:
            raise UserError(
                f"report_to asks for {name!r}, which is not installed: run `pip install {name}` or leave it out"
            )
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        try:
            tracker = kind(folder.name, **place)
            if hasattr(tracker, "start"):
                tracker.start()
        except Exception as error:  # a login, a server or a disk that is missing: each tracker has errors of its own
            reason = " ".join(str(error).split())[:200]
            advice = "put that right or leave it out"
            raise UserError(f"report_to: {name!r} could not start ({reason}): {advice}") from error
        tracker.store_init_configuration(
            {
                key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
                for key, value in config.items()
            }
        )
        trackers.append(tracker)
    return trackers


class RunLog:
    """Appends lines to metrics.jsonl; ``lines`` holds all of them, those of the part before a resume too."""

    def __init__(self, folder: Path, trackers: Sequence[Any] = (), keep_bytes: int | None = None) -> None:
        """``keep_bytes``: go on after so many bytes; what lies beyond moves to metrics.superseded.jsonl."""
        self.path = folder / "metrics.jsonl"
        self._trackers = list(trackers)
        if keep_bytes is not None:
            self._cut(keep_bytes)
        self._file = self.path.open("ab")
        self.lines: list[Line] = read_lines(self.path)

    def _cut(self, keep_bytes: int) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) < keep_bytes:
            raise UserError(
                f"{self.path} has {len(content)} bytes but the checkpoint was written after {keep_bytes}: it was cut "
                f"or replaced; "
                "start a new run, or put the file back"
            )
        if len(content) > keep_bytes:
            with self.path.with_name("metrics.superseded.jsonl").open("ab") as kept:
                kept.write(content[keep_bytes:])
            os.truncate(self.path, keep_bytes)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def write(self, line: Line) -> None:
        """Append one line and flush it. A write that fails (a full disk) leaves the lines before it whole."""
        line = plain(line)
        before = self.path.stat().st_size
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError:
            self._abandon(before)
            raise
        self.lines.append(line)
        for tracker in self._trackers:
            tracker.log(
                {key: value for key, value in line.items() if isinstance(value, (int, float))}, step=line["step"]
            )

    def _abandon(self, size: int) -> None:
        """Drop the torn line: the buffer with the file object, its written part by cutting the file back."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self.path.is_file():
            os.truncate(self.path, size)

    def close(self) -> None:
        """Finish the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()

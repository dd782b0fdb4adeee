"""Checkpoints: everything a run needs to continue, written under a temporary name and then renamed into place.

On a CPU a resumed run repeats the uninterrupted one bit for bit. On a GPU it continues from the same weights and random
states, but some of torch's kernels add in an order that changes, so the last digits differ from run to run.

A checkpoint is a folder ``checkpoint-<step>`` that transformers can load as a model, with ``state.pt`` (optimizer,
schedule, random states, sampler, tracker, data positions) and ``manifest.json`` (size of every file, and SHA-256 of
those up to HASHED_BYTES) in it. Engine 'trl' has the Trainer's files in place of ``state.pt``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError

from .errors import StorageError, UserError
from .runlog import write_json

HASHED_BYTES = 4 << 30  # files above are not hashed: that would take longer than writing them
_NAME = re.compile(r"checkpoint-(\d+)")


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators that a run on ``device`` draws from, as plain numbers and tensors."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(gauss)],  # type: ignore[union-attr]
        "torch": torch.random.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" and torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators from :func:`random_state`; a GPU's only if the run was on a GPU then, too."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves the generators as they were."""
    before = random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:120]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, step: int, model: Any, tokenizer: Any, state: dict[str, Any], keep: int) -> Path:
    """Write ``folder/checkpoint-<step>`` whole or not at all, then drop all but the newest ``keep``."""
    temporary = folder / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with storage_errors(folder, f"checkpoint-{step}"):
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            torch.save(state, temporary / "state.pt")
            return finish_checkpoint(temporary, folder / f"checkpoint-{step}", step, keep)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def storage_errors(folder: Path, name: str) -> Iterator[None]:
    """Turn what a full disk raises while ``name`` is written into a StorageError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors turn a full disk into errors of their own.
        before = checkpoints(folder)
        advice = f"go on with --resume {before[-1]}" if before else "start the run again: it has no checkpoint yet"
        raise StorageError(
            f"checkpoint {folder / name} could not be written ({_reason(error)}; "
            f"{shutil.disk_usage(folder).free >> 20} MiB are free there): what was written before is intact; free some "
            f"space, then {advice}"
        ) from error


def finish_checkpoint(temporary: Path, final: Path, step: int, keep: int) -> Path:
    """Add the manifest to a checkpoint in ``temporary``, give it its place, and drop all but the newest ``keep``."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        _flush_to_disk(path)
    manifest = {str(path.relative_to(temporary)): _entry(path) for path in files}
    write_json(temporary / "manifest.json", {"step": step, "files": manifest})
    _flush_to_disk(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _flush_to_disk(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": sha256(path)} if size <= HASHED_BYTES else {"bytes": size}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def set_newer_aside(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints after the one that a run goes on from, to checkpoint-<step>.superseded.

    They belong to steps that are done again: a later resume must not take them for its own, and they would count as
    the newest that are kept.
    """
    moved = []
    for path in checkpoints(checkpoint.parent):
        if _step(path) > _step(checkpoint):
            moved.append(path.with_name(f"{path.name}.superseded"))
            shutil.rmtree(moved[-1], ignore_errors=True)
            path.rename(moved[-1])
    return moved


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        entries = [(name, {"bytes": entry["bytes"], **entry}) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        entries = []
    if not entries:
        return "its manifest.json is missing or not readable"
    for name, entry in entries:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if "sha256" in entry and sha256(file) != entry["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def find_checkpoint(wanted: str, folder: Path) -> tuple[Path, str]:
    """The checkpoint to resume from and a remark for the user.

    ``wanted`` is a checkpoint, a run's folder, or 'auto'. Only 'auto' passes over a damaged checkpoint, and says so;
    the others end in an error that names the newest intact one.
    """
    path = folder if wanted == "auto" else Path(wanted)
    if not path.is_dir():
        raise UserError(f"there is nothing to resume from: {path} does not exist")
    choices = [path] if _NAME.fullmatch(path.name) else checkpoints(path)
    if not choices:
        raise UserError(f"there is nothing to resume from: {path} holds no checkpoint-<step> folder")
    problem = fault(choices[-1])
    if problem is None:
        return choices[-1], ""
    others = [other for other in reversed(checkpoints(choices[-1].parent)) if other != choices[-1]]
    intact = next((other for other in others if fault(other) is None), None)
    broken = f"checkpoint {choices[-1]} is damaged: {problem}"
    if intact is None:
        raise UserError(f"{broken}; there is no other intact one, so start the run again without --resume")
    if wanted != "auto":
        raise UserError(f"{broken}; resume from the intact {intact} with --resume {intact}")
    return intact, f"{broken}; resuming from the older {intact}"


def load_state(path: Path) -> dict[str, Any]:
    """The run's state in a checkpoint that :func:`find_checkpoint` has found intact."""
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state

"""Checkpoints: whole or not at all, damage is noticed and named, random states come back."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo import checkpoint
from gradnorm_grpo.checkpoint import (
    checkpoints,
    fault,
    find_checkpoint,
    load_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from gradnorm_grpo.errors import StorageError, UserError
from gradnorm_grpo.runlog import RunLog, read_log
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer


def _save(folder: Path, step: int, keep: int = 9) -> Path:
    tokenizer = tiny_tokenizer()
    state = {"step": step, "random": random_state(torch.device("cpu")), "tensor": torch.arange(5)}
    return save_checkpoint(folder, step, tiny_model(tokenizer, 32, 1, step), tokenizer, state, keep)


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        _save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert not list(tmp_path.glob(".checkpoint-*")), "no temporary folder stays"
    path, remark = find_checkpoint(str(tmp_path), Path())
    assert path.name == "checkpoint-10" and remark == "" and fault(path) is None
    assert load_state(path)["tensor"].tolist() == [0, 1, 2, 3, 4]


def test_every_generator_goes_on_where_it_was() -> None:
    state = random_state(torch.device("cpu"))
    first = random.random(), float(numpy.random.rand()), float(numpy.random.randn()), torch.rand(3).tolist()
    restore_random_state(state, torch.device("cpu"))
    assert (random.random(), float(numpy.random.rand()), float(numpy.random.randn()), torch.rand(3).tolist()) == first


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit in the weights": lambda path: _flip(path / "model.safetensors"),
    "a flipped bit in the state": lambda path: _flip(path / "state.pt"),
    "a file cut short": lambda path: os.truncate(path / "state.pt", 100),
    "a missing file": lambda path: (path / "model.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a torn manifest": lambda path: os.truncate(path / "manifest.json", 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_falls_back_silently(tmp_path: Path, damage: str) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    DAMAGE[damage](newer)
    for wanted in (str(newer), str(tmp_path)):
        with pytest.raises(UserError, match=r"checkpoint-2 is damaged.*--resume .*checkpoint-1") as caught:
            find_checkpoint(wanted, tmp_path)
        assert "\n" not in str(caught.value)
    path, remark = find_checkpoint("auto", tmp_path)
    assert path == older and "checkpoint-2 is damaged" in remark and "resuming from the older" in remark
    DAMAGE[damage](older)
    with pytest.raises(UserError, match="no other intact one"):
        find_checkpoint("auto", tmp_path)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(str(tmp_path / "none"), Path())
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path), Path())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    first = _save(tmp_path, 1, keep=1)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(StorageError, match=r"checkpoint-2 could not be written .*--resume .*checkpoint-1"):
        _save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and fault(first) is None


def test_a_failed_log_line_leaves_the_earlier_ones_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write({"kind": "train", "step": 1, "loss": float("nan")})
    size = log.size

    class Full:
        """A file object whose disk fills up half-way through a line."""

        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])

        def flush(self) -> None:
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()

    log._file = Full(log._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.write({"kind": "train", "step": 2})
    assert log.path.stat().st_size == size
    assert read_log(log.path)[0] == [{"kind": "train", "step": 1, "loss": None}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_device(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog.__new__(RunLog)
    log.path, log._trackers, log.lines = tmp_path / "metrics.jsonl", [], []
    log._file = log.path.open("ab")
    with pytest.raises(OSError) as caught:
        log.write({"kind": "train", "step": 1})
    assert caught.value.errno == errno.ENOSPC and log.lines == []


def test_resuming_moves_later_lines_aside(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write({"kind": "train", "step": 1})
    size = log.size
    log.write({"kind": "train", "step": 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "torn')
    again = RunLog(tmp_path, keep_bytes=size)
    assert again.lines == [{"kind": "train", "step": 1}] and again.size == size
    again.write({"kind": "train", "step": 2, "again": True})
    again.close()
    assert [line["step"] for line in read_log(again.path)[0]] == [1, 2]
    aside = (tmp_path / "metrics.superseded.jsonl").read_text()
    assert json.loads(aside.split("\n")[0]) == {"kind": "train", "step": 2} and aside.endswith("torn")
    with pytest.raises(UserError, match="was cut or replaced"):
        RunLog(tmp_path, keep_bytes=10_000)


def test_a_torn_last_line_is_left_out_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first, last = '{"kind": "train", "step": 1}\n', '{"kind": "train", "step": 2}\n'
    path.write_text(first + '{"b"')
    assert read_log(path) == ([{"kind": "train", "step": 1}], 2)
    path.write_text(first + "nonsense\n" + last)
    with pytest.raises(UserError, match="line 2"):
        read_log(path)
    path.write_text(first + last)
    assert [line["step"] for line in read_log(path)[0]] == [1, 2]

"""A pytest plugin for TRL's own tests: stand-ins instead of the hub, and every training with or without attach(...).

Each call of ``train()`` is recorded: a digest of its losses and of the weights afterwards, or why attach(...) refused.
The two runs of :mod:`tools.trl_tests.run` are compared by these records, whatever TRL's own assertions say.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.trl_tests import stand_ins

FOLDER = Path(os.environ["TRL_TESTS_FOLDER"])
ATTACHED = os.environ["TRL_TESTS_ATTACHED"] == "1"
LAYERS = os.environ.get("TRL_TESTS_LAYERS", "last_attention")
TASKS = ("even", "odd")

_present: dict[str, Any] = {}  # the record of the test that is running


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module imports them: replace load_dataset, and train() of the two trainers."""
    import datasets
    import transformers
    import trl

    def load_dataset(path: str, name: str | None = None, *, split: Any = None, streaming: bool = False) -> Any:
        return stand_ins.load(FOLDER / "data", path, name, split, streaming)

    datasets.load_dataset = load_dataset
    inner = transformers.TrainingArguments.__post_init__

    def on_the_cpu(arguments: Any) -> None:
        arguments.use_cpu = True  # TRL's default bf16 is refused where no GPU is found and this is not said
        inner(arguments)

    transformers.TrainingArguments.__post_init__ = on_the_cpu
    for kind in (trl.GRPOTrainer, trl.SFTTrainer):
        kind.train = _recorded(kind.train)


def _recorded(train: Any) -> Any:
    def method(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        run: dict[str, Any] = {"trainer": type(trainer).__name__}
        _present.setdefault("runs", []).append(run)
        attached = None
        _name_tasks(trainer)
        if ATTACHED:
            from gradnorm_kernels.integrations.trl import attach

            try:
                attached = attach(trainer, layers=LAYERS)
            except (TypeError, ValueError) as refusal:
                run["refused"] = str(refusal)
        try:
            result = train(trainer, *args, **kwargs)
        except BaseException as error:
            run["error"] = f"{type(error).__name__}: {error}"
            raise
        if attached is not None:
            run["measured"] = len(attached.tracker.running)
            attached.detach()
        run["digest"] = _digest(trainer)
        return result

    return method


def _name_tasks(trainer: Any) -> None:
    """Give the training data a column of tasks; data that cannot have one are left alone, and attach(...) says so."""
    data = trainer.train_dataset
    if data is None or "task" in (getattr(data, "column_names", None) or ()):
        return
    if hasattr(data, "add_column") and hasattr(data, "__len__"):
        trainer.train_dataset = data.add_column("task", [TASKS[i % 2] for i in range(len(data))])
    else:
        trainer.train_dataset = data.map(lambda row, i: {**row, "task": TASKS[i % 2]}, with_indices=True)


def _digest(trainer: Any) -> str:
    """Of every loss that was logged and of every weight, bit by bit."""
    digest = hashlib.sha256()
    for line in trainer.state.log_history:
        if "loss" in line:
            digest.update(repr((line["loss"], line.get("grad_norm"))).encode())
    for name, value in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    import numpy as np

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """One line of JSON for each test."""
    _present.clear()
    yield
    record = {"test": item.nodeid, **_present}
    with (FOLDER / f"{'with' if ATTACHED else 'without'}.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome that pytest gives, and the last line of an error."""
    if report.when == "call" or report.outcome != "passed":
        _present["outcome"] = report.outcome
        if report.failed and report.longrepr is not None:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            _present["why"] = (lines or [str(report.longrepr)[-200:]])[0][2:].strip()
        elif report.skipped and isinstance(report.longrepr, tuple):
            _present["why"] = str(report.longrepr[2])

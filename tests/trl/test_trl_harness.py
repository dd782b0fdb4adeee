"""The harness that runs TRL's own tests (tools/trl_tests): what it makes of two records of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.trl_tests import run

PLAIN = {"runs": [{"digest": "a"}], "outcome": "passed"}


@pytest.mark.parametrize(
    ("without", "given", "word", "reason"),
    [
        (PLAIN, {"runs": [{"digest": "a"}]}, "identical", ""),
        (PLAIN, {"runs": [{"digest": "b"}]}, "differs", ""),
        (PLAIN, {"runs": [{"digest": "a"}, {"digest": "a"}]}, "differs", ""),
        (PLAIN, {}, "differs", ""),
        (PLAIN, {"runs": [{"digest": "a", "refused": "packing=True"}]}, "refused", "packing=True"),
        (PLAIN, {"runs": [{"error": "KeyError"}]}, "failed", "KeyError"),
        ({"runs": [{"error": "no torchvision"}]}, {"runs": [{"error": "x"}]}, "no training without", "no torchvision"),
        ({"outcome": "failed", "why": "no model"}, {}, "no training without", "no model"),
        ({"outcome": "skipped", "why": "needs a GPU"}, {}, "skipped", "needs a GPU"),
        ({"outcome": "passed"}, {}, "no training", ""),
    ],
)
def test_verdicts(without: dict[str, Any], given: dict[str, Any], word: str, reason: str) -> None:
    assert run.verdict(without, given) == (word, reason) and word in run.MEANINGS


def test_the_table_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, digest in (("without", "a"), ("with", "b")):
        lines = [{"test": "test_grpo_trainer.py::test_x", "outcome": "passed", "runs": [{"digest": digest}]}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = run.table(tmp_path)
    assert any(line.startswith("differs") and line.split()[1] == "1" for line in lines)
    assert "test_grpo_trainer.py::test_x: " in lines


def test_a_folder_without_trls_tests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2 and "name a folder with TRL's sources" in capsys.readouterr().err

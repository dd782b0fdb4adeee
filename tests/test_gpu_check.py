"""``make gpu-check`` without a GPU: how it runs its steps, that its plan is whole, and its dry run (the short form)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import check
from tests.gpu.check import Step, run_steps

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_one_failing_step_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "left behind"
    orphan = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {orphan!r}]); time.sleep(60)"
    steps = [
        Step("good", python("print('fine')"), 30),
        Step("bad", python("import sys; print('broken'); sys.exit(3)"), 30),
        Step("slow", python(hang), 1.5),
        Step("refuses", python("raise SystemExit(2)"), 30, code=2),
        Step("absent", ["no-such-program"], 30, program="no-such-program"),
        Step("after all", python("print('last')"), 30, ("good", "bad", "slow")),
        Step("needs bad", python("print('never')"), 30, ("bad",), ("bad",)),
    ]
    began = time.monotonic()
    results = {r["name"]: r for r in run_steps(steps, tmp_path, {"gpu": "none"}, minutes=1)}
    assert {name: r["status"] for name, r in results.items()} == {
        "good": "passed",
        "bad": "failed",
        "slow": "timed out",
        "refuses": "passed",
        "absent": "not run",
        "after all": "passed",
        "needs bad": "not run",
    }
    assert results["bad"]["returncode"] == 3 and results["bad"]["last_line"] == "broken"
    assert results["absent"]["reason"] == "no-such-program was not found on PATH"
    assert results["needs bad"]["reason"] == "bad has not passed"
    assert (tmp_path / "good.log").read_text() == "fine\n"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gpu"] == "none" and summary["passed"] is False and len(summary["steps"]) == 7
    assert "timed out" in capsys.readouterr().out
    time.sleep(max(0.0, 5 - (time.monotonic() - began)))
    assert not marker.exists(), "what a step started is ended with it"


def test_the_time_for_all_is_a_limit_too(tmp_path: Path) -> None:
    steps = [Step("long", python("import time; time.sleep(60)"), 50), Step("next", python(""), 50, ("long",))]
    began = time.monotonic()
    results = run_steps(steps, tmp_path, {}, minutes=6 / 60)
    assert time.monotonic() - began < 20
    assert [r["status"] for r in results] == ["timed out", "not run"]
    assert results[1]["reason"] == "no time is left"


def test_time_is_kept_for_later_steps(tmp_path: Path) -> None:
    steps = [
        Step("greedy", python("import time; time.sleep(60)"), 50, keep=24),
        Step("too late", python(""), 50, ("greedy",), keep=24),
        Step("kept for", python(""), 50, ("greedy",)),
    ]
    results = {r["name"]: r for r in run_steps(steps, tmp_path, {}, minutes=0.5)}
    assert results["greedy"]["status"] == "timed out" and results["greedy"]["seconds"] < 8
    assert results["too late"]["reason"] == "no time is left"
    assert results["kept for"]["status"] == "passed"


REFUSED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access the counters"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"print('==PROF== Connected')\nprint({REFUSED!r})", f"(passed): {REFUSED}"),  # and yet a status of 0
        ("print('========= Error: no such device'); raise SystemExit(1)", "(failed): ========= Error: no such device"),
        ("print('cannot attach'); raise SystemExit(7)", "(failed): cannot attach"),
    ],
)
def test_a_tool_that_is_refused_is_not_run_and_fails_nothing(code: str, said: str, tmp_path: Path) -> None:
    steps = [
        Step("trial", python(code), 30, program=sys.executable, extra=True, trial=True),
        Step("with it", python("raise SystemExit(1)"), 30, ("trial",), ("trial",), extra=True),
        Step("missing", ["no-such-program"], 30, program="no-such-program", extra=True),
    ]
    results = {r["name"]: r for r in run_steps(steps, tmp_path, {}, minutes=1)}
    assert {r["status"] for r in results.values()} == {"not run"}
    reason = f"{sys.executable} on one kernel {said}"
    assert results["trial"]["reason"] == reason
    assert results["with it"]["reason"] == f"trial has not passed: {reason}"
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is True


@pytest.mark.parametrize(("code", "passed"), [("", True), ("raise SystemExit(1)", False)])
def test_what_a_tool_finds_counts(code: str, passed: bool, tmp_path: Path) -> None:
    fine = "print('========= COMPUTE-SANITIZER'); print('========= ERROR SUMMARY: 0 errors')"
    steps = [
        Step("trial", python(fine), 30, program=sys.executable, extra=True, trial=True),
        Step("with it", python(code), 30, ("trial",), ("trial",), extra=True),
    ]
    results = run_steps(steps, tmp_path, {}, minutes=1)
    assert [r["status"] for r in results] == ["passed", "passed" if passed else "failed"]
    assert any(map(check.counts, results)) != passed
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is passed


def test_all_passed(tmp_path: Path) -> None:
    run_steps([Step("a", python(""), 30), Step("b", python(""), 30, ("a",), ("a",))], tmp_path, {}, minutes=1)
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is True


@pytest.mark.parametrize("profile", [False, True])
def test_the_plan_is_consistent(profile: bool, tmp_path: Path) -> None:
    """Every step waits only for steps there are, in an order that can be run; what is timed runs alone."""
    steps = check.gpu_steps("python3", tmp_path, "abc", profile)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    ended: set[str] = set()
    while len(ended) < len(steps):
        ready = {step.name for step in steps if set(step.after) <= ended} - ended
        assert ready, "steps wait for each other"
        assert not {"ops", "step", "tune"} & ready or len(ready) == 1, "what is timed runs alone"
        ended |= ready
    for step in steps:
        assert set(step.needs) <= set(step.after)
    order = [step.name for step in steps]
    slow = [name for name in order if name.startswith(("memcheck", "racecheck"))]
    assert len(slow) == 4 and order[-4:] == slow and all(step.extra for step in steps[-4:])
    timed = sum({step.name: step.limit for step in steps}[name] for name in ("ops", "step"))
    assert check.TIMED < 60 * check.MINUTES - 200 and timed < 60 * check.MINUTES - 150
    assert all(step.keep >= check.TIMED for step in steps if step.name.startswith(("build", "tests", "sanitizer")))
    commands = [" ".join(step.command) for step in steps]
    assert any("compute-sanitizer --tool racecheck" in command for command in commands)
    assert any("benchmarks ops" in command for command in commands)
    assert any("ncu " in command for command in commands) == profile


COLLECT = """
import json, sys
import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

class Count:
    def pytest_collection_modifyitems(self, items):
        matchers = [KeywordMatcher.from_item(item) for item in items]
        chosen = [[Expression.compile(text).evaluate(m) for m in matchers] for text in sys.argv[1:]]
        print("COUNTS", json.dumps([[item.nodeid for item in items], chosen]))

sys.exit(pytest.main(["tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[Count()]))
"""


def test_every_gpu_test_is_in_one_step(tmp_path: Path) -> None:
    commands = [list(s.command) for s in check.gpu_steps("", tmp_path, "", False) if s.name.startswith("tests-")]
    expressions = [command[command.index("-k") + 1] for command in commands]
    collect = [sys.executable, "-c", COLLECT, *expressions]
    result = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    found = [line for line in result.stdout.splitlines() if line.startswith("COUNTS ")]
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    names, chosen = json.loads(found[0].removeprefix("COUNTS "))
    assert len(names) > 300 and all(any(picked) for picked in chosen)
    assert not [name for name, *picked in zip(names, *chosen, strict=True) if sum(picked) != 1]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit) as raised:
        check.main(["--out", str(tmp_path / "results")])
    assert raised.value.code == 2
    assert "there is no GPU that torch can use; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.check", "--dry-run", "--short", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert result.returncode == 0, result.stdout + "".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
    assert summary["passed"] and summary["dry_run"]
    assert "backend 'triton' cannot run" in (tmp_path / "tune.log").read_text() or torch.cuda.is_available()

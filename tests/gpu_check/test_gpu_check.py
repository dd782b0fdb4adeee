"""``make gpu-check`` without a GPU: how it runs steps, that the plan is complete, and the short dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from tools.gpu_check import check, steps
from tools.gpu_check.running import Step, counts, run_steps

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_one_failing_step_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "left behind"
    orphan = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {orphan!r}]); time.sleep(60)"
    plan = [
        Step("good", python("print('fine')"), 30),
        Step("bad", python("import sys; print('broken'); sys.exit(3)"), 30),
        Step("slow", python(hang), 1.5),
        Step("refuses", python("raise SystemExit(2)"), 30, code=2),
        Step("absent", ["no-such-program"], 30, program="no-such-program"),
        Step("after all", python("print('last')"), 30, ("good", "bad", "slow")),
        Step("needs bad", python("print('never')"), 30, ("bad",), ("bad",)),
    ]
    began = time.monotonic()
    results = {r["name"]: r for r in run_steps(plan, tmp_path, {"gpu": "none"}, minutes=1)}
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
    assert not marker.exists(), "what a step started is killed with it"


def test_the_total_time_is_limited(tmp_path: Path) -> None:
    plan = [Step("long", python("import time; time.sleep(60)"), 50), Step("next", python(""), 50, ("long",))]
    began = time.monotonic()
    results = run_steps(plan, tmp_path, {}, minutes=6 / 60)
    assert time.monotonic() - began < 20
    assert [r["status"] for r in results] == ["timed out", "not run"]
    assert results[1]["reason"] == "no time is left"


def test_time_is_kept_for_later_steps(tmp_path: Path) -> None:
    plan = [
        Step("greedy", python("import time; time.sleep(60)"), 50, keep=24),
        Step("too late", python(""), 50, ("greedy",), keep=24),
        Step("kept for", python(""), 50, ("greedy",)),
    ]
    results = {r["name"]: r for r in run_steps(plan, tmp_path, {}, minutes=0.5)}
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
def test_a_refused_tool_counts_as_not_run(code: str, said: str, tmp_path: Path) -> None:
    plan = [
        Step("trial", python(code), 30, program=sys.executable, extra=True, trial=True),
        Step("with it", python("raise SystemExit(1)"), 30, ("trial",), ("trial",), extra=True),
        Step("missing", ["no-such-program"], 30, program="no-such-program", extra=True),
    ]
    results = {r["name"]: r for r in run_steps(plan, tmp_path, {}, minutes=1)}
    assert {r["status"] for r in results.values()} == {"not run"}
    reason = f"{sys.executable} on one kernel {said}"
    assert results["trial"]["reason"] == reason
    assert results["with it"]["reason"] == f"trial has not passed: {reason}"
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is True


@pytest.mark.parametrize(("code", "passed"), [("", True), ("raise SystemExit(1)", False)])
def test_an_error_found_by_a_tool_is_a_failure(code: str, passed: bool, tmp_path: Path) -> None:
    fine = "print('========= COMPUTE-SANITIZER'); print('========= ERROR SUMMARY: 0 errors')"
    plan = [
        Step("trial", python(fine), 30, program=sys.executable, extra=True, trial=True),
        Step("with it", python(code), 30, ("trial",), ("trial",), extra=True),
    ]
    results = run_steps(plan, tmp_path, {}, minutes=1)
    assert [r["status"] for r in results] == ["passed", "passed" if passed else "failed"]
    assert any(map(counts, results)) != passed
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is passed


def test_all_passed(tmp_path: Path) -> None:
    run_steps([Step("a", python(""), 30), Step("b", python(""), 30, ("a",), ("a",))], tmp_path, {}, minutes=1)
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is True


def plan(stages: tuple[str, ...] = tuple(steps.STAGES), **chosen: list[str]) -> list[Step]:
    return steps.choose(steps.gpu_steps("python3", Path("/folder"), "abc"), stages, **chosen)


def rounds(chosen: list[Step]) -> list[set[str]]:
    """The steps that start together if all steps take equally long."""
    ended: set[str] = set()
    found = []
    while len(ended) < len(chosen):
        found.append({step.name for step in chosen if set(step.after) <= ended} - ended)
        assert found[-1], "steps wait for each other, or for one that does not exist"
        ended |= found[-1]
    return found


TIMED = {
    "ops",
    "step",
    "costs",
    "full",
    *(f"tune-{a}x{b}" for a, b in steps.TUNED),
    "tune-cuda",
    "profile-cuda",
    "profile-triton",
}


@pytest.mark.parametrize("stages", [steps.DEFAULT, *((name,) for name in steps.STAGES), tuple(steps.STAGES)])
def test_every_plan_is_consistent(stages: tuple[str, ...]) -> None:
    """Steps wait only for existing steps; timed steps run alone and after all tests."""
    chosen = plan(stages)
    names = [step.name for step in chosen]
    assert len(set(names)) == len(names) and {"environment", "build"} <= set(names)
    begun: set[str] = set()
    for together in rounds(chosen):
        assert not TIMED & together or len(together) == 1
        tests = {name for name in names if name.startswith("tests-")}
        assert not TIMED & together or tests <= begun
        begun |= together
    for step in chosen:
        assert set(step.needs) <= set(step.after)
    assert {step.stage for step in chosen} >= set(stages)


def test_tests_of_any_backend_wait_for_the_build_but_do_not_need_it() -> None:
    for step in plan(("check",)):
        if step.name.startswith("tests-"):
            cuda = step.name.startswith("tests-cuda")
            assert ("build" in step.after) == (cuda or step.name == "tests-others")
            assert ("build" in step.needs) == cuda


def test_time_is_reserved_for_later_steps() -> None:
    whole = {step.name: step for step in plan(steps.DEFAULT)}
    assert whole["tests-cuda"].keep == whole["build"].keep >= whole["ops"].reserve + whole["step"].reserve > 250
    assert whole["build"].keep < 60 * check.MINUTES - 200
    assert whole["ops"].keep >= whole["step"].reserve and not whole["memcheck-cuda"].keep
    assert all(step.keep < 60 for step in plan(("check",)))


@pytest.mark.parametrize(("gib", "smaller"), [(24, True), (40, True), (80, False), (141, False), (None, False)])
def test_the_whole_step_fits_the_gpu(gib: int | None, smaller: bool) -> None:
    """At the default sizes parameters, gradients and moments alone are 23 GiB."""
    planned = steps.gpu_steps("python3", Path("/folder"), "abc", None if gib is None else gib * 10**9)
    (step,) = [step for step in planned if step.name == "step"]
    assert ("qwen2.5-0.5b" in step.command) == smaller


def test_the_tools_of_nvidia_run_last_and_do_not_lock_the_clocks() -> None:
    chosen = plan()
    order = [step.name for step in chosen]
    tools = [step for step in chosen if step.stage in ("profile", "sanitize")]
    assert order[-len(tools) :] == [step.name for step in tools] and all(step.extra for step in tools)
    found = {command[2] for command in (step.command for step in tools) if command[0] == "compute-sanitizer"}
    assert found == {"memcheck", "racecheck", "synccheck"}
    for step in tools:
        command = list(step.command)
        if command[0] == "ncu" and "--import" not in command:
            assert command[command.index("--clock-control") + 1] == "none"


def test_steps_are_chosen_by_stage_and_by_name() -> None:
    def names(*stages: str, **chosen: list[str]) -> list[str]:
        return [step.name for step in plan(stages, **chosen)]

    assert names("speed") == ["environment", "build", "ops", "table", "plots"]
    assert names("step")[-3:] == ["step", "table", "plots"]
    assert names(only=["memcheck-cuda"]) == ["environment", "build", "sanitizer", "memcheck-cuda"]
    assert "tests-cuda" not in names("check", skip=["tests-cuda", "build"])
    assert "build" not in names("check", skip=["tests-cuda", "build"])
    assert not [step for step in plan(("check",), skip=["build"]) if "build" in (*step.after, *step.needs)]
    with pytest.raises(ValueError, match="no step begins with 'magic'; there are environment, nvidia-smi, build"):
        names("check", only=["magic"])


def test_the_archive_is_kept_while_it_runs(tmp_path: Path) -> None:
    folder, path = tmp_path / "results", tmp_path / "out" / "results.tar.gz"
    folder.mkdir(), path.parent.mkdir()
    (folder / "large.log").write_bytes(b"x" * (check.LARGEST + 1))
    seen = []
    keeper = check.Keeper(folder, path)

    def written() -> None:
        keeper()
        with tarfile.open(path) as tar:
            seen.append(set(tar.getnames()))

    chosen = [Step("a", python("print('fine')"), 30), Step("b", python(""), 30, ("a",))]
    run_steps(chosen, folder, {}, minutes=1, written=written)
    assert seen[0] == {"results/a.log", "results/summary.json"}
    keeper(last=True)
    with tarfile.open(path) as tar:
        assert set(tar.getnames()) == {"results/a.log", "results/b.log", "results/summary.json"}


def test_files_that_a_step_did_not_write_are_left_out(tmp_path: Path) -> None:
    show = "import sys; print(*[a[-6:] for a in sys.argv[1:]]); print('second'); print('third')"
    there, missing = tmp_path / "a.json", tmp_path / "b.json"
    there.write_text("{}")
    chosen = [
        Step("both", python(show), 30, files=(there, missing), show=2),
        Step("none", python(show), 30, files=(missing,), extra=True),
    ]
    results = {r["name"]: r for r in run_steps(chosen, tmp_path, {}, minutes=1)}
    assert results["none"]["reason"] == "there is no b.json"
    said = check.conclude(tmp_path, chosen, list(results.values()), {})
    assert "--- both\na.json\nsecond\n---" in said and "third" not in said
    assert "not run    0.0 s  none: there is no b.json" in said


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
    commands = [list(s.command) for s in steps.gpu_steps("", tmp_path, "") if s.name.startswith("tests-")]
    expressions = [command[command.index("-k") + 1] for command in commands]
    collect = [sys.executable, "-c", COLLECT, *expressions]
    result = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    found = [line for line in result.stdout.splitlines() if line.startswith("COUNTS ")]
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    names, chosen = json.loads(found[0].removeprefix("COUNTS "))
    assert len(names) > 300 and all(any(picked) for picked in chosen)
    assert not [name for name, *picked in zip(names, *chosen, strict=True) if sum(picked) != 1]


def test_an_installed_package_named_tests_is_not_imported(tmp_path: Path) -> None:
    """Some distributions install one, and a regular package takes precedence over a folder without ``__init__.py``."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise ImportError('not this one')")
    command = [sys.executable, "-c", "import tools.gpu_check.steps, tests.compiled.report"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)


def test_a_missing_gpu_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit) as raised:
        check.main(["--out", str(tmp_path / "results")])
    assert raised.value.code == 2
    assert "there is no GPU that torch can use; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_check.check", "--dry-run", "--short", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert result.returncode == 0, result.stdout + "".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
    assert summary["passed"] and summary["dry_run"]
    assert summary["tests"]["counts"]["passed"] >= 5 and not summary["tests"]["failures"]
    assert "backend  dtype  algorithm" in result.stdout
    assert "backend 'triton' cannot run" in (tmp_path / "tune.log").read_text() or torch.cuda.is_available()

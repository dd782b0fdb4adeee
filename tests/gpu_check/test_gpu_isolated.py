"""A test that crashes, hangs or loses the GPU costs only itself; and the report on such tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_check import isolated, journal, reporting

ROOT = Path(__file__).resolve().parents[2]

MISHAPS = """
import os, signal, time
import pytest
from tools.gpu_check import journal

lost = []
journal.device_is_lost = lambda: "an illegal memory access" if lost else None


def test_first():
    pass


@pytest.mark.parametrize("algorithm", ["wgrad", "gram"])
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("trap", ["a", "b", "c", "d", "e"])
def test_poison(trap, backend, algorithm):
    if algorithm == "wgrad":
        lost.append(1)
        assert trap != "a", f"norms off by 0.{ord(trap)}"


def test_exits():
    os._exit(3)


def test_is_killed():
    os.kill(os.getpid(), signal.SIGSEGV)


def wait_for_ever():
    while True:
        time.sleep(0.01)


def test_hangs():
    wait_for_ever()


@pytest.mark.parametrize("off", [0.25, 1e-3, 7])
def test_is_wrong(off):
    raise AssertionError(f"norms off by {off} of 8 elements\\nsecond line")


def test_skipped():
    pytest.skip("not here")


def test_last():
    pass
"""


def run(folder: Path, text: str, silence: float = 60.0) -> tuple[int, list[dict], str]:
    file, path = folder / "test_mishaps.py", folder / "mishaps.jsonl"
    file.write_text(text)
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(file)]
    code = (
        "import sys; from pathlib import Path; from tools.gpu_check import isolated; "
        f"sys.exit(isolated.run(sys.argv[2:], Path(sys.argv[1]), {silence}))"
    )
    command = [sys.executable, "-c", code, str(path), *pytest_command]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    return found.returncode, journal.read(path), found.stdout + found.stderr


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[dict], str]:
    folder = tmp_path_factory.mktemp("mishaps")
    return folder, *run(folder, MISHAPS, silence=3.0)


def ends(entries: list[dict]) -> dict[str, dict]:
    return {entry["test"].rpartition("::")[2]: entry for entry in entries if entry["event"] == "ended"}


def test_every_crash_or_hang_costs_one_test_and_is_named(mishaps: tuple[Path, int, list[dict], str]) -> None:
    _, code, entries, output = mishaps
    assert code == 1, output
    found = ends(entries)
    outcomes = {name: entry["outcome"] for name, entry in found.items()}
    assert outcomes["test_exits"] == outcomes["test_is_killed"] == outcomes["test_hangs"] == "died"
    assert found["test_exits"]["message"] == "its process ended with status 3"
    assert "signal 11 (SIGSEGV)" in found["test_is_killed"]["message"]
    hung = found["test_hangs"]["message"]
    assert "no sign of life for 3 s" in hung and "in wait_for_ever" in hung and "in test_hangs" in hung
    others = ("test_first", "test_last", *(f"test_poison[{trap}-cuda-gram]" for trap in "abcde"))
    assert {outcomes[name] for name in others} == {"passed"}
    assert outcomes["test_skipped"] == "skipped" and found["test_skipped"]["message"] == "Skipped: not here"
    assert all(outcomes[f"test_is_wrong[{off}]"] == "failed" for off in ("0.25", "0.001", "7"))
    assert len(found) == len([entry for entry in entries if entry["event"] == "began"]) == 19
    last = [line for line in output.splitlines() if " passed" in line][-1]
    assert last.startswith("3 died, 6 failed, 2 not run, 7 passed, 1 skipped in ")


def test_a_lost_device_ends_the_process_and_three_of_a_kind_are_enough(
    mishaps: tuple[Path, int, list[dict], str],
) -> None:
    _, _, entries, output = mishaps
    poison = {name: entry for name, entry in ends(entries).items() if name.endswith("-cuda-wgrad]")}
    failed = [entry for entry in poison.values() if entry["outcome"] == "failed"]
    assert len(failed) == journal.ENOUGH and all("illegal memory access" in entry["lost"] for entry in failed)
    assert poison["test_poison[a-cuda-wgrad]"]["message"].startswith("AssertionError: norms off by 0.97")
    later = [entry["message"] for entry in failed if "[a-" not in entry["test"]]
    assert all("it ended well, but then the device was lost" in message for message in later)
    assert sum(entry["outcome"] == "not run" for entry in poison.values()) == 5 - journal.ENOUGH
    assert "lost the device (an illegal memory access)" in output and "norms off by 0.97" in output
    # After the first, tests of other kinds come before the next of this kind.
    began = [entry["test"].rpartition("::")[2] for entry in entries if entry["event"] == "began"]
    assert began.index("test_last") < began.index("test_poison[b-cuda-wgrad]")


def test_the_report_groups_failures_by_cause(mishaps: tuple[Path, int, list[dict], str]) -> None:
    folder, *_ = mishaps
    report = reporting.collect(folder)
    groups = {(group.outcome, group.function.rpartition("::")[2]): group for group in report.groups()}
    assert len(groups["failed", "test_is_wrong"].tests) == 3
    text = reporting.text(report)
    assert "[3 failed] test_is_wrong: any 3" in text and "norms off by 0.25 of 8 elements" in text
    assert "second line" in text and text.index("[1 died]") < text.index("[3 failed]")
    assert "cuda     -      gram            5" in text
    assert len(reporting.text(report, most=300)) < len(text)
    assert "more kinds of failure: see failures.md" in reporting.text(report, most=300)
    everything = reporting.markdown(report)
    assert all(f"test_is_wrong[{off}]" in everything for off in ("0.25", "0.001", "7"))
    summary = json.loads(json.dumps(report.summary()))
    assert summary["counts"]["died"] == 3 and len(summary["failures"]) == len(report.groups())


def test_without_failures_there_is_one_process(tmp_path: Path) -> None:
    text = "def test_a():\n    pass\n\ndef test_b():\n    print('x')\n"
    code, entries, output = run(tmp_path, text)
    assert code == 0 and output.splitlines()[-1].startswith("2 passed in ")
    assert [entry["event"] for entry in entries] == ["collected", "began", "ended", "began", "ended", "finished"]


def test_a_run_in_which_every_test_was_skipped_fails(tmp_path: Path) -> None:
    code, entries, output = run(tmp_path, "import pytest\n\ndef test_a():\n    pytest.skip('no device')\n")
    assert code == 1 and ends(entries)["test_a"]["outcome"] == "skipped" and "1 skipped in" in output


def test_a_file_that_cannot_be_imported_is_one_failure(tmp_path: Path) -> None:
    code, entries, output = run(tmp_path, "import no_such_module\n")
    (failure,) = ends(entries).values()
    assert code == 1 and failure["outcome"] == "failed" and "no_such_module" in failure["message"], output


@pytest.mark.parametrize("text", ["raise SystemExit(0)\n", "import os; os._exit(9)\n"])
def test_a_command_that_begins_no_test_is_not_repeated(text: str, tmp_path: Path) -> None:
    began = time.monotonic()
    code, entries, output = run(tmp_path, text)
    assert code not in (0, 1) and "began no test" in output and not ends(entries)
    assert time.monotonic() - began < 60


def test_an_interrupted_step_keeps_its_results(tmp_path: Path) -> None:
    path = tmp_path / "tests-x.jsonl"
    journal.append(path, event="collected", tests=4)
    for name in ("f.py::a", "f.py::b"):
        journal.append(path, event="began", test=name, parameters={"backend": "cuda"})
    journal.append(path, event="ended", test="f.py::a", parameters={"backend": "cuda"}, outcome="passed", seconds=1)
    with path.open("a") as file:
        file.write('{"event": "ended", "test": "f.py::b", "outco')
    report = reporting.collect(tmp_path)
    assert {test["test"]: test["outcome"] for test in report.ends} == {"f.py::a": "passed", "f.py::b": "unfinished"}
    assert report.unreached == {"tests-x": 2}
    assert "tests-x: 2 tests were not reached" in reporting.text(report)


def test_the_device_is_synchronised_only_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert journal.device_is_lost() is None or torch.cuda.is_available()

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert journal.device_is_lost() == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_missing_command_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        isolated.main([str(tmp_path / "x.jsonl"), "--"])
    assert "there is no command: give it after --" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None)

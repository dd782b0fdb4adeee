"""`make test-trl`: TRL's own GRPO and SFT tests, without attach(...) and with it, and a table of what became of each.

``python -m tools.trl_tests.run SOURCE`` with SOURCE a folder of TRL's sources that holds ``tests`` and ``scripts``. The
installed TRL is tested. Nothing is downloaded and nothing of TRL's is copied into the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_grpo_trainer.py", "tests/test_sft_trainer.py")
MEANINGS = {
    "identical": "losses and weights have the same bits with and without attach",
    "differs": "losses or weights differ",
    "refused": "attach refuses by name, and the test runs without it",
    "failed": "training fails with attach and not without",
    "no training without": "training fails without attach too (a stand-in or a package is missing)",
    "no training": "the test does not train",
    "skipped": "skipped by TRL",
}


def run(source: Path, folder: Path, attached: bool, layers: str, arguments: list[str]) -> None:
    """Run TRL's tests in a process of their own; the records are in ``folder``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TRL_TESTS_FOLDER": str(folder),
        "TRL_TESTS_ATTACHED": str(int(attached)),
        "TRL_TESTS_LAYERS": layers,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Not from `source`: its own trl would be imported instead of the installed one.
    command = [sys.executable, "-m", "pytest", *(str(source / name) for name in TESTS), "-q", "--no-header", "--tb=no"]
    command += ["-p", "tools.trl_tests.plugin", "-p", "no:cacheprovider", "-W", "ignore", "-k", "not Slow", *arguments]
    (folder / f"{'with' if attached else 'without'}.jsonl").unlink(missing_ok=True)
    with (folder / f"{'with' if attached else 'without'}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def records(path: Path) -> dict[str, dict[str, Any]]:
    """{test: what the plugin recorded}."""
    return {line["test"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def verdict(without: dict[str, Any], given: dict[str, Any]) -> tuple[str, str]:
    """(a word of MEANINGS, the reason) for one test, from its two records."""
    plain, watched = without.get("runs", []), given.get("runs", [])
    if not plain and not watched:
        if without.get("outcome") == "skipped":
            return "skipped", without.get("why", "")
        if without.get("outcome") == "failed":
            return "no training without", without.get("why", "")
        return "no training", ""
    refusals = [one["refused"] for one in watched if "refused" in one]
    errors = [one["error"] for one in watched if "error" in one]
    before = [one.get("digest") for one in plain]
    if errors and any("error" in one for one in plain):
        return "no training without", next(one["error"] for one in plain if "error" in one)
    if errors:
        return "failed", errors[0]
    if before != [one.get("digest") for one in watched]:
        return "differs", ""
    return ("refused", refusals[0]) if refusals else ("identical", "")


def short(reason: str) -> str:
    """The beginning of a reason, by which equal ones are counted together."""
    return re.split(r"[:;(,]| and ", reason.strip(), maxsplit=1)[0][:100]


def table(folder: Path) -> list[str]:
    """The lines that are printed: a count for each verdict and file, then the reasons."""
    without, given = records(folder / "without.jsonl"), records(folder / "with.jsonl")
    found = {test: verdict(without[test], given.get(test, {})) for test in without}
    names = [Path(path).stem for path in TESTS]
    lines = [f"{'':20} {'GRPO':>5} {'SFT':>5}"]
    for word, meaning in MEANINGS.items():
        counts = [sum(name in test and said == word for test, (said, _) in found.items()) for name in names]
        lines.append(f"{word:20} {counts[0]:5} {counts[1]:5}  {meaning}")
    for word in ("refused", "differs", "failed", "no training without"):
        reasons = Counter(short(reason) for said, reason in found.values() if said == word)
        lines += [f"{word} {count} x {reason}" for reason, count in reasons.most_common()]
    passed = [test for test in without if without[test].get("outcome") == "passed"]
    changed = [test for test in passed if given.get(test, {}).get("outcome") == "failed"]
    lines.append(f"TRL's own assertions fail with attach only: {', '.join(changed) or 'none'}")
    lines += [f"{test}: {reason}" for test, (said, reason) in found.items() if said in ("failed", "differs")]
    return lines


def main() -> int:
    """Make the stand-ins, run both, print the table; 1 where a training fails or differs with attach."""
    parser = argparse.ArgumentParser(prog="make test-trl", description=__doc__)
    parser.add_argument("source", type=Path, help="a folder with TRL's sources")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "trl-tests", help="stand-ins, logs and records")
    parser.add_argument("--layers", default="last_attention", help="of attach(...)")
    parser.add_argument("--table", action="store_true", help="print the table of the last run again")
    options, arguments = parser.parse_known_args()
    source, folder = options.source.resolve(), options.folder.resolve()
    missing = [name for name in (*TESTS, "scripts/generate_zen_dataset.py") if not (source / name).exists()]
    if missing:
        parser.error(
            f"{source} has no {', '.join(missing)}: name a folder with TRL's sources, not an installed package"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not options.table:
        from tools.trl_tests import stand_ins

        shutil.rmtree(folder / "hub", ignore_errors=True)
        for name, why in stand_ins.make_models([source / name for name in TESTS], folder / "hub").items():
            print(f"no stand-in for {name}: {why}")
        stand_ins.make_data(source, folder / "data")
        for attached in (False, True):
            run(source, folder, attached, options.layers, arguments)
    lines = table(folder)
    print("\n".join(lines))
    return int(any(line.split()[0] in ("failed", "differs") and " x " in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())

"""The numbers behind the report: pooling, the imbalance and its interval, cosines, the table's text and the verdict."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gradnorm_grpo.numbers import clean, duration, fixed, percent, shorten, signed, significant, with_error
from gradnorm_grpo.report import print_table, write_report
from gradnorm_grpo.report.table import footnotes, table_rows
from gradnorm_grpo.report.verdict import directions, imbalance, imbalance_sentence, learning, rank_correlation, verdict
from gradnorm_grpo.runlog import EvalPoint, read_run
from gradnorm_grpo.summary import TaskResult, cosines, task_results
from tests.report.test_report_synthetic import NAMES, PULL, write_synthetic_run

NAN = math.nan


def task(name: str = "a", u: float = 1.0, se: float = 0.1, n: float = 100, **more: object) -> TaskResult:
    base = TaskResult(name, 0, n, u, se, 2 * u, 5.0, 0.5, 0.1, 0.2, 0.01, None, None, None, 0.5, 40.0, 3.0)
    return replace(base, **more)  # type: ignore[arg-type]


def printed(path: Path, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(path, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_pooled_numbers_are_ratios_of_sums(tmp_path: Path) -> None:
    run = read_run(write_synthetic_run(tmp_path, NAMES[:2], steps=11, prompts=13))
    for result in task_results(run):
        s = run.series[result.name]
        used = np.isfinite(s["grad_norm_sq"])
        weight, u, se = s["pair_weight"][used], s["grad_norm_sq"][used], s["grad_norm_sq_se"][used]
        assert result.n == np.nansum(s["n"])
        assert result.sq_norm == pytest.approx((weight * u).sum() / weight.sum())
        if np.isfinite(se).all():
            assert result.std_error == pytest.approx(math.sqrt(((weight * se) ** 2).sum()) / weight.sum())
        assert result.reward_first == pytest.approx(np.nanmean(s["reward"][:3]))
        assert result.reward_last == pytest.approx(np.nanmean(s["reward"][8:]))


def test_the_synthetic_truth_is_recovered_and_sorted(tmp_path: Path) -> None:
    """The pooled U of the loud tasks lies within four errors of the average of the fading truth."""
    results = task_results(read_run(write_synthetic_run(tmp_path, steps=60, prompts=60)))
    assert [r.sq_norm for r in results] == sorted((r.sq_norm for r in results), reverse=True)
    for r in results[:3]:
        truth = PULL[r.index] * 0.75
        assert abs(r.sq_norm - truth) < 4 * r.std_error + 0.15 * truth
        assert r.plug_in > 1.5 * r.sq_norm
    assert sum(r.pull_share for r in results) == pytest.approx(1)


def test_numbers_in_the_summary_take_precedence_over_the_log(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["a", "b"], steps=20)
    from_log = {r.name: r for r in task_results(read_run(tmp_path))}
    summary = {"tasks": {"a": {"grad_norm_sq": 0.777, "grad_norm_sq_se": None}}, "steps": 20, "seconds": 7270.0}
    summary["cosines"] = {"tasks": ["a", "b"], "matrix": [[1, 0.31], [0.31, 1]], "n_steps": 20}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    run = read_run(tmp_path)
    by_name = {r.name: r for r in task_results(run)}
    assert run.finished
    assert by_name["a"].sq_norm == 0.777
    assert math.isnan(by_name["a"].std_error)
    assert by_name["b"].sq_norm == from_log["b"].sq_norm
    assert cosines(run, list(by_name.values()))["b", "a"].value == 0.31


def test_imbalance_is_fiellers_interval() -> None:
    found = imbalance([task("loud", 30.0, 3.0), task("quiet", 1.0, 0.2), task("lost", 0.1, 0.2)])
    assert found is not None
    assert (found.loudest.name, found.quietest.name, found.ratio) == ("loud", "quiet", 30.0)
    for r in (found.low, found.high):  # at the ends, loud - r quiet is two of its standard errors from zero
        assert abs(30 - r) == pytest.approx(2 * math.hypot(3.0, r * 0.2))
    assert found.low < 30 < found.high


def test_imbalance_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        a, b = rng.normal(8.0, 1.0), rng.normal(1.0, 0.15)
        found = imbalance([task("a", a, 1.0), task("b", b, 0.15)])
        assert found is not None
        inside += found.low <= 8.0 <= found.high
    assert 0.94 < inside / 2000 < 0.97


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([task()], "undecided, since there is only one task"),
        ([task("a", 1, 0.1), task("b", 0.1, 0.1)], "undecided, since only a is distinguishable from zero"),
        ([task("a", 1, NAN), task("b", NAN, NAN)], "undecided, since no task is distinguishable from zero"),
        ([task("a", 1, 0.1, n=5), task("b", 1, 0.1, n=7)], "undecided, since no task is distinguishable"),
        (
            [task("a", 9, 0.1), task("b", 1, 0.01), task("c", -1, 0.1)],
            "9.0 to 1 in squared norm .*3.0 to 1 in norm; 1 task is",
        ),
    ],
)
def test_imbalance_is_claimed_only_among_resolved_tasks(results: list[TaskResult], words: str) -> None:
    assert re.search(words, imbalance_sentence(results))


def test_a_negative_u_is_printed_as_it_is_and_marked(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, ["noise", "once"], steps=0, evals=False, warm=0)
    line = {
        f"tasks/noise/{k}": v for k, v in {"grad_norm_sq": -3.25e-3, "grad_norm_sq_se": 4.1e-3, "plug_in": 0.05}.items()
    }
    line |= {"tasks/noise/mean_sq_norm": 0.5, "tasks/noise/n": 17, "tasks/noise/pair_weight": 272, "tasks/once/n": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, **line}) + "\n")
    text = printed(tmp_path)
    assert "(−3.2 ± 4.1)×10⁻³ ≈0" in text or "(−3.3 ± 4.1)×10⁻³ ≈0" in text
    assert "≈0: U is not distinguishable from zero" in text
    assert "– for U: no step drew two prompts of the task (n < 2)" in " ".join(text.split())
    noise, once = table_rows(task_results(read_run(tmp_path)))
    assert noise.undecided and noise.cells[4] == "–"
    assert once.cells[:4] == ("once", "1", "–", "–")


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_every_number_unbroken(tmp_path: Path, width: int) -> None:
    names = ["[red]not markup[/red]", "syllogism", "a_name_much_too_long_for_any_terminal_" * 3]
    write_synthetic_run(tmp_path, names, steps=20)
    text = printed(tmp_path, width)
    rows = table_rows(task_results(read_run(tmp_path)))
    for row in rows:
        assert all(cell in text for cell in row.cells[1:])
    assert "[red]" in text and "syllogism" in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "unfinished" in text and "Imbalance:" in text


def test_footnotes_appear_only_with_their_marks() -> None:
    point = EvalPoint(0, 0.2, 0.05, 64)
    assert footnotes([task(before=point, after=replace(point, step=5))]) == []
    assert [note[:2] for note in footnotes([task(u=0.1), task("b", NAN, NAN)])] == ["≈0", "– ", "–:"]


def test_the_verdict_claims_nothing_from_noise() -> None:
    """Fifty tasks whose evaluations differ by chance alone: in hardly any of 100 runs may a change be claimed."""
    rng, claims = np.random.default_rng(3), 0
    for _ in range(100):
        p = rng.binomial(200, 0.4, (50, 2)) / 200
        points = [
            [EvalPoint(9 * i, float(x), math.sqrt(x * (1 - x) / 199), 200) for i, x in enumerate(row)] for row in p
        ]
        results = [task(str(i), before=before, after=after) for i, (before, after) in enumerate(points)]
        claims += any(s.startswith("Held-out reward") for s in learning(results))
    assert claims <= 12


def test_the_verdict_names_what_changed_and_what_is_undecided() -> None:
    low, high = EvalPoint(0, 0.2, 0.03, 200), EvalPoint(9, 0.6, 0.03, 200)
    sentences = learning([task("up", before=low, after=high), task("same", before=low, after=replace(low, step=9))])
    assert "Held-out reward rose: up +0.40 ± 0.04." in sentences
    assert "No change of held-out reward beyond chance was seen for same." in sentences
    assert "undecided" in sentences[-1]
    assert "undecided" in learning([task()])[0]


def test_the_warm_start_is_reported_apart_from_grpo() -> None:
    given, low = EvalPoint(0, 0.0, 0.0, 200), EvalPoint(0, 0.5, 0.035, 200)
    results = [task("up", base=given, before=low, after=replace(low, step=9)), task("b", before=low, after=low)]
    sentences = learning(results)
    assert sentences[0].startswith("Held-out reward rose in the supervised warm start: up +0.50 ± 0.0")
    assert sentences[1] == "No change of held-out reward beyond chance was seen under GRPO for up and b."
    assert [row.cells[-1] for row in table_rows(results)] == ["0.00 → 0.50 → 0.50", "0.50 → 0.50"]


def test_cosines_find_the_planted_conflict(tmp_path: Path) -> None:
    """In the generator isomorphic_strings pulls against syllogism."""
    run = read_run(write_synthetic_run(tmp_path, steps=120, prompts=48))
    results = task_results(run)
    found = cosines(run, results)
    planted = found["syllogism", "isomorphic_strings"]
    assert planted.value < -2 * planted.std_error
    assert any("against each other" in s and "isomorphic_strings" in s for s in directions(results, found))


def test_a_run_without_steps_is_not_judged(tmp_path: Path) -> None:
    run = read_run(write_synthetic_run(tmp_path, steps=0))
    results = task_results(run)
    assert verdict(run, results, cosines(run, results)) == [
        ("Nothing to judge", ["No training step was finished, so nothing can be said about the tasks."])
    ]


def test_a_probe_is_measured_but_not_said_to_have_learned(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path, steps=12, evals=False)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text().replace('"kind": "train"', '"kind": "probe"'))
    run = read_run(tmp_path)
    results = task_results(run)
    found = dict(verdict(run, results, cosines(run, results)))
    assert len(run.steps) == 12 and results[0].resolved
    assert found["Who learned"] == ["Nothing was trained in this probe, so it says nothing about learning."]
    assert "weights as they were" in found["What this cannot tell"][0]
    assert "measured, not trained" in printed(tmp_path)
    assert 'id="reward"' not in write_report(tmp_path).read_text(encoding="utf-8")


def with_final_probe(path: Path, numbers: dict[str, tuple[float, float, int]]) -> Path:
    """The run with a final probe of 64 prompts per task: U, its error and the prompts with a gradient by task."""
    line: dict[str, object] = {"kind": "final_probe", "step": 9, "time": 900.0}
    for name, (u, se, effective) in numbers.items():
        values = {"grad_norm_sq": u, "grad_norm_sq_se": se, "plug_in": 2 * u, "n": 64, "prompts": 64, "reward": 0.5}
        values |= {"noise_scale": 3.0, "mean_sq_norm": 9.0, "pair_weight": 64 * 63, "n_effective": effective}
        line |= {f"tasks/{name}/{key}": value for key, value in values.items()}
    with (path / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    return path


def test_a_final_probe_has_a_table_and_a_verdict_of_its_own(tmp_path: Path) -> None:
    run_dir = write_synthetic_run(tmp_path, NAMES[:3], steps=9, prompts=24)
    before = task_results(read_run(run_dir))
    numbers = {NAMES[0]: (4.0, 0.5, 60), NAMES[1]: (0.25, 0.05, 40), NAMES[2]: (0.1, 0.2, 7)}
    run = read_run(with_final_probe(run_dir, numbers))
    assert task_results(run) == before and len(run.steps) == 9 and run.final_probe is not None
    probed = task_results(run.final_probe)
    assert [(r.name, r.sq_norm, r.n, r.n_effective) for r in probed] == [
        (name, u, 64, k) for name, (u, _, k) in numbers.items()
    ]
    found = imbalance(probed)
    assert found is not None and found.ratio == 16.0 and found.low < 16 < found.high
    heading = "At the end: 64 new prompts per task at the weights after step 9"
    sentences = dict(verdict(run, before, cosines(run, before)))[heading]
    assert imbalance_sentence(probed) in sentences
    few = f"rewards that are not all equal: 7 of 64 in {NAMES[2]}."
    assert any(sentence.endswith(few) for sentence in sentences)
    text = printed(run_dir)
    assert "measured in steps 1 to 9 while the weights changed" in text and heading in text
    assert text.index(heading) < text.index("16 to 1 in squared norm") and few in text
    row = next(line for line in text[text.index(heading) :].splitlines() if NAMES[0] in line)
    assert row.split()[-9:] == ["64", "60", "4.00", "±", "0.50", "8.0", "1.2", row.split()[-2], "0.50"]
    narrow = printed(run_dir, 80)
    lines = narrow[narrow.index(heading) :].splitlines()
    assert all(len(line) <= 80 for line in lines)
    for number in ("64", "0.50"):  # two tables, in which no name is broken over lines
        assert {line.split()[0] for line in lines if number in line.split()[1:]} >= set(NAMES[:3])
    page = write_report(run_dir).read_text()
    assert 'id="final-probe"' in page and page.count(heading) >= 2
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_rank_correlation_is_spearmans_with_a_permutation_p_value() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    rho, p = rank_correlation(x, [10.0, 20.0, 40.0, 30.0, 50.0])
    assert rho == pytest.approx(0.9)
    assert p == pytest.approx(10 / 120, abs=0.01)  # 5 of the 120 orders are at least as correlated on either side
    assert rank_correlation(x, [1.0, 1.0, 2.0, 2.0, 3.0])[0] == pytest.approx(0.9486833)
    assert math.isnan(rank_correlation(x, [1.0] * 5)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (with_error(0.0371, 0.0203), "(3.7 ± 2.0)×10⁻²"),
        (with_error(-0.0008, 0.0048), "(−0.8 ± 4.8)×10⁻³"),
        (with_error(12.34, 0.5), "12.34 ± 0.50"),
        (with_error(777, 0.0), "777.00 ± 0.00"),
        (with_error(1.0, NAN), "1.00 ± –"),
        (with_error(NAN, 1.0), "–"),
        (significant(0.0), "0.0"),
        (significant(0.0996), "0.10"),
        (significant(1234567.0), "1.2×10⁶"),
        (significant(-0.00037), "−3.7×10⁻⁴"),
        (significant(4321.0), "4,300"),
        (fixed(-0.001), "0.00"),
        (signed(-0.0004, 3), "+0.000"),
        (signed(0.25), "+0.25"),
        (percent(0.071), "7.1%"),
        (percent(0.0), "0%"),
        (duration(7270), "2 h 01 min"),
        (duration(NAN), "–"),
        (clean("a\nb\ud800\u202e"), "a\ufffdb\ufffd\ufffd"),
        (shorten("数え上げる", 6), "数え…"),
    ],
)
def test_numbers_and_names_are_written_for_reading(text: str, expected: str) -> None:
    assert text == expected

"""Planning by time: what fits into the budget on machines of any speed; and what processor threads a run takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from gradnorm_grpo import threads
from gradnorm_grpo.errors import UserError
from gradnorm_grpo.loop import Grpo
from gradnorm_grpo.parse import parse_study
from gradnorm_grpo.plan import LEAST_PROMPTS, LEAST_QUESTIONS, Plan, Planner
from gradnorm_grpo.rollout import Prompter
from gradnorm_grpo.settings import Settings
from gradnorm_grpo.tasks import build_tasks
from gradnorm_grpo.tiny import tiny_model, tiny_tokenizer

WANTED = Plan(steps=8, questions=32, prompts=192, warm_start=26)


def simulate(speed: float, slower_after: int = 99, factor: float = 1.0, budget: float = 540.0) -> tuple[Planner, float]:
    """A run whose parts take as long as on two idle cores times ``speed``, and ``factor`` more after so many steps.

    Returns the planner and the seconds at the end.
    """
    planner, now = Planner(WANTED, budget, save_steps=10), 10.0 * speed

    def evaluate(left: int) -> None:
        nonlocal now
        seconds = 0.3 * speed * planner.plan.questions
        now += seconds
        planner.costs.question = seconds / planner.plan.questions
        planner.fit_questions(left)

    evaluate(2)
    warm, began = 0, now
    while warm < planner.plan.warm_start:
        warm, now = warm + 1, now + 4.0 * speed
        planner.fit_warm_start(warm, now - began)
    evaluate(1)
    step = 0
    while step < planner.plan.steps:
        step += 1
        if step > slower_after:
            speed, slower_after = speed * factor, 99
        now += 20.0 * speed
        planner.costs.steps.append((20.0 * speed, 1.5 * speed))
        before = planner.plan
        planner.fit(step, now)
        assert step <= 2 or (planner.plan.steps <= before.steps and planner.plan.prompts <= before.prompts)
    evaluate(0)
    now += 5.0 * speed
    planner.costs.save = 5.0 * speed
    done = 0
    while done < planner.plan.prompts:
        count = min(32, planner.plan.prompts - done)
        done, now = done + count, now + 1.5 * speed * count
        planner.costs.prompt = 1.5 * speed
        planner.fit_prompts(done, now)
    assert planner.plan.steps == step and planner.plan.prompts == done
    return planner, now


@pytest.mark.parametrize(
    ("speed", "slower_after", "factor"), [(0.5, 99, 1), (1, 99, 1), (1.5, 99, 1), (2, 99, 1), (1, 2, 2.5), (1, 4, 3)]
)
def test_a_run_fits_into_its_budget_on_machines_of_several_speeds(
    speed: float, slower_after: int, factor: float
) -> None:
    planner, seconds = simulate(speed, slower_after, factor)
    assert seconds <= planner.budget and not planner.over
    assert planner.plan.steps >= 1 and planner.plan.prompts >= LEAST_PROMPTS
    if speed == 0.5:
        assert planner.plan == WANTED
    else:
        assert planner.plan.prompts < WANTED.prompts and seconds > 0.7 * planner.budget


def test_a_machine_on_which_nothing_fits_does_the_least_of_everything() -> None:
    planner, seconds = simulate(20.0)
    assert planner.plan == Plan(1, LEAST_QUESTIONS, LEAST_PROMPTS, WANTED.warm_start // 2)
    assert seconds > planner.budget and planner.over


def test_a_probe_that_is_faster_than_expected_takes_the_time_that_is_left() -> None:
    planner = Planner(Plan(3, 0, 100), 100.0)
    planner.costs.steps.append((10.0, 2.0))
    planner.fit(3, 30.0)
    assert planner.plan.prompts == 32  # (95 - 30) s at 2 s
    planner.costs.prompt = 1.0
    assert planner.fit_prompts(10, 40.0) and planner.plan.prompts == 65
    planner.costs.prompt = 0.1
    assert planner.fit_prompts(20, 41.0) and planner.plan.prompts == 100
    planner.costs.prompt = 9.0
    assert planner.fit_prompts(30, 90.0) and planner.plan.prompts == 30


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (Plan(10, 0, 20), Plan(7, 0, 20)),  # (85 - 20) s for steps of 10 s
        (Plan(10, 0, 100), Plan(3, 0, 63)),  # three quarters of 85 s for the probe, and 22 s for steps
        (Plan(2, 0, 100), Plan(2, 0, 75)),  # the probe has what the steps leave
        (Plan(1, 0, 100), Plan(1, 0, 85)),
    ],
)
def test_steps_are_cut_before_the_probe(wanted: Plan, left: Plan) -> None:
    planner = Planner(wanted, 100.0)
    planner.costs.steps.append((10.0, 1.0))
    assert planner.fit(1, 10.0) and planner.plan == left and not planner.over


def test_a_study_has_runs_of_equal_length() -> None:
    with pytest.raises(UserError, match="plan_minutes=5 .*set it to 0"):
        parse_study(["--preset", "tiny", "--plan_minutes", "5"])
    settings, _, _ = parse_study(["--preset", "smollm2"])
    assert settings.plan_minutes == 0 and settings.final_probe_prompts == 0 and settings.max_steps == 14


def test_without_a_budget_nothing_is_cut() -> None:
    planner, _ = simulate(50.0, budget=0.0)
    assert planner.plan == WANTED and not planner.on


def test_a_slow_first_step_is_forgiven_and_a_fast_later_one_is_not() -> None:
    planner = Planner(Plan(20, 0, 0), 100.0)
    planner.costs.steps.append((10.0, 1.0))
    assert planner.fit(1, 10.0) and planner.plan.steps == 9
    planner.costs.steps.append((2.0, 1.0))
    assert planner.fit(2, 12.0) and planner.plan.steps == 15  # (95 - 12) s at a mean of 6 s
    planner.costs.steps.append((2.0, 1.0))
    assert not planner.fit(3, 14.0) and planner.plan.steps == 15


def test_evaluations_and_checkpoints_on_the_way_are_counted() -> None:
    planner = Planner(Plan(20, 10, 0), 100.0, eval_steps=5, save_steps=2)
    planner.costs.steps.append((1.0, 0.0))
    planner.costs.question, planner.costs.save = 0.5, 4.0
    planner.fit(1, 1.0)
    # 95 s - 1 s - the last checkpoint - four evaluations of 5 s, at 1 s and half a checkpoint per step
    assert planner.plan.steps == 20
    planner.fit(1, 40.0)
    assert planner.plan.steps == 1 + int(19 * (95 - 40 - 4 - 20) / (19 * 3.0))


def test_a_resumed_run_keeps_its_plan_unless_other_settings_ask_for_another() -> None:
    planner, _ = simulate(2.0)
    state = planner.state_dict()
    again = Planner(WANTED, planner.budget)
    assert again.load_state_dict(state) and again.plan == planner.plan and again.costs == planner.costs
    for other in (Planner(WANTED, 900.0), Planner(Plan(30, 32, 192, 26), planner.budget)):
        assert not other.load_state_dict(state) and other.plan == other.wanted and other.costs == planner.costs


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_is_that_of_a_run_of_the_planned_length(schedule: str) -> None:
    def grpo(steps: int) -> Grpo:
        tasks = [{"name": "copy", "source": "synthetic"}]
        settings = Settings(
            tasks=tasks, max_steps=steps, lr_scheduler_type=schedule, learning_rate=1e-2, prompt_template="{question}"
        )
        tokenizer, built = tiny_tokenizer(), build_tasks(tasks, 0, 1)
        return Grpo(settings, tiny_model(tokenizer, 16, 1, 0), tokenizer, built, Prompter(tokenizer, built, settings))

    planned, short = grpo(100), grpo(7)
    for step in range(6):
        if step == 2:
            planned.plan_steps(7)
        for one in (planned, short):
            one.optimizer.step()
            one.scheduler.step()
        same = planned.scheduler.get_last_lr() == short.scheduler.get_last_lr()
        assert same == (step >= 2 or schedule == "constant")
        assert planned.optimizer.param_groups[0]["lr"] == planned.scheduler.get_last_lr()[0]


def test_openmp_threads_wait_passively_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    threads.wait_passively()
    assert threads.waiting() == "GOMP_SPINCOUNT=7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    threads.wait_passively()
    assert threads.waiting() == "OMP_WAIT_POLICY=passive"


def test_the_script_decides_before_torch_is_imported() -> None:
    code = "import sys; import train_grpo; print('torch' in sys.modules)"
    path = Path(__file__).resolve().parents[2] / "python"
    done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_threads_are_those_of_the_cores_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5, 9}, raising=False)
    for processor, siblings in ((0, "0,4"), (4, "0,4"), (1, "1,5"), (5, "1,5"), (2, "2,6")):
        folder = tmp_path / f"devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.choose_threads(0, tmp_path) == (3, "physical cores of this process")
    group = tmp_path / "fs/cgroup"
    group.mkdir(parents=True)
    for text, expected in (("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)):
        (group / "cpu.max").write_text(text + "\n")
        assert threads.choose_threads(0, tmp_path)[0] == expected
    (group / "cpu.max").unlink()
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1", 3), ("200000", 2)):
        (group / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        assert threads.choose_threads(0, tmp_path)[0] == expected
    assert threads.choose_threads(5, tmp_path) == (5, "num_threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.choose_threads(0, tmp_path) == (0, "OMP_NUM_THREADS=4")
    assert torch.get_num_threads() >= 1

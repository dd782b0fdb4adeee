"""Planning by time: how many steps, held-out questions and probe prompts fit into ``plan_minutes``.

Nothing is known about a machine's speed before the run, and it can change during the run. So the run measures what its
parts take and fits what is left into the time that is left: after every step, every evaluation and every round of the
final probe. A plan is made from the first steps; from then on it is only ever cut, but for the probe, which comes last
and takes the time that is left. Each change is printed and logged. Of the warm start at least half remains: without it
the rewards are all equal, and there is nothing to measure.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MARGIN = 0.05  # of the budget: for the summary, the report, and what takes longer than it did before
EVAL_SHARE = 0.15  # of the budget: the most that the evaluations still to come may take
WARM_SHARE = 0.4  # of the budget: the most that the warm start may take, down to half of its steps
PROBE_SHARE = 0.75  # of the time left after a step: the most that the probe may take where steps are still to come
LEAST_QUESTIONS = 8  # held-out questions of a task that an evaluation is not cut below
LEAST_PROMPTS = 16  # prompts of a task that the probe is not cut below
LATEST = 3  # steps whose mean duration is taken for that of the next ones
SETTLED = 2  # after so many steps the plan of the steps is only ever cut


@dataclass(frozen=True)
class Plan:
    """What a run does.

    ``steps`` of training, ``questions`` of each task per evaluation, ``prompts`` of each task in the final probe, and
    steps of the ``warm_start``.
    """

    steps: int
    questions: int
    prompts: int
    warm_start: int = 0

    def describe(self) -> str:
        """In words, without what the run does not have."""
        parts = [f"{self.steps} {'step' if self.steps == 1 else 'steps'}"]
        if self.warm_start:
            parts.insert(0, f"{self.warm_start} steps of the warm start")
        if self.questions:
            parts.append(f"{self.questions} held-out questions per task and evaluation")
        if self.prompts:
            parts.append(f"a probe of {self.prompts} prompts per task")
        return ", ".join(parts)


@dataclass
class Costs:
    """Seconds that the parts of a run took.

    ``steps``: each of the latest steps, with an estimate for one probe prompt of every task. ``prompt``: what one took
    in the probe; 0 before it. ``question``: one held-out question of every task. ``save``: a checkpoint.
    """

    steps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LATEST))
    prompt: float = 0.0
    question: float = 0.0
    save: float = 0.0

    @property
    def step(self) -> float:
        """One step: the mean of the latest; 0 before the first."""
        return sum(step for step, _ in self.steps) / max(len(self.steps), 1)

    @property
    def probe_prompt(self) -> float:
        """One probe prompt of every task: as measured, else as the steps let expect."""
        return self.prompt or sum(prompt for _, prompt in self.steps) / max(len(self.steps), 1)


class Planner:
    """The plan of one run, fitted into ``budget`` seconds since the run began.

    Arguments: wanted, what the settings ask for; budget, in seconds, 0 for a plan that never changes; eval_steps and
    save_steps, of the settings.
    """

    def __init__(self, wanted: Plan, budget: float, eval_steps: int = 0, save_steps: int = 0) -> None:
        self.wanted, self.budget = wanted, budget
        self.plan, self.costs = wanted, Costs()
        self.over = False  # the least that a run does takes longer than the budget
        self._every = (eval_steps, save_steps)

    @property
    def on(self) -> bool:
        """Whether there is a budget to fit into."""
        return self.budget > 0

    def fit(self, step: int, now: float) -> bool:
        """Fit what is left after ``step`` steps and ``now`` seconds into the budget; whether the plan changed."""
        before, ceiling = self.plan, self.wanted if step <= SETTLED else self.plan
        if not self.on or not self.costs.steps:
            return False
        left = self.budget * (1 - MARGIN) - now - self.costs.save
        plan = replace(before, steps=ceiling.steps, prompts=ceiling.prompts)
        more = max(ceiling.steps - step, 0)
        left -= self._evaluations(more) * plan.questions * self.costs.question
        each = self.costs.step + self._saving(more)
        steps, probe = more * each, plan.prompts * self.costs.probe_prompt
        if steps + probe > left:
            # Steps are cut first: the probe's estimates are the run's result, and need a number of prompts.
            room = max(left - steps, PROBE_SHARE * left if more else left, 0.0)
            if probe > room:
                prompts = min(plan.prompts, max(LEAST_PROMPTS, int(room / self.costs.probe_prompt)))
                plan = replace(plan, prompts=prompts)
            room = max(left - plan.prompts * self.costs.probe_prompt, 0.0)
            plan = replace(plan, steps=min(step + int(room / each), ceiling.steps))
        self.over = (plan.steps - step) * each + plan.prompts * self.costs.probe_prompt > max(left, 0.0)
        self.plan = plan
        return plan != before

    def fit_warm_start(self, done: int, seconds: float) -> bool:
        """Fit the warm start, whose first ``done`` steps took ``seconds``, into its share; whether it was cut."""
        before = self.plan.warm_start
        if self.on and done > 1:
            more = int(max(WARM_SHARE * self.budget - seconds, 0.0) / (seconds / done))
            least = max(done, (self.wanted.warm_start + 1) // 2)
            self.plan = replace(self.plan, warm_start=min(before, max(least, done + more)))
        return self.plan.warm_start < before

    def fit_questions(self, evaluations: int) -> bool:
        """Fit ``evaluations`` more evaluations into their share of the budget; whether their questions were cut."""
        before, asked = self.plan.questions, self.plan.questions * evaluations * self.costs.question
        most = EVAL_SHARE * self.budget
        if self.on and asked > most:
            fitting = max(LEAST_QUESTIONS, int(before * most / asked))
            self.plan = replace(self.plan, questions=min(before, fitting))
        return self.plan.questions < before

    def fit_prompts(self, measured: int, now: float) -> bool:
        """Fit the rest of a probe that has ``measured`` prompts of each task into the budget; whether the plan changed.

        Nothing comes after the probe, so it takes the time that is left, up to what was asked for.
        """
        before = self.plan.prompts
        if self.on and self.costs.probe_prompt > 0:
            more = int(max(self.budget * (1 - MARGIN) - now, 0.0) / self.costs.probe_prompt)
            least = max(measured, min(before, LEAST_PROMPTS))
            self.plan = replace(self.plan, prompts=max(least, min(self.wanted.prompts, measured + more)))
        return self.plan.prompts != before

    def _evaluations(self, more: int) -> int:
        """Evaluations still to come with ``more`` steps: the last one and those on the way."""
        return 1 + (max(more - 1, 0) // self._every[0] if self._every[0] else 0)

    def _saving(self, more: int) -> float:
        """Seconds of checkpoints per step, the last one left out."""
        return self.costs.save / self._every[1] if self._every[1] and more else 0.0

    def line(self, step: int) -> dict[str, Any]:
        """The plan and the costs behind it, as a line of the log: PLAN_METRICS."""
        return {
            "kind": "plan",
            "step": step,
            "planned_steps": self.plan.steps,
            "planned_questions": self.plan.questions,
            "planned_prompts": self.plan.prompts,
            "planned_warm_start": self.plan.warm_start,
            "step_seconds": self.costs.step,
            "question_seconds": self.costs.question,
            "prompt_seconds": self.costs.probe_prompt,
            "save_seconds": self.costs.save,
        }

    def state_dict(self) -> dict[str, Any]:
        """The plan, what was wanted, and the costs so far."""
        costs = self.costs
        return {
            "plan": asdict(self.plan),
            "wanted": asdict(self.wanted),
            "budget": self.budget,
            "costs": asdict(costs) | {"steps": list(costs.steps)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Keep to the plan of :meth:`state_dict`; False where other settings ask for another plan than that was."""
        costs = state["costs"]
        self.costs = Costs(**{**costs, "steps": deque(map(tuple, costs["steps"]), maxlen=LATEST)})
        if state["budget"] != self.budget or state["wanted"] != asdict(self.wanted):
            return False
        self.plan = Plan(**state["plan"])
        return True

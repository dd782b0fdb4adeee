"""The tracker on the architectures of transformers: default layers, and U against brute force for every kind of run.

Brute force takes each row alone and keeps, for every parameter, the inner products of the rows' gradients. Every
parameter that is not in ``tracker.skipped`` must be measured right, and what is skipped is in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

import gradnorm_kernels as gk
from tests.tracking.models.table import COMMAND, PAGE, row
from tests.tracking.models.tiny import MODELS, ROWS, losses_of, tiny_model

TASKS = ["a", "b", "a", "b", "a"]
#: Of the mean squared norm. Float64 models compute norms, rotary embeddings and routers in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}

Losses = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Run:
    """One micro-batch: which layers, how, on what input."""

    layers: str
    fused: bool
    padding: str
    reentrant: bool | None = None  # the kind of gradient checkpointing, None for none

    def __str__(self) -> str:
        checkpointing = {None: "", True: ", reentrant checkpointing", False: ", checkpointing"}[self.reentrant]
        return f"{self.layers}, {'fused' if self.fused else 'watched'}, padding {self.padding}{checkpointing}"


RUNS = [
    Run("all", False, "none"),
    Run("all", True, "right"),
    Run("all", False, "left"),
    Run("last_attention", True, "none"),
    Run("last_attention", False, "right"),
    Run("last_attention", True, "left"),
]
CHECKPOINTED = [
    Run("all", False, "right", reentrant=False),
    Run("last_attention", True, "left", reentrant=False),
    Run("all", True, "left", reentrant=True),
    Run("last_attention", False, "none", reentrant=True),
]


class Truth:
    """{parameter: [ROWS, ROWS] inner products of the rows' own gradients} per padding."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._grams: dict[str, dict[str, Tensor]] = {}

    def gram(self, padding: str, parameters: set[str]) -> Tensor:
        if padding not in self._grams:
            self._grams[padding] = self._brute_force(losses_of(self.model, self.name, padding))
        return sum((self._grams[padding][key] for key in parameters), torch.zeros(ROWS, ROWS, dtype=torch.float64))

    def _brute_force(self, losses: Losses) -> dict[str, Tensor]:
        parameters = {key: p for key, p in self.model.named_parameters() if p.requires_grad}
        rows = []
        with torch.no_grad():
            together, alone = losses(range(ROWS)), torch.cat([losses([index]) for index in range(ROWS)])
        assert torch.allclose(together, alone, rtol=1e-5), "the model itself has another loss for a row alone"
        for index in range(ROWS):
            grads = torch.autograd.grad(losses([index])[0], list(parameters.values()), allow_unused=True)
            rows.append([None if g is None else g.double().flatten() for g in grads])
        found = {}
        for key, own in zip(parameters, zip(*rows, strict=True), strict=True):
            size = parameters[key].numel()
            stacked = torch.stack([torch.zeros(size, dtype=torch.float64) if g is None else g for g in own])
            found[key] = stacked @ stacked.T
        return found


def trained(model: nn.Module, tracker: gk.GradNormTracker) -> set[str]:
    """Names of the parameters that ``tracker`` measures, each once."""
    names = {id(p): key for key, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    skipped = {id(every[key]) for key in tracker.skipped_reasons}
    modules = dict(model.named_modules())
    own = {id(p) for name in tracker.layers for p in modules[name].parameters(recurse=False) if p.requires_grad}
    return {names[key] for key in own - skipped}


def measure(model: nn.Module, run: Run, losses: Losses) -> tuple[gk.StepStats, gk.GradNormTracker]:
    tracker = gk.GradNormTracker(model, run.layers, fused=run.fused)
    model.zero_grad()
    try:
        with tracker.microbatch(TASKS):
            losses(range(ROWS)).mean().backward()
        return tracker.step(), tracker
    finally:
        tracker.close()


def faults_of(stats: gk.StepStats, gram: Tensor, dtype: torch.dtype) -> list[str]:
    """What differs from brute force; a NaN differs."""
    found = []
    for task in dict.fromkeys(TASKS):
        own = [row for row, other in enumerate(TASKS) if other == task]
        g = gram[own][:, own]
        size = float(g.trace() / len(own))
        u = float((g.sum() - g.trace()) / (len(own) * (len(own) - 1)))
        for what, got, want in (
            ("U", stats[task].sq_norm, u),
            ("mean squared norm", stats[task].mean_sq_norm, size),
        ):
            if not abs(got - want) <= TOLERANCE[dtype] * size:
                found.append(f"{what} of task {task} is {got:.8g} instead of {want:.8g}")
    return found


def marked(fast: Collection[str]) -> list[ParameterSet]:
    """All models, those outside ``fast`` as slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in MODELS]


FAST = [name for name, architecture in MODELS.items() if not architecture.slow]


@pytest.fixture(scope="module", params=marked(FAST))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, Truth]]:
    name = request.param
    model = tiny_model(name)
    yield name, model, Truth(model, name)


def check(case: tuple[str, nn.Module, Truth], runs: Sequence[Run]) -> dict[Run, gk.GradNormTracker]:
    """Hold each run's U and mean squared norm against brute force; what is to be refused must be, by name."""
    name, model, truth = case
    architecture = MODELS[name]
    trackers = {}
    for run in runs:
        if run.layers == "last_attention" and not architecture.at:
            continue
        refused = architecture.refused if run.layers == "last_attention" else ""
        if run.fused and not architecture.fused:
            refused = "has a forward of its own"
        if refused:
            with pytest.raises(ValueError, match=refused):
                measure(model, run, losses_of(model, name, run.padding))
            continue
        stats, tracker = measure(model, run, losses_of(model, name, run.padding))
        found = faults_of(stats, truth.gram(run.padding, trained(model, tracker)), MODELS[name].dtype)
        assert not found, f"{run}: {found}"
        if run.layers == "last_attention":
            assert tracker.skipped_reasons == {}
        trackers[run] = tracker
    return trackers


def test_default_layers(case: tuple[str, nn.Module, Truth]) -> None:
    name, model, _ = case
    if MODELS[name].at:
        assert set(gk.GradNormTracker(model).layers) == MODELS[name].default_layers
    else:
        with pytest.raises(ValueError, match="no attention with a softmax"):
            gk.GradNormTracker(model)


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.filterwarnings("ignore:these measured layers were never called:UserWarning")
@pytest.mark.parametrize("paddings", ["two", pytest.param("all", marks=pytest.mark.slow)])
def test_estimates_against_brute_force(case: tuple[str, nn.Module, Truth], paddings: str) -> None:
    """Both choices, watched and fused, without padding and on one side (in turns) or both; and docs/models.md says what
    is left out.
    """
    name, _, _ = case
    side = ("left", "right")[list(MODELS).index(name) % 2]
    trackers = check(case, [run for run in RUNS if paddings == "all" or run.padding in ("none", side)])
    first = trackers[RUNS[0]]
    page = PAGE.read_text().splitlines()
    assert row(name, first) in page, f"docs/models.md is not up to date: run {COMMAND}"
    for run, tracker in trackers.items():
        if run.layers == "all":
            assert set(tracker.skipped_reasons) <= set(first.skipped_reasons), str(run)


def test_the_page_has_every_model() -> None:
    rows = [line.split(" | ")[0].strip("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows == ["architecture", *MODELS]
    assert sum(not architecture.slow for architecture in MODELS.values()) >= 60


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.filterwarnings("ignore:these measured layers were never called:UserWarning")
@pytest.mark.parametrize("case", marked(FAST[::4]), indirect=True, scope="module")
def test_gradient_checkpointing(case: tuple[str, nn.Module, Truth]) -> None:
    name, model, truth = case
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this model")
    for run in CHECKPOINTED:
        if run.reentrant and not MODELS[name].reentrant:
            continue
        truth.gram(run.padding, set())  # autograd.grad does not go through the reentrant kind: before it is on
        model.gradient_checkpointing_enable({"use_reentrant": run.reentrant})
        model.enable_input_require_grads()
        try:
            check(case, [run])
        finally:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.filterwarnings("ignore:these measured layers were never called:UserWarning")
def test_watching_changes_no_bit(case: tuple[str, nn.Module, Truth]) -> None:
    name, model, _ = case
    model.zero_grad()
    losses_of(model, name, "right")(range(ROWS)).mean().backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    measure(model, Run("all", False, "right"), losses_of(model, name, "right"))
    assert torch.equal(torch.get_rng_state(), state)
    watched = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert watched.keys() == plain.keys()
    assert not [key for key, grad in plain.items() if not torch.equal(watched[key], grad)]

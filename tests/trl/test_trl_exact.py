"""attach() on GRPOTrainer: U against brute force over the rows of the trainer's own loss, for every loss type."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from packaging.version import Version

from gradnorm_kernels.integrations.trl import attach
from gradnorm_kernels.integrations.trl.loss_scale import LOSS_TYPES
from tests.trl import trl_tiny as tiny

trl = pytest.importorskip("trl")


class Watched:
    """A trainer with attach(), and what its loss and the tracker were given in each micro-batch."""

    def __init__(self, trainer: Any, **options: Any) -> None:
        self.trainer, self.seen, self.opened = trainer, [], []
        inner = trainer._compute_loss

        def compute(model: Any, inputs: dict[str, Any]) -> Any:
            if trainer.model.training:
                self.seen.append(dict(inputs))
            return inner(model, inputs)

        trainer._compute_loss = compute
        self.attached = attach(trainer, **options)
        microbatch = self.attached.tracker.microbatch

        def opened(**given: Any) -> Any:
            self.opened.append((len(self.seen), given))
            return microbatch(**given)

        self.attached.tracker.microbatch = opened

    def row_gradient(self, inputs: dict[str, Any], row: int) -> torch.Tensor:
        """The gradient of one row's mean-token loss, as the trainer computes a batch of that row alone."""
        trainer, alone = self.trainer, {}
        for name, value in inputs.items():
            alone[name] = value if value is None or value.ndim == 0 else value[row : row + 1]
        mask = alone["completion_mask"]
        length = max(int(mask.sum()), 1)
        spread = trainer.args.steps_per_generation * trainer.accelerator.num_processes
        alone["num_items_in_batch"] = torch.tensor(float(length * spread))
        steps, trainer.current_gradient_accumulation_steps = trainer.current_gradient_accumulation_steps, 1
        try:
            loss = type(trainer)._compute_loss(trainer, trainer.model, alone)
        finally:
            trainer.current_gradient_accumulation_steps = steps
        own = {"constant": trainer.max_completion_length / length, "sums": 1 / length}  # 1 for the other averages
        modules = dict(trainer.model.named_modules())
        parameters = [p for name in self.attached.tracker.layers for p in modules[name].parameters() if p.requires_grad]
        trainer.model.zero_grad()
        (loss * own.get(LOSS_TYPES[trainer.loss_type], 1.0)).backward()
        return torch.cat([p.grad.flatten() for p in parameters]).double()

    def parts(self) -> list[list[Part]]:
        """What the opened micro-batches are made of: each row's share of its sample's gradient."""
        group = self.trainer.num_generations
        return [
            [
                (task, sample, self.row_gradient(self.seen[index], row) / group, 1 / group)
                for row, (task, sample) in enumerate(zip(given["task_ids"], given["sample_ids"], strict=True))
            ]
            for index, given in self.opened
        ]

    def check(self, rel: float = 1e-4, exact: bool = False) -> None:
        """The published U are the truth's, and some are there."""
        parts = self.parts()
        truth, squares = u_of([sum(parts, [])] if exact else parts)
        assert truth
        for task, value in truth.items():
            assert self.attached.last[task].sq_norm == pytest.approx(value, rel=rel, abs=rel * squares[task])
        for task, gradient in self.attached.last.items():
            assert task in truth or math.isnan(gradient.sq_norm)


#: A row's task and sample, its share of the sample's gradient, and what share of the sample it is.
Part = tuple[str, Any, torch.Tensor, float]


def u_of(microbatches: list[list[Part]]) -> tuple[dict[str, float], dict[str, float]]:
    """U of each task from the pairs inside micro-batches, and the mean squared norm of its samples' parts there."""
    num: dict[str, float] = {}
    den: dict[str, float] = {}
    squares: dict[str, list[float]] = {}
    for rows in microbatches:
        sums: dict[Any, torch.Tensor] = {}
        share: dict[Any, float] = {}
        tasks = {sample: task for task, sample, _, _ in rows}
        for _, sample, gradient, weight in rows:
            sums[sample] = sums.get(sample, 0) + gradient
            share[sample] = share.get(sample, 0) + weight
        for sample, total in sums.items():
            squares.setdefault(tasks[sample], []).append(float(total @ total))
        for p, q in itertools.permutations(sums, 2):
            if tasks[p] == tasks[q]:
                num[tasks[p]] = num.get(tasks[p], 0.0) + float(sums[p] @ sums[q])
                den[tasks[p]] = den.get(tasks[p], 0.0) + share[p] * share[q]
    return {task: num[task] / den[task] for task in num}, {k: sum(v) / len(v) for k, v in squares.items()}


def many_ends() -> Any:
    """A model whose completions end early and at different lengths."""
    model = tiny.model()
    model.generation_config.eos_token_id = [1, 3, 4, 5, 6, 7, 8]
    if Version(trl.__version__) < Version("1.14"):  # asks the tokenizer alone, which has one end
        model.generation_config.sequence_bias = [[[1], 2.0]]
    return model


def stand_still(tmp_path: Any, **changes: Any) -> Any:
    """One step at learning rate 0: afterwards the weights are those that were measured."""
    return tiny.grpo(
        tmp_path, **{"trained": many_ends(), "max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, **changes}
    )


SETTINGS: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in LOSS_TYPES},
    "cispo unclamped": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo dapo": {"loss_type": "dapo", "importance_sampling_level": "sequence"},
    "luspo sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "two-sided": {"loss_type": "bnpo", "delta": 4.0},
    "truncated masked": {"loss_type": "dapo", "mask_truncated_completions": True},
    "one micro-batch": {"loss_type": "bnpo", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 16},
    "several generations a step": {"loss_type": "dapo", "steps_per_generation": 1, "gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "head in fp32": {"cast_lm_head_to_fp32": True},
    "rewards unscaled": {"scale_rewards": "none", "loss_type": "grpo"},
}
#: One difference less from another setting.
SLOW = {"gspo dapo", "luspo sequence", "checkpointing", "cispo unclamped", "one micro-batch"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SETTINGS])
def test_u_is_that_of_the_trainers_own_loss(tmp_path, name):
    watched = Watched(stand_still(tmp_path, **SETTINGS[name]))
    watched.trainer.train()
    assert len(watched.opened) == watched.trainer.args.gradient_accumulation_steps
    lengths = {int(n) for inputs in watched.seen for n in inputs["completion_mask"].sum(1)}
    assert len(lengths) > 2  # or the loss types could not be told apart
    watched.check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loss_type", ["grpo", "dapo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bnpo", "dr_grpo"))]
)
def test_fused_measures_the_same_and_trains_to_rounding(tmp_path, loss_type):
    watched = Watched(stand_still(tmp_path, loss_type=loss_type), fused=True)
    watched.trainer.train()
    watched.check()
    runs = []
    for fused in (None, True):
        trainer = tiny.grpo(tmp_path, trained=many_ends(), loss_type=loss_type, max_steps=1, optim="sgd")
        if fused:
            attach(trainer, fused=True)
        trainer.train()
        runs.append(tiny.weights(trainer))
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_under_bf16_autocast(tmp_path, fused):
    watched = Watched(stand_still(tmp_path, bf16=True), fused=fused)
    watched.trainer.train()
    watched.check(rel=0.03)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", ["all", r"layers\.0\.mlp", ["model.layers.1"]])
def test_other_layers(tmp_path, layers):
    watched = Watched(stand_still(tmp_path), layers=layers)
    watched.trainer.train()
    assert "lm_head" not in watched.attached.tracker.layers
    assert ("model.embed_tokens" in watched.attached.tracker.layers) == (layers == "all")
    watched.check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", [pytest.param("grpo", marks=pytest.mark.slow), "dapo"])
def test_a_kl_term_counts(tmp_path, loss_type):
    """The reference is loaded from where the model was saved; the model has moved since, so the term has a gradient."""
    many_ends().save_pretrained(tmp_path / "base")
    trained = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    watched = Watched(stand_still(tmp_path, trained=trained, beta=0.5, loss_type=loss_type))
    watched.trainer.train()
    watched.check()
    counted, _ = u_of(watched.parts())
    watched.trainer.beta = 0.0
    without, _ = u_of(watched.parts())
    assert any(value != pytest.approx(without[task], rel=0.01) for task, value in counted.items())


class Rollouts:
    """What TRL asks of vLLM: weights synchronised, completions with the log-probabilities of another policy."""

    def __init__(self) -> None:
        self.synchronised = 0

    def sync_weights(self) -> None:
        self.synchronised += 1

    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> Any:
        draw = torch.Generator().manual_seed(3)
        lengths = torch.randint(2, 6, (len(prompts),), generator=draw).tolist()
        completions = [torch.randint(3, 31, (n,), generator=draw).tolist() for n in lengths]
        logprobs = [(-3.4 + 0.2 * torch.randn(n, 1, generator=draw)).tolist() for n in lengths]
        return prompts, completions, logprobs, None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_rollouts_of_another_engine(tmp_path, mode):
    """The importance ratio between engine and trainer is part of a row's loss."""
    trainer = stand_still(tmp_path, vllm_importance_sampling_mode=mode)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Rollouts(), -1
    watched = Watched(trainer)
    trainer.train()
    assert trainer.vllm_generation.synchronised == 1
    assert len({float(r) for seen in watched.seen for r in seen["importance_sampling_ratio"].flatten()}) > 2
    watched.check()


@pytest.mark.filterwarnings("ignore")
def test_groups_kept_together_meet_whole(tmp_path):
    apart = Watched(stand_still(tmp_path))
    together = Watched(stand_still(tmp_path), keep_groups_together=True)
    for watched in (apart, together):
        watched.trainer.train()
        watched.check()
    for _, given in together.opened:
        assert all(given["sample_ids"].count(sample) == 4 for sample in given["sample_ids"])
    assert any(given["sample_ids"].count(sample) != 4 for _, given in apart.opened for sample in given["sample_ids"])
    for gradient in together.attached.last.values():
        assert gradient.pair_weight == round(gradient.pair_weight)
    assert trl.trainer.grpo_trainer.shuffle_sequence_dict.__module__.startswith("trl")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, {"loss_type": "bnpo", "steps_per_generation": 1}])
def test_exact_accumulation_pairs_prompts_across_micro_batches(tmp_path, changes):
    with pytest.raises(ValueError, match="accumulate='exact' needs keep_groups_together=True"):
        attach(stand_still(tmp_path, **changes), accumulate="exact")
    watched = Watched(stand_still(tmp_path, **changes), accumulate="exact", keep_groups_together=True)
    watched.trainer.train()
    watched.check(exact=True)
    for gradient in watched.attached.last.values():
        assert gradient.pair_weight == pytest.approx(gradient.n * (gradient.n - 1))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_scale_is_divided_out(tmp_path):
    watched = Watched(stand_still(tmp_path))
    watched.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    watched.trainer.train()
    watched.check()


@pytest.mark.filterwarnings("ignore")
def test_gmpo_averages_over_rows(tmp_path):
    """Whatever its loss_type, which stays at GRPOConfig's "dapo"."""
    from trl.experimental.gmpo import GMPOTrainer

    watched = Watched(stand_still(tmp_path, kind=GMPOTrainer))
    assert watched.trainer.loss_type == "dapo"
    watched.trainer.train()
    watched.check()
    with pytest.raises(ValueError, match="Changed computes a loss of its own"):
        attach(stand_still(tmp_path, kind=type("Changed", (GMPOTrainer,), {"_compute_loss": lambda *_: None})))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_of_its_own_takes_its_own_row_scale(tmp_path):
    class Doubled(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return 2 * super()._compute_loss(model, inputs)

    def half(trainer: Any, inputs: Any) -> Any:
        from gradnorm_kernels.integrations.trl.loss_scale import grpo_row_scale

        return grpo_row_scale(trainer, inputs) / 2

    plain = Watched(stand_still(tmp_path))
    plain.trainer.train()
    own = attach(doubled := stand_still(tmp_path, kind=Doubled), row_scale=half)
    doubled.train()
    for task, gradient in plain.attached.last.items():
        assert own.last[task].sq_norm == pytest.approx(gradient.sq_norm, rel=1e-5, nan_ok=True)
    with pytest.raises(ValueError, match=r"Doubled computes a loss of its own .*pass row_scale=.*grpo_row_scale"):
        attach(stand_still(tmp_path, kind=Doubled))

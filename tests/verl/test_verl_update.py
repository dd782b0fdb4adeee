"""U of verl's own actor update on a CPU, against brute force over the rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl.workers", reason="verl is not installed: make test-verl runs these tests")

from gradnorm_kernels.integrations.verl import attach
from gradnorm_kernels.integrations.verl.attach import PADDING
from gradnorm_kernels.integrations.verl.loss_scale import FORMULAS, POLICY_LOSSES
from tests.tracking.brute_force import jackknife, u_statistic
from tests.verl import cpu_worker as cpu

PADDED, PACKED = False, True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cpu.start()
    return cpu.saved_model(tmp_path_factory.mktemp("model"))


def token_losses(log_prob: Tensor, row: dict[str, Any], kl: float, dppo: bool = False) -> Tensor:
    """The clipped policy loss of each token with verl's default clipping, and ``kl`` times the "low_var_kl" penalty."""
    ratio = (log_prob - row["old_log_probs"]).exp()
    advantages = row["advantages"]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)
    difference = row["ref_log_prob"] - log_prob
    return loss + kl * (difference.exp() - difference - 1).clamp(-10, 10)


def rows_of(data: Any) -> list[dict[str, Any]]:
    """The batch, row by row, in float64."""
    names = ("prompts", "responses", "response_mask", "advantages", "old_log_probs", "ref_log_prob", "input_ids")
    columns = {name: data[name].unbind() for name in names}
    rows = [{name: columns[name][i] for name in names} for i in range(len(data))]
    for row in rows:
        row.update({name: value.double() for name, value in row.items() if value.is_floating_point()})
    return rows


def sample_gradients(
    folder: Path, data: Any, layers: tuple[str, ...], kl: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """({row number: gradient}, {prompt: mean over its rows}, {prompt: task}): float64, one row at a time, unpadded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().train()
    parameters = [p for name, p in model.named_parameters() if name.startswith(layers)]
    by_row = []
    for row in rows_of(data):
        logits = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        start = len(row["prompts"])
        picked = logits[start - 1 : -1].log_softmax(-1).gather(1, row["responses"].unsqueeze(1)).squeeze(1)
        mask = row["response_mask"].double()
        loss = (token_losses(picked, row, kl) * mask).sum() / mask.sum().clamp(min=1)
        by_row.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    uids, tasks = data["uid"], data["data_source"]
    prompts = {uid: torch.stack([g for g, u in zip(by_row, uids, strict=True) if u == uid]).mean(0) for uid in uids}
    return dict(enumerate(by_row)), prompts, dict(zip(uids, tasks, strict=True))


LAST = ("model.layers.1.self_attn",)


def by_task(prompts: dict[str, Tensor], tasks: dict[str, str]) -> dict[str, Tensor]:
    return {
        task: torch.stack([prompts[uid] for uid in prompts if tasks[uid] == task])
        for task in dict.fromkeys(tasks.values())
    }


def measured(folder: Path, data: Any, *, remove_padding: bool, loss: dict | None = None, **options: Any) -> Any:
    """(metrics, attachment) of one update with the tracker on."""
    changes = {name: options.pop(name) for name in ("engine", "model") if name in options}
    arguments = {name: options.pop(name) for name in ("mini_batch", "epochs") if name in options}
    worker = cpu.training_worker(folder, remove_padding=remove_padding, **changes)
    worker.set_loss_fn(cpu.actor_loss(**(loss or {})))
    attachment = attach(worker, **options)
    return cpu.update(worker, data, **arguments), attachment


@pytest.mark.parametrize("remove_padding", [PADDED, PACKED])
@pytest.mark.parametrize("mode", FORMULAS)
def test_u_is_that_of_brute_force_for_each_loss_agg_mode(folder: Path, mode: str, remove_padding: bool) -> None:
    data = cpu.rollouts(prompts=12)
    _, prompts, tasks = sample_gradients(folder, data, LAST)
    metrics, attachment = measured(
        folder, data, remove_padding=remove_padding, loss={"loss_agg_mode": mode}, accumulate="pairs",
        engine={"micro_batch_size_per_gpu": 36},
    )  # fmt: skip
    for task, gradients in by_task(prompts, tasks).items():
        found = attachment.last[task]
        assert found.sq_norm == pytest.approx(u_statistic(gradients), rel=1e-4), task
        assert found.std_error == pytest.approx(jackknife(gradients), rel=1e-4), task
        assert found.n == len(gradients) == 4
        assert metrics[f"actor/tasks/{task}/grad_norm_sq"] == found.sq_norm
        assert metrics[f"actor/tasks/{task}/grad_norm_sq_se"] == found.std_error
        assert metrics[f"actor/tasks/{task}/n"] == 4


def test_the_kl_term_is_part_of_a_rows_loss(folder: Path) -> None:
    data = cpu.rollouts()
    _, prompts, tasks = sample_gradients(folder, data, LAST, kl=0.3)
    loss = {"use_kl_loss": True, "kl_loss_coef": 0.3}
    _, attachment = measured(folder, data, remove_padding=PACKED, loss=loss, accumulate="exact")
    for task, gradients in by_task(prompts, tasks).items():
        assert attachment.last[task].sq_norm == pytest.approx(u_statistic(gradients), rel=1e-4), task


@pytest.mark.parametrize("remove_padding", [PADDED, PACKED])
def test_every_layer_under_fsdp2(folder: Path, remove_padding: bool) -> None:
    data = cpu.rollouts()
    _, prompts, tasks = sample_gradients(folder, data, ("model.", "lm_head."))
    _, attachment = measured(folder, data, remove_padding=remove_padding, layers="all", accumulate="exact")
    assert attachment.tracker.skipped == {}
    for task, gradients in by_task(prompts, tasks).items():
        assert attachment.last[task].sq_norm == pytest.approx(u_statistic(gradients), rel=2e-4), task


@pytest.mark.parametrize("remove_padding", [PADDED, PACKED])
def test_a_prompt_spread_over_micro_batches_counts_by_its_shares(folder: Path, remove_padding: bool) -> None:
    data = cpu.rollouts(prompts=20)
    rows, _, _ = sample_gradients(folder, data, LAST)
    size = 20  # with 3 rows per prompt, no micro-batch but the last ends with a prompt
    _, attachment = measured(
        folder, data, remove_padding=remove_padding, accumulate="pairs", engine={"micro_batch_size_per_gpu": size}
    )
    uids, tasks = data["uid"], data["data_source"]
    numerator, denominator = dict.fromkeys(cpu.TASKS, 0.0), dict.fromkeys(cpu.TASKS, 0.0)
    for first in range(0, len(uids), size):
        parts: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        owner: dict[str, str] = {}
        for i in range(first, first + size):
            parts[uids[i]] = parts.get(uids[i], 0.0) + rows[i] / 3
            shares[uids[i]] = shares.get(uids[i], 0.0) + 1 / 3
            owner[uids[i]] = tasks[i]
        for a, b in itertools.permutations(parts, 2):
            if owner[a] == owner[b]:
                numerator[owner[a]] += float(parts[a] @ parts[b])
                denominator[owner[a]] += shares[a] * shares[b]
    for task in cpu.TASKS:
        expected = numerator[task] / denominator[task]
        assert attachment.last[task].sq_norm == pytest.approx(expected, rel=1e-4), task


def test_dynamic_batches_and_trailing_padding_tokens(folder: Path) -> None:
    data = cpu.rollouts()
    _, prompts, tasks = sample_gradients(folder, data, LAST)
    engine = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 600, "pad_to_length": True, "pad_to_length_bucket": 128}
    _, attachment = measured(folder, data, remove_padding=PACKED, engine=engine, accumulate="pairs")
    for task, gradients in by_task(prompts, tasks).items():
        assert attachment.last[task].sq_norm == pytest.approx(u_statistic(gradients), rel=1e-4), task


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_verls_padding_rows_are_no_samples(folder: Path, mode: str) -> None:
    data = cpu.rollouts(padding=6)
    _, prompts, tasks = sample_gradients(folder, data, LAST)
    metrics, attachment = measured(
        folder, data, remove_padding=PACKED, loss={"loss_agg_mode": mode}, accumulate="exact"
    )
    assert set(attachment.last) == set(attachment.tracker.running) == set(cpu.TASKS)
    assert not [key for key in metrics if PADDING in key]
    for task, gradients in by_task({u: g for u, g in prompts.items() if not u.startswith("pad")}, tasks).items():
        assert attachment.last[task].n == len(gradients)
        assert attachment.last[task].sq_norm == pytest.approx(u_statistic(gradients), rel=1e-4), task


def test_only_the_first_mini_batch_of_an_update_is_measured(folder: Path) -> None:
    data = cpu.rollouts(prompts=8)
    _, prompts, tasks = sample_gradients(folder, data, LAST)
    first = {uid: prompts[uid] for uid in list(prompts)[:4]}
    metrics, attachment = measured(folder, data, remove_padding=PACKED, mini_batch=12, epochs=2, accumulate="exact")
    assert {task: found.n for task, found in attachment.last.items()} == {"sums": 2, "facts": 1, "loud": 1}
    expected = u_statistic(by_task(first, tasks)["sums"])
    assert metrics["actor/tasks/sums/grad_norm_sq"] == pytest.approx(expected, rel=1e-4)
    assert "actor/tasks/facts/grad_norm_sq" not in metrics, "one prompt has no pair"
    assert attachment.tracker.running["sums"].n == 2, "later mini-batches and epochs must not be measured"


def test_an_update_that_failed_leaves_nothing_for_the_next_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As out of memory in the second micro-batch, after which the caller tries other data."""
    data = cpu.rollouts(prompts=12)
    _, expected = measured(folder, data, remove_padding=True, accumulate="exact")
    worker = cpu.training_worker(folder, remove_padding=True, engine={"micro_batch_size_per_gpu": 12})
    worker.set_loss_fn(cpu.actor_loss())
    attachment = attach(worker, accumulate="exact")
    forward, calls = worker.engine.forward_step, itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError("planted")
        return forward(*args, **kwargs)

    monkeypatch.setattr(worker.engine, "forward_step", failing)
    with pytest.raises(MemoryError, match="planted"):
        cpu.update(worker, data)
    worker.engine.optimizer.zero_grad()
    cpu.update(worker, data)
    for task, gradient in expected.last.items():
        assert attachment.last[task].sq_norm == pytest.approx(gradient.sq_norm, rel=1e-4), task


def test_one_in_every_updates(folder: Path) -> None:
    worker = cpu.training_worker(folder)
    worker.set_loss_fn(cpu.actor_loss())
    attach(worker, every=2)
    keys = [
        any(key.startswith("actor/tasks/") for key in cpu.update(worker, cpu.rollouts(seed=seed))) for seed in range(3)
    ]
    assert keys == [True, False, True]


@pytest.mark.parametrize("remove_padding", [PADDED, PACKED])
def test_watching_changes_nothing_and_detach_puts_everything_back(folder: Path, remove_padding: bool) -> None:
    def trained(options: dict[str, Any] | None) -> tuple[list[float], dict[str, Tensor], Any]:
        worker = cpu.training_worker(folder, remove_padding=remove_padding)
        worker.set_loss_fn(cpu.actor_loss())
        before = (dict(vars(worker)), dict(vars(worker.engine)))
        attachment = None if options is None else attach(worker, **options)
        losses = [cpu.update(worker, cpu.rollouts(seed=seed))["actor/loss"] for seed in range(2)]
        if attachment is not None:
            attachment.detach()
            assert set(vars(worker)) == set(before[0])
            assert set(vars(worker.engine)) == set(before[1])
        losses.append(cpu.update(worker, cpu.rollouts(seed=2))["actor/loss"])
        return losses, {name: p.full_tensor() for name, p in worker.engine.module.named_parameters()}, attachment

    plain, watched = trained(None), trained({"layers": "all"})
    assert plain[0] == watched[0]
    assert all(torch.equal(plain[1][name], watched[1][name]) for name in plain[1])
    assert watched[2].last, "it did measure"


def test_bfloat16_autocast_and_gradient_checkpointing(folder: Path) -> None:
    """verl's defaults for precision and memory: U is that of float32 to bfloat16's accuracy."""
    data = cpu.rollouts()
    loss = {"policy_loss": {"loss_mode": "gpg"}}  # no clipping, whose decisions rounding would flip
    _, reference = measured(folder, data, remove_padding=PACKED, loss=loss, accumulate="exact")
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    _, attachment = measured(
        folder, data, remove_padding=PACKED, loss=loss, accumulate="exact", engine={"mixed_precision": precision}
    )
    for task in cpu.TASKS:
        found, expected = attachment.last[task], reference.last[task]
        assert found.mean_sq_norm == pytest.approx(expected.mean_sq_norm, rel=0.1)
        assert abs(found.sq_norm - expected.sq_norm) < 0.1 * expected.mean_sq_norm


@pytest.mark.parametrize("mode", [mode for mode, average in POLICY_LOSSES.items() if average is None])
def test_known_policy_losses_follow_loss_agg_mode(folder: Path, mode: str) -> None:
    """Each row's share of two averages differs, and U does not."""
    found = []
    for average in ("token-mean", "seq-mean-token-mean"):
        extra = {"dro_beta": 0.1} if mode == "dro" else {}
        loss = {"policy_loss": {"loss_mode": mode, **extra}}
        torch.manual_seed(3)  # "clip_cov" chooses tokens at random
        _, attachment = measured(
            folder, cpu.rollouts(), remove_padding=PACKED, loss={"loss_agg_mode": average, **loss}, accumulate="exact"
        )
        found.append([attachment.last[task].sq_norm for task in cpu.TASKS])
    assert found[0] == pytest.approx(found[1], rel=1e-3)

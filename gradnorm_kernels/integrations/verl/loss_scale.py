"""What verl's actor loss does to a row, and the row scale that undoes it for the measurement.

Written against verl 0.9.1. A row's own loss is the mean of the losses of its response tokens. ``row_scale`` is the
factor from the row's share of the differentiated loss to the row's own loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

#: ``loss_agg_mode`` -> the row scale, as the documentation prints it.
FORMULAS = {
    "token-mean": "N / (W L_i)",
    "token-sum": "1 / (W L_i)",
    "seq-mean-token-sum": "B / (W L_i)",
    "seq-mean-token-sum-norm": "B H / (W L_i)",
    "seq-mean-token-mean": "B / W",
}
#: Policy losses (``policy_loss.loss_mode``) -> how they average: None follows ``loss_agg_mode``.
POLICY_LOSSES: dict[str, str | None] = {
    "vanilla": None,
    "dppo_tv": None,
    "dppo_kl": None,
    "gspo": None,
    "sapo": "seq-mean-token-mean",
    "gpg": None,
    "clip_cov": None,
    "kl_cov": None,
    "dro": None,
    "cispo": None,
}
#: Policy losses that choose tokens by a statistic of the whole micro-batch.
COUPLED = ("clip_cov", "kl_cov")


def actor_config(loss_function: Any) -> Any:
    """The ActorConfig of verl's own ``partial(ppo_loss, config=...)``.

    Raises:
        ValueError: another loss function.
    """
    from verl.workers.utils.losses import ppo_loss

    if isinstance(loss_function, partial) and loss_function.func is ppo_loss and "config" in loss_function.keywords:
        return loss_function.keywords["config"]
    inner = loss_function.func if isinstance(loss_function, partial) else loss_function
    name = getattr(inner, "__qualname__", repr(inner))
    raise ValueError(
        f"the actor's loss function is {name}, and only verl's ppo_loss is known: pass row_scale=, a function of the "
        "micro-batch that returns the factor from each row's share of the loss to the row's own loss"
    )


def average(config: Any) -> str:
    """How the actor's loss averages: a key of ``FORMULAS``.

    Raises:
        ValueError: a policy loss whose average is not known, or terms of the loss that average in different ways.
    """
    mode = config.policy_loss.get("loss_mode", "vanilla")
    if mode not in POLICY_LOSSES:
        raise ValueError(
            f"actor.policy_loss.loss_mode={mode!r} averages in a way that is not known (known: "
            f"{', '.join(POLICY_LOSSES)}): pass row_scale="
        )
    fixed = POLICY_LOSSES[mode]
    own: str = config.loss_agg_mode
    if own not in FORMULAS:
        raise ValueError(f"actor.loss_agg_mode={own!r} is not known (known: {', '.join(FORMULAS)}): pass row_scale=")
    if fixed is not None and fixed != own and (config.use_kl_loss or config.entropy_coeff):
        raise ValueError(
            f"loss_mode={mode!r} averages as {fixed!r}, the KL and entropy terms as loss_agg_mode={own!r}, so a row "
            f"has no one scale: set actor.loss_agg_mode={fixed}, or pass row_scale="
        )
    return own if fixed is None else fixed


def response_lengths(micro_batch: Any) -> Tensor:
    """[B] float64 on the CPU: L_i, the response tokens of each row that are in the loss."""
    mask = micro_batch["response_mask"]
    if mask.is_nested:
        mask = mask.to_padded_tensor(0)
    lengths: Tensor = mask.sum(1).double().cpu()
    return lengths


def row_scale(micro_batch: Any, config: Any) -> Tensor:
    """[B] float64: the factor from row i's share of verl's actor loss to row i's own mean-token loss.

    By ``loss_agg_mode``: "token-mean" ``N / (W L_i)``, "token-sum" ``1 / (W L_i)``, "seq-mean-token-sum"
    ``B / (W L_i)``, "seq-mean-token-sum-norm" ``B H / (W L_i)``, "seq-mean-token-mean" ``B / W``. Row i has L_i
    response tokens in the loss (1 where it has none). The mini-batch has N of them and B rows over all W data-parallel
    ranks; H is ``loss_scale_factor``, or the width of the micro-batch's response mask.

    Args:
        micro_batch: the TensorDict that ``forward_step`` gets.
        config: verl's ActorConfig.

    Raises:
        ValueError: an average that is not known (:func:`average`).
    """
    from verl.utils.tensordict_utils import get_non_tensor_data

    mode = average(config)
    ranks = get_non_tensor_data(micro_batch, "dp_size", None)
    lengths = response_lengths(micro_batch).clamp(min=1)
    if mode == "token-sum":
        return 1.0 / (ranks * lengths)
    if mode == "token-mean":
        return get_non_tensor_data(micro_batch, "batch_num_tokens", None) / (ranks * lengths)
    rows = get_non_tensor_data(micro_batch, "global_batch_size", None)
    if mode == "seq-mean-token-mean":
        return lengths.new_full(lengths.shape, rows / ranks)
    if mode == "seq-mean-token-sum":
        return rows / (ranks * lengths)
    horizon = config.loss_scale_factor
    if horizon is None:
        mask = micro_batch["response_mask"]
        horizon = int(mask.offsets().diff().max()) if mask.is_nested else mask.shape[1]
    return rows * horizon / (ranks * lengths)

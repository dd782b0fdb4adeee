"""What a backend declares, what it is handed and fills, and the operators it may have.

A backend is a package of :mod:`gradnorm_kernels.backends` with a :class:`Backend` named ``BACKEND`` and one function
per operator, named after it:

- ``fused_grad_norm(batch, plan)``, ``grad_gram(batch, plan)``, ``grad_dot(batch, v, plan)``,
  ``grad_sketch(batch, c_in, c_out, plan)``;
- ``embedding_grad_norm(batch, plan)``, ``tied_grad_gram(head, embedding, plan)``.

A batch is a :class:`~gradnorm_kernels.batch.GradBatch`. :mod:`gradnorm_kernels.backends.torch` has all operators. A
backend refuses by name an operator whose function its package lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The operators, as their functions are named in a backend's package.
OPERATORS = ("fused_grad_norm", "grad_gram", "grad_dot", "grad_sketch", "embedding_grad_norm", "tied_grad_gram")
#: What most hand-written kernels take; they accumulate in float32.
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
# What a float64 call is told by the backends that accumulate in float32.
NO_FLOAT64 = "takes float32, bfloat16 and float16, not float64: use backend='torch', or convert: x.float(), dy.float()"


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    ``gram_tokens``: samples of at most so many tokens get their norm from the Gram, longer ones from segmented wgrad.
    ``group_sums``: "wgrad" takes the groups' sums from segmented wgrad, "gram" everything from pairs of tokens.
    ``workspace``: the most elements of weight-gradient rows held at a time. ``tile``: the most tokens at a side of a
    Gram tile.
    """

    backend: str
    gram_tokens: int
    group_sums: str
    workspace: int
    tile: int


@dataclass(frozen=True)
class Results:
    """What a launch of segmented wgrad fills: the squared norms sample_sq [N] and group_sq [K] float64; where they are
    wanted dW [d_out, d_in] in x's dtype and the groups' Gram [K, K] float64."""

    sample_sq: Tensor
    group_sq: Tensor
    weight_grad: Tensor | None
    group_gram: Tensor | None

    @staticmethod
    def empty(like: Tensor, samples: int, groups: int, weight_grad: Tensor | None, group_gram: bool) -> Results:
        """Not initialised, on the device of ``like``."""
        sample_sq, group_sq = (like.new_empty(size, dtype=torch.float64) for size in (samples, groups))
        gram = like.new_empty(groups, groups, dtype=torch.float64) if group_gram else None
        return Results(sample_sq, group_sq, weight_grad, gram)


def _always() -> None:
    """The default: nothing is missing."""


def _anything(device_type: str, dtype: torch.dtype) -> None:
    """The default: every device and dtype that the operators take."""


@dataclass(frozen=True)
class Backend:
    """What a backend declares.

    ``name``: the name of its package, and the value of ``backend=`` that asks for it.
    ``devices``: the types of device on which ``backend="auto"`` considers it; None for every type.
    ``dtypes``: the dtypes it takes.
    ``priority``: among backends that can serve a call, ``"auto"`` takes the one with the highest priority, unless a
    measurement says otherwise.
    ``why``: why ``"auto"`` takes it, as the end of "backend 'name' ...".
    ``unavailable_reason()``: why it cannot run in this process at all; None if it can.
    ``unsupported_reason(device_type, dtype)``: why it cannot take such tensors, given that it can run; None if it can.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    priority: int
    why: str
    unavailable_reason: Callable[[], str | None] = _always
    unsupported_reason: Callable[[str, torch.dtype], str | None] = _anything

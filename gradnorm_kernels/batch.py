"""One call of an operator: :class:`GradBatch`, the checked arguments and the sizes that follow from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GradBatch(NamedTuple):
    """A checked call: made by :mod:`.checks`, read by :mod:`.dispatch`, taken by a backend.

    ``op``: the operator's name, which is also the name of the function in a backend's package.
    ``x`` [T, d_in] or [B, L, d_in], ``dy`` [T, d_out] or [B, L, d_out]. For an embedding ``x`` holds the token ids,
    [T] or [B, L] integers, and ``d_in`` is 0.
    ``cu_seqlens`` [S+1], ``sample_ids`` [S], ``group_ids`` [N]: integers or None, as the caller gave them.
    ``tokens`` T, ``segments`` S, ``samples`` N, ``groups`` K. ``samples`` and ``groups`` are None where only the ids'
    values determine them.
    ``weight_grad``, ``group_gram``: which optional results are wanted. ``algorithm``, ``backend``: what was asked for.
    """

    op: str
    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor | None
    sample_ids: Tensor | None
    group_ids: Tensor | None
    tokens: int
    d_in: int
    d_out: int
    segments: int
    samples: int | None
    groups: int | None
    weight_grad: bool
    group_gram: bool
    algorithm: str
    backend: str

    @property
    def empty(self) -> bool:
        """Whether every product is an empty sum."""
        width = self.d_in if self.x.is_floating_point() else 1
        return 0 in (self.tokens, width, self.d_out, self.segments)

    @property
    def names(self) -> tuple[str, str, str]:
        """The names of ``x``, ``cu_seqlens`` and ``sample_ids`` in the call, for messages."""
        if self.x.is_floating_point():
            return "x", "cu_seqlens", "sample_ids"
        side = "e_" if self.op == "tied_grad_gram" else ""
        return "ids", f"{side}cu_seqlens", f"{side}sample_ids"

"""``accumulate="exact"``: the tasks' gradient sums themselves, kept over micro-batches and added over ranks.

Memory is one float32 copy of the measured parameters per task. The samples' own squares still come from the
operator, micro-batch by micro-batch; only ``||sum over all samples||^2`` needs the sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.torch.numerics import exact_matmuls
from ..segments import to_device
from . import distributed
from .parameter_gram import Tokens


class TaskSums:
    """``S_k = sum over the step's samples of task k of G_p`` for every measured parameter, by the parameter's name."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Hashable, Tensor]] = {}

    def add_weight(self, name: str, tokens: Tokens, row_task: Sequence[Hashable], vocabulary: int) -> None:
        """Add one use of a weight: ``sum over the task's tokens of scale dy^T x``.

        ``row_task``: [R] the task of each row. ``vocabulary``: rows of the matrix, where the tokens are an embedding's.
        """
        wide = torch.promote_types(tokens.dy.dtype, torch.float32)
        row_of = torch.arange(len(row_task), device="cpu").repeat_interleave(tokens.lengths.cpu())
        for task in dict.fromkeys(row_task):
            rows = torch.tensor([other == task for other in row_task], device="cpu")
            mine = rows[row_of].nonzero()[:, 0]  # on the host, where a shape may depend on it
            at = to_device(mine, tokens.dy.device)
            factor = to_device(tokens.scale[row_of[mine]].to(wide), tokens.dy.device)
            dy = tokens.dy[at].to(wide) * factor[:, None]
            x = tokens.x[at]
            if tokens.embedding:
                dy = torch.where((x >= 0)[:, None], dy, 0.0)
                slot = self._slot(name, task, dy, (vocabulary, dy.shape[1]))
                # Unlike index_add_, this sorts the ids on a GPU: the same bits every run.
                slot.index_put_((x.clamp_min(0),), dy, accumulate=True)
                continue
            with exact_matmuls(dy.device):
                self._slot(name, task, dy, (dy.shape[1], x.shape[1])).addmm_(dy.T, x.to(wide))

    def add_vectors(self, name: str, grads: Tensor, sample_task: Sequence[Hashable]) -> None:
        """Add a small parameter's gradients of N samples, [N, d]. ``sample_task``: the task of each sample."""
        for task in dict.fromkeys(sample_task):
            rows = torch.tensor([i for i, other in enumerate(sample_task) if other == task], device="cpu")
            total = grads[to_device(rows, grads.device)].sum(0)
            self._slot(name, task, total, tuple(total.shape)).add_(total)

    def discard(self, names: Iterable[str]) -> None:
        """Forget parameters that turned out not to be measurable."""
        for name in names:
            self._sums.pop(name, None)

    def _slot(self, name: str, task: Hashable, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        slots = self._sums.setdefault(name, {})
        if task not in slots:
            slots[task] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return slots[task]

    def gram(self, tasks: Sequence[Hashable], group: Any, shards: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """``<S_a, S_b>`` [K, K] float64 on the CPU over all parameters, the sums added over the ranks of ``group``.

        ``shards``: {parameter: the groups over which it is sharded}.
        """
        mine = {
            name: (tuple(total.shape), total.dtype, total.device.type)
            for name, slots in self._sums.items()
            for total in slots.values()
        }
        known: dict[str, Any] = {}
        for found in distributed.gather(mine, group):
            known.update(found)
        result = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
        for name in sorted(known):
            shape, dtype, device = known[name]
            slots = self._sums.get(name, {})
            # One task at a time: the sums are as large as the weight, and so is what a rank without the task sends.
            sums = [slots[task] if task in slots else torch.zeros(shape, dtype=dtype, device=device) for task in tasks]
            if group is not None:
                distributed.sum_over(sums, group)
            part = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=sums[0].device)
            for i, a in enumerate(sums):
                for j in range(i + 1):
                    part[i, j] = part[j, i] = (a.reshape(-1).double() * sums[j].reshape(-1).double()).sum()
            for others in shards.get(name, ()):
                distributed.sum_over([part], others)
            result += part.cpu()
        return result

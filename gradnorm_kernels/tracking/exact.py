"""``accumulate="exact"``: the tasks' gradient sums themselves, kept over micro-batches and added over ranks.

Memory is one float32 copy of the measured parameters for every task. The samples' own squares still come from the
operator, micro-batch by micro-batch; only ``||sum over all samples||^2`` needs the sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.torch.numerics import exact_matmuls
from ..segments import to_device
from . import distributed
from .uses import Use


class TaskSums:
    """``S_k = sum over the step's samples of task k of G_p`` for every measured parameter, by the parameter's name."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Hashable, Tensor]] = {}
        self._groups: dict[str, tuple[Any, ...]] = {}

    def add_weight(self, name: str, use: Use, row_task: Sequence[Hashable], groups: tuple[Any, ...]) -> None:
        """Add one use of a weight: ``sum over the task's rows of scale dy^T x``. ``row_task``: the task of each row."""
        self._groups[name] = groups
        for task in dict.fromkeys(row_task):
            rows = torch.tensor([i for i, other in enumerate(row_task) if other == task], device="cpu")
            at = to_device(rows, use.dy.device)
            wide = torch.promote_types(use.dy.dtype, torch.float32)
            factor = to_device(use.scale[rows].to(wide), use.dy.device)
            dy = use.dy[at].reshape(len(rows), -1, use.dy.shape[-1]).to(wide) * factor[:, None, None]
            dy = dy.flatten(0, 1)
            if use.layer.kind == "embedding":
                module = use.layer.module
                assert isinstance(module, nn.Embedding)
                ids = use.x[at].reshape(-1)
                if module.padding_idx is not None:
                    dy = torch.where((ids != module.padding_idx)[:, None], dy, 0.0)
                shape = (module.num_embeddings, dy.shape[1])
                # Unlike index_add_, this sorts the ids on a GPU: the same bits every run.
                self._slot(name, task, dy, shape).index_put_((ids,), dy, accumulate=True)
                continue
            x = use.x[at].reshape(-1, use.x.shape[-1]).to(wide)
            with exact_matmuls(dy.device):
                self._slot(name, task, dy, (dy.shape[1], x.shape[1])).addmm_(dy.T, x)

    def add_vectors(self, name: str, grads: Tensor, sample_task: Sequence[Hashable], groups: tuple[Any, ...]) -> None:
        """Add a small parameter's gradients of N samples, [N, d]. ``sample_task``: the task of each sample."""
        self._groups[name] = groups
        for task in dict.fromkeys(sample_task):
            rows = torch.tensor([i for i, other in enumerate(sample_task) if other == task], device="cpu")
            total = grads[to_device(rows, grads.device)].sum(0)
            self._slot(name, task, total, tuple(total.shape)).add_(total)

    def _slot(self, name: str, task: Hashable, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        slots = self._sums.setdefault(name, {})
        if task not in slots:
            slots[task] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return slots[task]

    def gram(self, tasks: Sequence[Hashable], group: Any) -> Tensor:
        """``<S_a, S_b>`` [K, K] float64 on the CPU over all parameters, the sums added over the ranks of ``group``."""
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
            for shards in self._groups.get(name, ()):
                distributed.sum_over([part], shards)
            result += part.cpu()
        return result

"""What one micro-batch adds up while its backward runs, and the refusals that keep it exact."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..estimation.moments import PairSums
from . import distributed
from .exact import TaskSums
from .layers import Layer, Parameters
from .owners import by_owner
from .rows import Rows
from .uses import Use, bias_rows, make_use, vector_rows, weight_sums


class Recorder:
    """Collects one micro-batch. A weight used once is turned into its Gram at once and its tensors are let go; a
    weight that is tied or called more than once is kept until the end, because its uses must be summed before they are
    squared.
    """

    def __init__(self, rows: Rows, parameters: Parameters, exact: TaskSums | None = None) -> None:
        """``exact``: where the tasks' sums are kept over micro-batches, if they are wanted."""
        self.rows = rows
        self.leading: int | None = (
            None  # rows of the tracked call seen last: a broadcast [1, L] input belongs to as many
        )
        self.replaying = False  # a norm's forward is being run again by ourselves: its hooks look away
        self._parameters = parameters
        self._exact = exact
        self._calls: dict[str, int] = {}
        self._done: set[str] = set()
        self._kept: dict[str, list[Use]] = {}
        self._vectors: dict[str, Tensor] = {}
        # Grams by device and by the groups over which their matrices are sharded.
        self._sums: dict[tuple[torch.device, tuple[Any, ...]], tuple[Tensor, Tensor]] = {}
        self._groups: dict[str, tuple[Any, ...]] = {}
        self.reached: set[str] = set()

    def called(self, layer: Layer) -> None:
        """Count a forward call outside backward (a recomputation by checkpointing runs inside it)."""
        self._calls[layer.name] = self._calls.get(layer.name, 0) + 1

    def never_called(self, layers: Iterable[Layer]) -> list[str]:
        """Names of the layers whose forward never ran here."""
        return [layer.name for layer in layers if layer.name not in self._calls]

    def take(self, layer: Layer, x: Tensor, dy: Tensor, *, weight_grad: bool = False) -> Tensor | None:
        """Record one use. Returns dW when asked to (the fused backward), else None.

        Raises:
            RuntimeError: the weight was already squared in this micro-batch: a second backward, or a second forward
                after it.
            ValueError: the tokens of a sample, or the rows of an embedding, are spread over ranks.
        """
        self.reached.add(layer.name)
        distributed.rows_are_whole(layer.name, x, dy)
        use = make_use(layer, distributed.local(x.detach()), distributed.local(dy.detach()), self.rows)
        if layer.kind == "vector":
            self.replaying = True
            try:
                grads_of = vector_rows(use)
            finally:
                self.replaying = False
            for leaf, grads in grads_of.items():
                self._add_vector(layer, leaf, use, grads)
            return None
        bias = getattr(layer.module, "bias", None)
        if isinstance(bias, Tensor) and bias.requires_grad:
            self._add_vector(layer, "bias", use, bias_rows(use))
        weight = layer.module.get_parameter("weight")
        if not (weight.requires_grad or layer.frozen):
            return None
        name, groups = self._parameters.name(layer, "weight"), distributed.shard_groups(weight)
        if groups and layer.kind == "embedding":
            raise ValueError(
                f"layer {layer.name!r} is an embedding whose rows are sharded over ranks, which is not supported; "
                "leave it out of layers="
            )
        if name in self._done:
            raise RuntimeError(
                f"{name!r} got a second gradient in one micro-batch after its first was measured: "
                f"run one forward and one "
                "backward inside each tracker.microbatch(...)"
            )
        self._groups[name] = groups
        if self._exact is not None:
            tasks = [self.rows.tasks[sample] for sample in use.row_sample.tolist()]
            self._exact.add_weight(name, use, tasks, groups)
        if layer.kind == "embedding" or self._parameters.tied(name) or self._calls.get(layer.name, 0) > 1:
            self._kept.setdefault(name, []).append(use)
            return _plain_weight_grad(use) if weight_grad else None
        self._done.add(name)
        sums = weight_sums([use], self.rows, weight_grad=weight_grad)
        self._add(sums.gram, sums.self_sq, groups)
        return sums.weight_grad

    def _add(self, gram: Tensor, self_sq: Tensor, groups: tuple[Any, ...]) -> None:
        key = (gram.device, groups)
        total = self._sums.get(key)
        self._sums[key] = (gram, self_sq) if total is None else (total[0] + gram, total[1] + self_sq)

    def _add_vector(self, layer: Layer, leaf: str, use: Use, grads: Tensor) -> None:
        """Sum rows' gradients of a small parameter into its samples'; it is squared at the end, so reuse is right."""
        name = self._parameters.name(layer, leaf)
        self._groups[name] = distributed.shard_groups(layer.module.get_parameter(leaf))
        flat = grads.reshape(grads.shape[0], -1)
        sums = by_owner(flat, use.row_sample, self.rows.num_samples)
        total = self._vectors.get(name)
        self._vectors[name] = sums if total is None else total + sums

    def finish(self, task_index: Callable[[Hashable], int]) -> PairSums:
        """Square what was kept, add everything up, and hand over the micro-batch's numbers (on the CPU)."""
        rows = self.rows
        for name, uses in self._kept.items():
            kinds = {use.layer.kind for use in uses}
            if "conv1d" in kinds and kinds != {"conv1d"}:
                raise RuntimeError(
                    f"layers {sorted({use.layer.name for use in uses})} share one weight in two orientations, which "
                    f"is not supported"
                )
            self._add(*weight_sums(uses, rows)[:2], self._groups[name])
        for name, vector in self._vectors.items():
            if self._exact is not None:
                self._exact.add_vectors(name, vector, rows.tasks, self._groups[name])
            sums = by_owner(vector, rows.sample_block, rows.num_blocks)
            own = by_owner(vector.square().sum(1), rows.sample_block, rows.num_blocks)
            self._add(sums @ sums.T, own, self._groups[name])
        gram = torch.zeros(rows.num_blocks, rows.num_blocks, dtype=torch.float64, device="cpu")
        self_sq = torch.zeros(rows.num_blocks, dtype=torch.float64, device="cpu")
        for (_, groups), (part, own) in self._sums.items():
            for group in groups:
                distributed.sum_over([part, own], group)
            gram += part.cpu()
            self_sq += own.cpu()
        weight = torch.zeros(rows.num_blocks, dtype=torch.float64, device="cpu").index_add_(
            0, rows.sample_block, rows.weight
        )
        weight_sq = torch.zeros(rows.num_blocks, dtype=torch.float64, device="cpu").index_add_(
            0, rows.sample_block, rows.weight**2
        )
        block_task = torch.tensor([task_index(task) for task in rows.block_tasks], device="cpu")
        return PairSums(gram, self_sq, weight, weight_sq, block_task, rows.block_keys)


def _plain_weight_grad(use: Use) -> Tensor:
    """dW of one use, as autograd would have it, for a weight whose norms wait for its other uses."""
    x = use.x.reshape(-1, use.x.shape[-1]).to(use.dy.dtype)
    return use.dy.reshape(-1, use.dy.shape[-1]).T @ x

"""What one micro-batch adds up while its backward runs, and the refusals that keep it exact."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..estimator import PairSums
from .layers import Layer
from .rows import Rows
from .uses import Use, bias_rows, make_use, vector_rows, weight_sums


class Recorder:
    """Collects one micro-batch. A weight used once is turned into its Gram at once and its tensors are let go; a
    weight that is tied or called more than once is kept until the end, because its uses must be summed before they are
    squared.
    """

    def __init__(self, rows: Rows, uses_of: dict[int, int], name_of: Callable[[Tensor], str]) -> None:
        self.rows = rows
        self.leading: int | None = (
            None  # rows of the tracked call seen last: a broadcast [1, L] input belongs to as many
        )
        self.replaying = False  # a norm's forward is being run again by ourselves: its hooks look away
        self._uses_of = uses_of
        self._name_of = name_of
        self._calls: dict[str, int] = {}
        self._done: set[int] = set()
        self._kept: dict[int, list[Use]] = {}
        self._vectors: dict[int, Tensor] = {}
        self._sums: dict[torch.device, tuple[Tensor, Tensor]] = {}
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
        """
        self.reached.add(layer.name)
        use = make_use(layer, x.detach(), dy.detach(), self.rows)
        if layer.kind == "vector":
            self.replaying = True
            try:
                grads_of = vector_rows(use)
            finally:
                self.replaying = False
            for name, grads in grads_of.items():
                self._add_vector(layer.module.get_parameter(name), use, grads)
            return None
        bias = getattr(layer.module, "bias", None)
        if isinstance(bias, Tensor) and bias.requires_grad:
            self._add_vector(bias, use, bias_rows(use))
        weight = layer.module.get_parameter("weight")
        if not weight.requires_grad:
            return None
        if id(weight) in self._done:
            raise RuntimeError(
                f"{self._name_of(weight)!r} got a second gradient in one micro-batch after its first was measured: "
                f"run one forward and one "
                "backward inside each tracker.microbatch(...)"
            )
        if layer.kind == "embedding" or self._uses_of.get(id(weight), 1) > 1 or self._calls.get(layer.name, 0) > 1:
            self._kept.setdefault(id(weight), []).append(use)
            return _plain_weight_grad(use) if weight_grad else None
        self._done.add(id(weight))
        sums = weight_sums([use], self.rows, weight_grad=weight_grad)
        self._add(sums.gram, sums.self_sq)
        return sums.weight_grad

    def _add(self, gram: Tensor, self_sq: Tensor) -> None:
        total = self._sums.get(gram.device)
        self._sums[gram.device] = (gram, self_sq) if total is None else (total[0] + gram, total[1] + self_sq)

    def _add_vector(self, parameter: Tensor, use: Use, grads: Tensor) -> None:
        """Sum rows' gradients of a small parameter into its samples'; it is squared at the end, so reuse is right."""
        flat = grads.reshape(grads.shape[0], -1)
        total = self._vectors.get(id(parameter))
        if total is None:
            total = torch.zeros(self.rows.num_samples, flat.shape[1], dtype=torch.float64, device=flat.device)
            self._vectors[id(parameter)] = total
        total.index_add_(0, use.row_sample.to(flat.device), flat)

    def finish(self, task_index: Callable[[Hashable], int]) -> PairSums:
        """Square what was kept, add everything up, and hand over the micro-batch's numbers (on the CPU)."""
        rows = self.rows
        for uses in self._kept.values():
            kinds = {use.layer.kind for use in uses}
            if "conv1d" in kinds and kinds != {"conv1d"}:
                raise RuntimeError(
                    f"layers {sorted({use.layer.name for use in uses})} share one weight in two orientations, which "
                    f"is not supported"
                )
            self._add(*weight_sums(uses, rows)[:2])
        for vector in self._vectors.values():
            block = rows.sample_block.to(vector.device)
            sums = torch.zeros(rows.num_blocks, vector.shape[1], dtype=torch.float64, device=vector.device).index_add_(
                0, block, vector
            )
            own = torch.zeros(rows.num_blocks, dtype=torch.float64, device=vector.device).index_add_(
                0, block, vector.square().sum(1)
            )
            self._add(sums @ sums.T, own)
        gram = torch.zeros(rows.num_blocks, rows.num_blocks, dtype=torch.float64)
        self_sq = torch.zeros(rows.num_blocks, dtype=torch.float64)
        for part, own in self._sums.values():
            gram += part.cpu()
            self_sq += own.cpu()
        weight = torch.zeros(rows.num_blocks, dtype=torch.float64).index_add_(0, rows.sample_block, rows.weight)
        weight_sq = torch.zeros(rows.num_blocks, dtype=torch.float64).index_add_(0, rows.sample_block, rows.weight**2)
        block_task = torch.tensor([task_index(task) for task in rows.block_tasks])
        return PairSums(gram, self_sq, weight, weight_sq, block_task, rows.block_keys)


def _plain_weight_grad(use: Use) -> Tensor:
    """dW of one use, as autograd would have it, for a weight whose norms wait for its other uses."""
    x = use.x.reshape(-1, use.x.shape[-1]).to(use.dy.dtype)
    return use.dy.reshape(-1, use.dy.shape[-1]).T @ x

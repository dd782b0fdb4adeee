"""What one micro-batch adds up while its backward runs, and the refusals that keep it exact."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..estimation.moments import PairSums
from ..segments import to_device
from . import distributed
from .calls import Call
from .exact import TaskSums
from .experts import Product, expert_tokens
from .layers import Layer, Parameters
from .parameter_gram import (
    BlockSums,
    Tokens,
    bias_rows,
    padding_weight_grad,
    plain_weight_grad,
    tokens_of,
    vector_rows,
    weight_sums,
)
from .quiet import quiet
from .reconcile import Reconciliation
from .rows import Rows, sum_by
from .sketch import MicrobatchSketches
from .skipped import Skipped

_SECOND = (
    "{} got a second gradient in one micro-batch after its first was measured: run one forward and one backward inside "
    "each tracker.microbatch(...)"
)


def _versions(tokens: Tokens) -> tuple[int, int]:
    return tokens.x._version, tokens.dy._version


class Recorder:
    """Collects one micro-batch. A weight used once is turned into its Gram at once and its tensors are released. A
    weight that is tied or called more than once is kept until the end, because its uses are summed before they are
    squared.
    """

    def __init__(
        self,
        rows: Rows,
        parameters: Parameters,
        skipped: Skipped,
        exact: TaskSums | None = None,
        reconciliation: Reconciliation | None = None,
        sketches: MicrobatchSketches | None = None,
        *,
        pairs: bool = True,
    ) -> None:
        """``exact``: where the tasks' sums are kept over micro-batches. ``reconciliation``: compares totals with
        autograd's; then sums are kept per parameter, so that one that fails can be left out. ``sketches``: where the
        micro-batch's sketches are kept. ``pairs``: whether its pairs are summed.
        """
        self.rows = rows
        self.calls: dict[str, int] = {}
        self.reached: set[str] = set()
        self._handed_out: dict[str, bool] = {}  # layer -> whether torch.autograd.grad returned its gradients
        self.differentiated: set[str] = set()  # layers that a pass with create_graph=True went through
        self._parameters = parameters
        self._skipped = skipped
        self._exact = exact
        self._sketches = sketches
        self._pairs = pairs
        self._reconciliation = reconciliation
        self._done: set[str] = set()
        self._kept: dict[str, list[Tokens]] = {}
        self._heads: dict[str, BlockSums] = {}  # weight -> the sums of a head that is tied to embeddings, by itself
        self._versions: dict[str, list[tuple[int, int]]] = {}  # of the tensors in them, which autograd shares
        self._kinds: dict[str, dict[str, str]] = {}  # weight -> {layer: kind}
        self._vectors: dict[str, Tensor] = {}
        # (parameter, or "" while nothing is reconciled; device; groups over which matrices are sharded) -> sums
        self._sums: dict[tuple[str, torch.device, tuple[Any, ...]], tuple[Tensor, Tensor]] = {}
        self.sample_sq: dict[Hashable, float] = {}  # ||G_p||^2 of every sample, once finished; empty without pairs
        self.groups: dict[str, tuple[Any, ...]] = {}  # over which each parameter is sharded while its layer computes

    def called(self, layer: Layer) -> None:
        """Count a forward call outside backward (a recomputation by checkpointing runs inside it)."""
        self.calls[layer.name] = self.calls.get(layer.name, 0) + 1

    def never_called(self, layers: Iterable[Layer]) -> list[Layer]:
        """The layers whose forward never ran here."""
        return [layer for layer in layers if layer.name not in self.calls]

    def take(self, call: Call, dy: Tensor, *, weight_grad: bool = False) -> Tensor | None:
        """Record one use. ``dy``: the gradient of the call's output. Returns dW when asked to (the fused backward).

        Raises:
            RuntimeError: the weight was already squared in this micro-batch: a second backward, or a second forward
                after it.
            ValueError: the tokens of a sample, or the rows of an embedding, are spread over ranks.
        """
        layer = call.layer
        self.reached.add(layer.name)
        if self._handed_out.setdefault(layer.name, call.handed_out) != call.handed_out:
            raise RuntimeError(_SECOND.format(repr(layer.name)))
        distributed.rows_are_whole(layer.name, call.x, dy)
        dy = distributed.local(dy.detach())
        call.x = distributed.local(call.x.detach())
        if layer.kind == "router":  # its logits may be [T, E] where its input is [B, L, d]
            dy = dy.reshape(*call.x.shape[:-1], dy.shape[-1])
        if layer.kind == "vector":
            self._take_vector(call, dy)
            return None
        bias = layer.module._parameters.get("bias")
        if bias is not None and call.gets("bias"):
            self._add_vector(call, "bias", bias_rows(call, dy), dy)
        weight = layer.module._parameters.get("weight")
        if weight is None or not (call.gets("weight") or layer.frozen):
            return None
        name, groups = self._parameters.name(layer, "weight"), call.groups["weight"]
        if name in self._skipped:
            return plain_weight_grad(call, dy) if weight_grad else None
        if groups and layer.kind == "embedding":
            raise ValueError(
                f"layer {layer.name!r} is an embedding whose rows are sharded over ranks, which is not supported; "
                "leave it out of layers="
            )
        if name in self._done:
            raise RuntimeError(_SECOND.format(repr(name)))
        self.groups[name] = groups
        tokens = tokens_of(call, dy)
        self._note(name, tokens, call, weight.shape[0], transposed=layer.kind == "conv1d")
        self._kinds.setdefault(name, {})[layer.name] = layer.kind
        if not self._pairs:
            return plain_weight_grad(call, dy) if weight_grad else None
        if layer.kind == "embedding" or self._used_again(name, layer):
            self._keep(name, tokens)
            if not weight_grad:
                return None
            if self.calls.get(layer.name) != 1 or not self._parameters.tied_to_embeddings(name):
                return plain_weight_grad(call, dy)
            # The head's own sums come with its dW; what it has in common with the embeddings is added at the end.
            sums = weight_sums([tokens], self.rows, weight_grad=True)
            self._heads[name] = sums._replace(weight_grad=None)
        else:
            self._done.add(name)
            sums = weight_sums([tokens], self.rows, weight_grad=weight_grad)
            self._add(name, sums.gram, sums.sample_sq)
        outside = padding_weight_grad(call, dy) if weight_grad else None
        return sums.weight_grad if outside is None or sums.weight_grad is None else sums.weight_grad + outside

    def take_experts(self, call: Call, product: Product, dy: Tensor, *, overlapping: Container[str]) -> None:
        """Record one product of routed tokens with matrices of experts, and the bias that was added to it.

        ``overlapping``: parameters of which an expert's matrix is in several products of the call.

        Raises:
            RuntimeError: as :meth:`take`.
        """
        layer = call.layer
        self.reached.add(layer.name)
        for leaf in (product.leaf, product.bias):
            if leaf is None or not call.gets(leaf):
                continue
            name = self._parameters.name(layer, leaf)
            if name in self._skipped:
                continue
            tokens = expert_tokens(call, product, dy.detach(), leaf)
            assert tokens.expert is not None
            done = {f"{name}[{expert}]" for expert in tokens.expert.tolist()}
            if name in self._done or done & self._done:
                raise RuntimeError(_SECOND.format(repr(name)))
            self.groups[name] = ()
            count = layer.module.get_parameter(leaf).shape[0]
            # A bias is a matrix [1, d_out] per expert, whose input is 1.
            self._note(name, tokens, call, count, transposed=product.transposed or leaf == product.bias)
            if not self._pairs:
                continue
            if leaf in overlapping or self._used_again(name, layer):
                self._keep(name, tokens)
                continue
            self._done |= done
            self._add(name, *weight_sums([tokens], self.rows)[:2])

    def _used_again(self, name: str, layer: Layer) -> bool:
        """Whether a weight's uses are to be summed before they are squared."""
        return self._parameters.tied(name) or self.calls.get(layer.name, 0) > 1

    def _keep(self, name: str, tokens: Tokens) -> None:
        """Keep a use until the end of the micro-batch: its tensors, which must not change, and not copies of them."""
        self._kept.setdefault(name, []).append(tokens)
        self._versions.setdefault(name, []).append(_versions(tokens))

    def _note(self, name: str, tokens: Tokens, call: Call, rows: int, *, transposed: bool) -> None:
        """What is kept of a use besides its pairs. ``rows``: the first size of the parameter."""
        if self._reconciliation is not None:
            self._reconciliation.add_weight(name, tokens, call.factor, transposed=transposed)
        if self._exact is not None:
            tasks = [self.rows.tasks[sample] for sample in tokens.row_sample.tolist()]
            self._exact.add_weight(name, tokens, tasks, rows)
        if self._sketches is not None:
            self._sketches.add_weight(name, tokens, self.groups[name], rows)

    def _take_vector(self, call: Call, dy: Tensor) -> None:
        with quiet():  # the module's forward runs again: no hook of a tracker may count it
            rows = vector_rows(call, dy)
        for leaf, grads in rows.items():
            self._add_vector(call, leaf, grads, dy)

    def _add_vector(self, call: Call, leaf: str, grads: Tensor, dy: Tensor) -> None:
        """Sum rows' gradients of a small parameter into its samples'. It is squared at the end, so reuse is right."""
        name = self._parameters.name(call.layer, leaf)
        if name in self._skipped:
            return
        self.groups[name] = call.groups[leaf]
        if self._reconciliation is not None:
            self._reconciliation.add_vector(name, call.factor * grads.sum(0), dy)
        factor = to_device(call.scale * call.factor, grads.device)
        flat = grads.reshape(grads.shape[0], -1) * factor[:, None]
        sums = sum_by(flat, call.row_sample, self.rows.num_samples)
        total = self._vectors.get(name)
        self._vectors[name] = sums if total is None else total + sums

    def _add(self, name: str, gram: Tensor, sample_sq: Tensor) -> None:
        groups = self.groups[name]
        key = ("" if self._reconciliation is None else name, gram.device, groups)
        total = self._sums.get(key)
        self._sums[key] = (gram, sample_sq) if total is None else (total[0] + gram, total[1] + sample_sq)

    def finish(self, task_index: Mapping[Hashable, int]) -> PairSums | None:
        """Square what was kept, add everything up, and return the micro-batch's sums (on the CPU), if pairs count.

        ``task_index``: the number of every task of the micro-batch. Skipped parameters are left out.
        """
        rows = self.rows
        if self._exact is not None:
            self._exact.discard(self._skipped.reasons)
        for name, kinds in self._kinds.items():
            if name not in self._skipped and "conv1d" in kinds.values() and set(kinds.values()) != {"conv1d"}:
                raise RuntimeError(
                    f"layers {sorted(kinds)} share one weight in two orientations, which is not supported"
                )
        for name, uses in self._kept.items():
            if name in self._skipped:
                continue
            if [_versions(tokens) for tokens in uses] != self._versions[name]:
                raise RuntimeError(
                    f"the input or the output's gradient of a call with {name!r} was modified in place before the "
                    "micro-batch ended, so that the parameter's gradient can no longer be measured: make that "
                    "operation (a hook that changes a gradient, a buffer that is filled again) out of place"
                )
            once = sum(not tokens.embedding for tokens in uses) == 1
            self._add(name, *weight_sums(uses, rows, head=self._heads.get(name) if once else None)[:2])
        for name, vector in self._vectors.items():
            if name in self._skipped:
                continue
            if self._exact is not None:
                self._exact.add_vectors(name, vector, rows.tasks)
            if self._sketches is not None:
                self._sketches.add_vector(name, vector)
            if not self._pairs:
                continue
            sums = sum_by(vector, rows.sample_block, rows.num_blocks)
            self._add(name, sums @ sums.T, vector.square().sum(1))
        if not self._pairs:
            return None
        gram = torch.zeros(rows.num_blocks, rows.num_blocks, dtype=torch.float64, device="cpu")
        sample_sq = torch.zeros(rows.num_samples, dtype=torch.float64, device="cpu")
        for (name, _, groups), (part, own) in self._sums.items():
            if name in self._skipped:
                continue
            for group in groups:
                distributed.sum_over([part, own], group)
            gram += part.cpu()
            sample_sq += own.cpu()
        self.sample_sq = dict(zip(rows.samples, sample_sq.tolist(), strict=True))
        self_sq = sum_by(sample_sq, rows.sample_block, rows.num_blocks)
        if not rows.inner_products:
            # Zeros off the diagonal would read as orthogonal tasks.
            gram = torch.where(torch.eye(rows.num_blocks, dtype=torch.bool, device="cpu"), gram, float("nan"))
        weight, weight_sq = (sum_by(w, rows.sample_block, rows.num_blocks) for w in (rows.weight, rows.weight**2))
        block_task = torch.tensor([task_index[task] for task in rows.block_tasks], device="cpu")
        return PairSums(gram, self_sq, weight, weight_sq, block_task, rows.block_keys)

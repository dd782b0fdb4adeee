"""The operators and the public functions: schemas, kernels, fakes.

Each op is a ``torch.library`` operator in the namespace ``gradnorm_kernels``, made with ``torch.library.Library``
(``custom_op`` costs microseconds more per call). The kernel turns its arguments into a checked
:class:`~gradnorm_kernels.batch.GradBatch`, asks dispatch for a plan and calls the backend; the fake runs the same check
and returns the shapes. The ops measure and are not differentiable: the kernels
detach their inputs, and what they return carries no graph.

Under ``torch.compile`` shapes must not depend on data: where ``sample_ids`` come without ``group_ids`` pass
``num_samples``, where ``group_ids`` are given pass ``num_groups``. Without them the call still compiles, but with a
graph break, or with sizes known only at run time under ``torch._dynamo.config.capture_dynamic_output_shape_ops``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, dispatch
from .batch import GradBatch

_LIBRARY = torch.library.Library("gradnorm_kernels", "DEF")
_LIBRARY.define(
    "fused_grad_norm(Tensor x, Tensor dy, Tensor? cu_seqlens, Tensor? sample_ids, Tensor? group_ids, "
    "SymInt? num_samples, SymInt? num_groups, bool weight_grad, bool group_gram, str algorithm, str backend) "
    "-> (Tensor sample_sq_norms, Tensor group_sq_norms, Tensor weight_grad, Tensor group_gram)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "grad_gram(Tensor x, Tensor dy, Tensor? cu_seqlens, Tensor? sample_ids, SymInt? num_samples, str algorithm, "
    "str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "grad_dot(Tensor x, Tensor dy, Tensor v, Tensor? cu_seqlens, Tensor? sample_ids, SymInt? num_samples, str backend) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "grad_sketch(Tensor x, Tensor dy, Tensor? c_in, Tensor? c_out, Tensor? cu_seqlens, Tensor? sample_ids, "
    "SymInt? num_samples, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "embedding_grad_norm(Tensor ids, Tensor dy, Tensor? cu_seqlens, Tensor? sample_ids, Tensor? group_ids, "
    "SymInt? num_samples, SymInt? num_groups, bool group_gram, str backend) "
    "-> (Tensor sample_sq_norms, Tensor group_sq_norms, Tensor group_gram)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "tied_grad_gram(Tensor x, Tensor dy, Tensor ids, Tensor e, Tensor? cu_seqlens, Tensor? e_cu_seqlens, "
    "Tensor? sample_ids, Tensor? e_sample_ids, Tensor? group_ids, SymInt? num_samples, SymInt? num_groups, "
    "str backend) -> (Tensor sample_dots, Tensor group_gram)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class FusedGradNorm(NamedTuple):
    """What :func:`fused_grad_norm` returns; no tensor carries an autograd graph.

    Attributes:
        sample_sq_norms: [N] float64, ``||G_i||^2`` in the squared unit of the gradient.
        group_sq_norms: [K] float64, ``||sum over the group's samples of G_i||^2``, in the same unit.
        weight_grad: [d_out, d_in] in x's dtype, the sum of all G_i; None unless asked for.
        group_gram: [K, K] float64, the inner products of the groups' sums; None unless asked for.
        sketches: [N, r_out, r_in] float32 (float64 for float64), ``C_out^T G_i C_in``; None unless asked for.
    """

    sample_sq_norms: Tensor
    group_sq_norms: Tensor
    weight_grad: Tensor | None
    group_gram: Tensor | None
    sketches: Tensor | None = None


class EmbeddingGradNorm(NamedTuple):
    """What :func:`embedding_grad_norm` returns."""

    sample_sq_norms: Tensor
    group_sq_norms: Tensor
    group_gram: Tensor | None


class TiedGradGram(NamedTuple):
    """What :func:`tied_grad_gram` returns."""

    sample_dots: Tensor
    group_gram: Tensor


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weight_grad: bool = False,
    group_gram: bool = False,
    sketch: tuple[Tensor | None, Tensor | None] | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    num_samples: int | None = None,
    num_groups: int | None = None,
) -> FusedGradNorm:
    """Squared norms of the per-sample gradients of a linear layer and of their sums over groups.

    ``G_i = sum over the tokens t of sample i of dy_t x_t^T``;
    ``sample_sq_norms[i] = ||G_i||^2``, ``group_sq_norms[k] = ||sum over the samples i of group k of G_i||^2``.
    No ``G_i`` is ever stored.

    Args:
        x: the layer's inputs, [T, d_in] packed, or [B, L, d_in]: then each row of the batch is a segment.
            float32, bfloat16, float16 or float64, any strides.
        dy: the gradients of its outputs, [T, d_out] or [B, L, d_out], of x's dtype and device.
        cu_seqlens: [S+1] int32 or int64, ascending from 0 to T: where the segments of a packed batch begin and end.
            Empty segments are allowed. Default: one segment. Not for [B, L, d].
        sample_ids: [S] int, the sample of each segment. Default: each segment is a sample.
        group_ids: [N] int, the group of each sample. Default: one group.
        weight_grad: also return the sum of all G_i.
        group_gram: also return the inner products of the groups' sums.
        sketch: the projections (c_in [d_in, r_in], c_out [d_out, r_out]), None for a side that stays whole: also return
            every ``C_out^T G_i C_in``, as :func:`grad_sketch` does alone.
        algorithm: "wgrad" (norms from segmented wgrad), "gram" (norms from inner products of tokens; loses digits where
            a sample's tokens cancel; sums of groups come from segmented wgrad where that is cheaper) or "auto" (per
            sample, by its length).
        backend: "torch" (any device and dtype), "cpu" (C++, for CPU tensors), "triton" or "cuda" (for GPU tensors), or
            "auto": the one expected to be fastest of those that can serve the call. Only "torch" takes float64.
            :func:`gradnorm_kernels.dispatch.explain` says which one runs, and why the others do not.
        num_samples: N, where ``sample_ids`` do not determine it (the last samples may have no segment). Default: the
            length of ``group_ids``, or else the largest sample id plus one.
        num_groups: K. Default: the largest group id plus one.

    The integer tensors are on x's device or on the CPU. On a GPU, where reading them would wait for it, the triton and
    cuda backends do not raise for values out of range: the results are then NaN (in ``weight_grad``, the first row).

    Returns:
        ``sample_sq_norms`` [N] float64; ``group_sq_norms`` [K] float64; ``weight_grad`` [d_out, d_in] in x's dtype,
        accumulated in float32 (float64 for float64), or None; ``group_gram`` [K, K] float64 or None; ``sketches``
        [N, r_out, r_in] float32 (float64 for float64) or None. A sample or group without tokens has norm 0. A NaN or
        Inf stays within its own sample and group (and ``weight_grad``). No result carries an autograd graph.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is not as above.
        RuntimeError: an explicit ``backend`` cannot run here, cannot take such tensors or lacks the operator; the text
            says why.
    """
    checks.tensors(x=x, dy=dy, cu_seqlens=cu_seqlens, sample_ids=sample_ids, group_ids=group_ids)
    c_in, c_out = (None, None) if sketch is None else checks.sketch(sketch)
    sample_sq, group_sq, total, gram = torch.ops.gradnorm_kernels.fused_grad_norm(
        x,
        dy,
        cu_seqlens,
        sample_ids,
        group_ids,
        num_samples,
        num_groups,
        weight_grad,
        group_gram,
        algorithm,
        backend,
    )
    sketches = None
    if sketch is not None:
        if num_samples is None and sample_ids is not None and group_ids is not None:
            num_samples = group_ids.shape[0]
        sketches = torch.ops.gradnorm_kernels.grad_sketch(
            x, dy, c_in, c_out, cu_seqlens, sample_ids, num_samples, backend
        )
    return FusedGradNorm(sample_sq, group_sq, total if weight_grad else None, gram if group_gram else None, sketches)


def grad_gram(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    algorithm: str = "auto",
    backend: str = "auto",
    num_samples: int | None = None,
) -> Tensor:
    """Inner products of the per-sample gradients of a linear layer: ``<G_i, G_j>``, [N, N] float64, symmetric.

    Arguments and errors as in :func:`fused_grad_norm`; the result carries no autograd graph.
    """
    checks.tensors(x=x, dy=dy, cu_seqlens=cu_seqlens, sample_ids=sample_ids)
    gram: Tensor = torch.ops.gradnorm_kernels.grad_gram(x, dy, cu_seqlens, sample_ids, num_samples, algorithm, backend)
    return gram


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    backend: str = "auto",
    num_samples: int | None = None,
) -> Tensor:
    """Inner products of the per-sample gradients of a linear layer with a given matrix: ``<G_i, v>``, [N] float64.

    ``v`` [d_out, d_in] is of any of the floating dtypes, on x's device; products are taken in float32 (float64 if x is
    float64). Other arguments and errors as in :func:`fused_grad_norm`. There is one algorithm,
    ``sum over t of dy_t . (v x_t)``: one product of x with v. The result carries no autograd graph.
    """
    checks.tensors(x=x, dy=dy, v=v, cu_seqlens=cu_seqlens, sample_ids=sample_ids)
    dots: Tensor = torch.ops.gradnorm_kernels.grad_dot(x, dy, v, cu_seqlens, sample_ids, num_samples, backend)
    return dots


def grad_sketch(
    x: Tensor,
    dy: Tensor,
    c_in: Tensor | None,
    c_out: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    backend: str = "auto",
    num_samples: int | None = None,
) -> Tensor:
    """Two-sided projections of the per-sample gradients of a linear layer.

    ``S_i = C_out^T G_i C_in = sum over the tokens t of sample i of (C_out^T dy_t) (C_in^T x_t)^T``. No ``G_i`` is
    formed. With independent random C_in and C_out of ``E[C C^T] = I``, ``E<S_i, S_j> = <G_i, G_j>``
    (docs/mathematics.md).

    Args:
        x, dy, cu_seqlens, sample_ids, backend, num_samples: as in :func:`fused_grad_norm`. "torch", "cpu" (which runs
            the torch backend's code) and "triton" have this operator.
        c_in: the projection of the inputs [d_in, r_in], of any floating dtype, on x's device. None: that side is not
            projected, and r_in is d_in.
        c_out: the projection of the output gradients [d_out, r_out]; None as for ``c_in``.

    A projection of x's dtype is multiplied as it is; one of another dtype is taken in float32, and x or dy with it
    (float64 if x is float64). Products accumulate in float32.

    Returns:
        [N, r_out, r_in] float32 (float64 for float64), zeros for a sample without tokens. A NaN or Inf stays in its
        own sample. The result carries no autograd graph.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_grad_norm`.
    """
    checks.tensors(x=x, dy=dy, c_in=c_in, c_out=c_out, cu_seqlens=cu_seqlens, sample_ids=sample_ids)
    sketches: Tensor = torch.ops.gradnorm_kernels.grad_sketch(
        x, dy, c_in, c_out, cu_seqlens, sample_ids, num_samples, backend
    )
    return sketches


def embedding_grad_norm(
    ids: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    group_gram: bool = False,
    backend: str = "auto",
    num_samples: int | None = None,
    num_groups: int | None = None,
) -> EmbeddingGradNorm:
    """Squared norms of the per-sample gradients of an embedding matrix and of their sums over groups.

    ``G_i = sum over the tokens t of sample i of one_hot(id_t) dy_t^T``; results as in :func:`fused_grad_norm`. No
    ``G_i`` is ever stored.

    Args:
        ids: the token ids, [T] packed or [B, L], int32 or int64. A token whose id is below 0 (padding) is left out,
            whatever its dy holds. The number of rows of the matrix is not needed.
        dy: the gradients of the embedding's outputs, [T, d] or [B, L, d], on the device of ``ids``.
        cu_seqlens, sample_ids, group_ids, group_gram, backend, num_samples, num_groups: as in
            :func:`fused_grad_norm`. "torch" and "triton" have this operator.

    Returns:
        ``sample_sq_norms`` [N], ``group_sq_norms`` [K], ``group_gram`` [K, K] or None: float64, without an autograd
        graph.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_grad_norm`.
    """
    checks.tensors(ids=ids, dy=dy, cu_seqlens=cu_seqlens, sample_ids=sample_ids, group_ids=group_ids)
    sample_sq, group_sq, gram = torch.ops.gradnorm_kernels.embedding_grad_norm(
        ids, dy, cu_seqlens, sample_ids, group_ids, num_samples, num_groups, group_gram, backend
    )
    return EmbeddingGradNorm(sample_sq, group_sq, gram if group_gram else None)


def tied_grad_gram(
    x: Tensor,
    dy: Tensor,
    ids: Tensor,
    e: Tensor,
    cu_seqlens: Tensor | None = None,
    e_cu_seqlens: Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    e_sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    backend: str = "auto",
    num_samples: int | None = None,
    num_groups: int | None = None,
) -> TiedGradGram:
    """Inner products of the two gradients of one matrix that is both a linear layer's weight and an embedding.

    ``H_i = sum over the head's tokens t of sample i of dy_t x_t^T``,
    ``G_i = sum over the embedding's tokens s of sample i of one_hot(id_s) e_s^T``;
    ``sample_dots[i] = <H_i, G_i>``, ``group_gram[a, b] = <sum of H_i over group a, sum of G_i over group b>``.
    The squared norm of the whole gradient is then ``||H_i||^2 + ||G_i||^2 + 2 <H_i, G_i>``.

    Args:
        x, dy: the head's inputs [T, d] or [B, L, d] and the gradients of its outputs [T, V] or [B, L, V], which may be
            of another floating dtype.
        ids, e: the embedding's token ids [T'] or [B', L'] below V, and the gradients of its outputs, [T', d] or
            [B', L', d], of x's dtype. A token whose id is below 0 is left out.
        cu_seqlens, sample_ids: the segments of the head's tokens and their samples, as in :func:`fused_grad_norm`.
        e_cu_seqlens, e_sample_ids: the same for the embedding's tokens. Both sides have the same N samples.
        group_ids, backend, num_samples, num_groups: as in :func:`fused_grad_norm`. "torch" and "triton" have this
            operator.

    Returns:
        ``sample_dots`` [N], ``group_gram`` [K, K], not symmetric: float64, without an autograd graph.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_grad_norm`. On a GPU the triton backend does not raise for
        ids of V or more: the results are then NaN.
    """
    checks.tensors(
        x=x,
        dy=dy,
        ids=ids,
        e=e,
        cu_seqlens=cu_seqlens,
        e_cu_seqlens=e_cu_seqlens,
        sample_ids=sample_ids,
        e_sample_ids=e_sample_ids,
        group_ids=group_ids,
    )
    dots, gram = torch.ops.gradnorm_kernels.tied_grad_gram(
        x,
        dy,
        ids,
        e,
        cu_seqlens,
        e_cu_seqlens,
        sample_ids,
        e_sample_ids,
        group_ids,
        num_samples,
        num_groups,
        backend,
    )
    return TiedGradGram(dots, gram)


# The kernels and fakes take the operators' arguments in the order of the schemas above; the checks name them.


def _fused_grad_norm(x: Tensor, dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = checks.fused_grad_norm(x.detach(), dy.detach(), *arguments, backends=backends.NAMES)
    sample_sq, group_sq, total, gram = _run(batch)
    # A schema has no optional results: what was not asked for is an empty tensor.
    return (
        sample_sq,
        group_sq,
        x.new_empty(0) if total is None else total,
        x.new_empty(0, dtype=torch.float64) if gram is None else gram,
    )


def _fused_grad_norm_fake(x: Tensor, dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = checks.fused_grad_norm(x, dy, *arguments, backends=backends.NAMES)
    samples, groups = _known(batch.samples), _known(batch.groups)
    return (
        x.new_empty(samples, dtype=torch.float64),
        x.new_empty(groups, dtype=torch.float64),
        x.new_empty((batch.d_out, batch.d_in) if batch.weight_grad else (0,)),
        x.new_empty((groups, groups) if batch.group_gram else (0,), dtype=torch.float64),
    )


def _grad_gram(x: Tensor, dy: Tensor, *arguments: Any) -> Tensor:
    gram: Tensor = _run(checks.grad_gram(x.detach(), dy.detach(), *arguments, backends=backends.NAMES))
    return gram


def _grad_gram_fake(x: Tensor, dy: Tensor, *arguments: Any) -> Tensor:
    samples = _known(checks.grad_gram(x, dy, *arguments, backends=backends.NAMES).samples)
    return x.new_empty(samples, samples, dtype=torch.float64)


def _grad_dot(x: Tensor, dy: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    batch = checks.grad_dot(x.detach(), dy.detach(), v, *arguments, backends=backends.NAMES)
    dots: Tensor = _run(batch, v.detach())
    return dots


def _grad_dot_fake(x: Tensor, dy: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    batch = checks.grad_dot(x, dy, v, *arguments, backends=backends.NAMES)
    return x.new_empty(_known(batch.samples), dtype=torch.float64)


def _grad_sketch(x: Tensor, dy: Tensor, c_in: Tensor | None, c_out: Tensor | None, *arguments: Any) -> Tensor:
    batch = checks.grad_sketch(x.detach(), dy.detach(), c_in, c_out, *arguments, backends=backends.NAMES)
    projections = (None if c is None else c.detach() for c in (c_in, c_out))
    sketches: Tensor = _run(batch, *projections)
    return sketches


def _grad_sketch_fake(x: Tensor, dy: Tensor, c_in: Tensor | None, c_out: Tensor | None, *arguments: Any) -> Tensor:
    batch = checks.grad_sketch(x, dy, c_in, c_out, *arguments, backends=backends.NAMES)
    shape = (batch.d_out if c_out is None else c_out.shape[1], batch.d_in if c_in is None else c_in.shape[1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((_known(batch.samples), *shape), dtype=dtype)


def _embedding_grad_norm(ids: Tensor, dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = checks.embedding_grad_norm(ids, dy.detach(), *arguments, backends=backends.NAMES)
    sample_sq, group_sq, gram = _run(batch)
    return sample_sq, group_sq, dy.new_empty(0, dtype=torch.float64) if gram is None else gram


def _embedding_grad_norm_fake(ids: Tensor, dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = checks.embedding_grad_norm(ids, dy, *arguments, backends=backends.NAMES)
    samples, groups = _known(batch.samples), _known(batch.groups)
    return (
        dy.new_empty(samples, dtype=torch.float64),
        dy.new_empty(groups, dtype=torch.float64),
        dy.new_empty((groups, groups) if batch.group_gram else (0,), dtype=torch.float64),
    )


def _tied_grad_gram(x: Tensor, dy: Tensor, ids: Tensor, e: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    detached = x.detach(), dy.detach(), ids, e.detach()
    head, embedding = checks.tied_grad_gram(*detached, *arguments, backends=backends.NAMES)
    found: tuple[Tensor, Tensor] = _run(head, embedding)
    return found


def _tied_grad_gram_fake(x: Tensor, dy: Tensor, ids: Tensor, e: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    head, _ = checks.tied_grad_gram(x, dy, ids, e, *arguments, backends=backends.NAMES)
    samples, groups = _known(head.samples), _known(head.groups)
    return x.new_empty(samples, dtype=torch.float64), x.new_empty(groups, groups, dtype=torch.float64)


def _run(batch: GradBatch, *others: Any) -> Any:
    """The result of the backend that dispatch chooses; ``others``: what its function takes between batch and plan."""
    plan = dispatch.plan(batch)
    return backends.operator(plan.backend, batch.op)(batch, *others, plan)


def _known(size: int | None) -> int | torch.SymInt:
    """A size for a fake's result: one that only the ids' values determine becomes a symbol of its own."""
    return torch.library.get_ctx().new_dynamic_size() if size is None else size


for _name, _kernel, _fake in (
    ("fused_grad_norm", _fused_grad_norm, _fused_grad_norm_fake),
    ("grad_gram", _grad_gram, _grad_gram_fake),
    ("grad_dot", _grad_dot, _grad_dot_fake),
    ("grad_sketch", _grad_sketch, _grad_sketch_fake),
    ("embedding_grad_norm", _embedding_grad_norm, _embedding_grad_norm_fake),
    ("tied_grad_gram", _tied_grad_gram, _tied_grad_gram_fake),
):
    # disable: after a graph break Dynamo would otherwise trace the kernel's Python. fallthrough: no graph, and no
    # warning that there is none.
    _LIBRARY.impl(_name, torch.compiler.disable(_kernel), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"gradnorm_kernels::{_name}", _fake, lib=_LIBRARY)

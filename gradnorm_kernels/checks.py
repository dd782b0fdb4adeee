"""What each operator accepts: one validation per operator, shared with its fake kernel.

There are two kinds of checks. Those on shapes, dtypes and devices (the functions named after the operators) read no
tensor data, so they run the same on real and on fake tensors; they return the call as a
:class:`~gradnorm_kernels.batch.GradBatch`. Those on *values* (``read_*``) turn the integer tensors into Python numbers:
a backend that needs the numbers on the host calls them (for a CUDA tensor that is a synchronisation), a backend that
keeps them on the device does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import GradBatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
ALGORITHMS = ("auto", "wgrad", "gram")
_OPTIONAL = ("cu_seqlens", "sample_ids", "group_ids", "e_cu_seqlens", "e_sample_ids", "c_in", "c_out")


def tensors(**arguments: object) -> None:
    """Raise TypeError unless every argument is a tensor, or None for those that may be left out."""
    for name, value in arguments.items():
        optional = name in _OPTIONAL
        if isinstance(value, Tensor) or (optional and value is None):
            continue
        raise TypeError(
            f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(value).__name__}"
            + ("; wrap it: torch.as_tensor(...)" if isinstance(value, (list, tuple, range)) else "")
        )


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None = None,
    sample_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    num_samples: int | None = None,
    num_groups: int | None = None,
    weight_grad: bool = False,
    group_gram: bool = False,
    algorithm: str = "auto",
    backend: str = "auto",
    *,
    backends: tuple[str, ...],
) -> GradBatch:
    """Check a call of ``fused_grad_norm``; ``backends`` are the names that ``backend`` may take."""
    _one_of("algorithm", algorithm, ALGORITHMS)
    _one_of("backend", backend, ("auto", *backends))
    _floating("x", x)
    if x.dtype != dy.dtype:
        raise TypeError(f"dy must have x's dtype ({x.dtype}), got {dy.dtype}; convert one: dy.to(x.dtype)")
    tokens, segments = _linear(x, dy, cu_seqlens, sample_ids)
    samples, groups = _counts(segments, sample_ids, group_ids, num_samples, num_groups, x.device)
    return GradBatch(
        "fused_grad_norm",
        x,
        dy,
        cu_seqlens,
        sample_ids,
        group_ids,
        tokens,
        x.shape[-1],
        dy.shape[-1],
        segments,
        samples,
        groups,
        weight_grad,
        group_gram,
        algorithm,
        backend,
    )


def grad_gram(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    num_samples: int | None,
    algorithm: str,
    backend: str,
    *,
    backends: tuple[str, ...],
) -> GradBatch:
    """Check a call of ``grad_gram``."""
    batch = fused_grad_norm(
        x, dy, cu_seqlens, sample_ids, num_samples=num_samples, algorithm=algorithm, backend=backend, backends=backends
    )
    return batch._replace(op="grad_gram")


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    num_samples: int | None,
    backend: str,
    *,
    backends: tuple[str, ...],
) -> GradBatch:
    """Check a call of ``grad_dot``; ``v`` is no part of the batch."""
    batch = fused_grad_norm(x, dy, cu_seqlens, sample_ids, num_samples=num_samples, backend=backend, backends=backends)
    _floating("v", v)
    if v.device != x.device:
        raise ValueError(f"v must be on x's device ({x.device}), got {v.device}; move it: v.to(x.device)")
    if v.dim() != 2 or v.shape[0] != batch.d_out or v.shape[1] != batch.d_in:
        raise ValueError(
            f"v must have the weight's shape [d_out, d_in] = [{batch.d_out}, {batch.d_in}], got {list(v.shape)}"
        )
    return batch._replace(op="grad_dot")


def grad_sketch(
    x: Tensor,
    dy: Tensor,
    c_in: Tensor | None,
    c_out: Tensor | None,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    num_samples: int | None,
    backend: str,
    *,
    backends: tuple[str, ...],
) -> GradBatch:
    """Check a call of ``grad_sketch``; ``c_in`` and ``c_out`` are no part of the batch."""
    batch = fused_grad_norm(x, dy, cu_seqlens, sample_ids, num_samples=num_samples, backend=backend, backends=backends)
    for name, projection, size, of in (("c_in", c_in, batch.d_in, "x"), ("c_out", c_out, batch.d_out, "dy")):
        if projection is None:
            continue
        _floating(name, projection)
        if projection.device != x.device:
            raise ValueError(
                f"{name} must be on x's device ({x.device}), got {projection.device}; move it: {name}.to(x.device)"
            )
        if projection.dim() != 2 or projection.shape[0] != size:
            raise ValueError(
                f"{name} must have one row per feature of {of}, [{size}, r], got {list(projection.shape)}; "
                "None keeps that side whole"
            )
    return batch._replace(op="grad_sketch")


def embedding_grad_norm(
    ids: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    num_samples: int | None,
    num_groups: int | None,
    group_gram: bool,
    backend: str,
    *,
    backends: tuple[str, ...],
) -> GradBatch:
    """Check a call of ``embedding_grad_norm``."""
    _one_of("backend", backend, ("auto", *backends))
    tokens, segments = _embedding("dy", ids, dy, "cu_seqlens", cu_seqlens, "sample_ids", sample_ids)
    samples, groups = _counts(segments, sample_ids, group_ids, num_samples, num_groups, dy.device)
    return GradBatch(
        "embedding_grad_norm",
        ids,
        dy,
        cu_seqlens,
        sample_ids,
        group_ids,
        tokens,
        0,
        dy.shape[-1],
        segments,
        samples,
        groups,
        False,
        group_gram,
        "auto",
        backend,
    )


def tied_grad_gram(
    x: Tensor,
    dy: Tensor,
    ids: Tensor,
    e: Tensor,
    cu_seqlens: Tensor | None,
    e_cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    e_sample_ids: Tensor | None,
    group_ids: Tensor | None,
    num_samples: int | None,
    num_groups: int | None,
    backend: str,
    *,
    backends: tuple[str, ...],
) -> tuple[GradBatch, GradBatch]:
    """Check a call of ``tied_grad_gram``: (the head's tokens, the embedding's tokens)."""
    _one_of("backend", backend, ("auto", *backends))
    _floating("x", x)
    _floating("dy", dy)
    head_tokens, head_segments = _linear(x, dy, cu_seqlens, sample_ids)
    samples, groups = _counts(head_segments, sample_ids, group_ids, num_samples, num_groups, x.device)
    tokens, segments = _embedding("e", ids, e, "e_cu_seqlens", e_cu_seqlens, "e_sample_ids", e_sample_ids)
    if e.dtype != x.dtype:
        raise TypeError(f"e must have x's dtype ({x.dtype}), got {e.dtype}; convert one: e.to(x.dtype)")
    if e.device != x.device:
        raise ValueError(f"e must be on x's device ({x.device}), got {e.device}; move one: e.to(x.device)")
    if e.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"e must have the width of x (d_in = {x.shape[-1]}), because a tied head and embedding share one matrix "
            f"[d_out, d_in]; got shape {list(e.shape)}"
        )
    if e_sample_ids is None and samples != segments:
        raise ValueError(
            "e_sample_ids must be given unless each of the embedding's segments is a sample: there are "
            f"{segments} segments in e and {'an unknown number of' if samples is None else samples} samples"
        )
    if samples is None:
        raise ValueError("num_samples must be given with sample_ids and e_sample_ids, or else group_ids")
    head = GradBatch(
        "tied_grad_gram",
        x,
        dy,
        cu_seqlens,
        sample_ids,
        group_ids,
        head_tokens,
        x.shape[-1],
        dy.shape[-1],
        head_segments,
        samples,
        groups,
        False,
        True,
        "auto",
        backend,
    )
    embedding = head._replace(
        x=ids,
        dy=e,
        cu_seqlens=e_cu_seqlens,
        sample_ids=e_sample_ids,
        tokens=tokens,
        d_in=0,
        d_out=e.shape[-1],
        segments=segments,
    )
    return head, embedding


def sketch(value: object) -> tuple[Tensor | None, Tensor | None]:
    """``sketch=`` of ``fused_grad_norm`` as (c_in, c_out). Raises TypeError unless it is a pair."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"sketch must be a pair (c_in, c_out) of projections, each a tensor or None, got {type(value).__name__}"
            + (f" of length {len(value)}" if isinstance(value, (tuple, list)) else "")
        )
    tensors(c_in=value[0], c_out=value[1])
    return value[0], value[1]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _floating(name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}; convert it: {name}.float()"
        )


def _count(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}; leave it out to have it read from the ids")


def _ids(name: str, value: Tensor | None, length: int | None, of: str, device: torch.device) -> None:
    if value is None:
        return
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}; convert it: {name}.long()")
    if value.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional [{of}], got shape {list(value.shape)}")
    if length is not None and value.shape[0] != length:
        raise ValueError(f"{name} must have one entry for each {of} ({length}), got {value.shape[0]}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name} must be on x's device ({device}) or on the CPU, got {value.device}")


def _linear(x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None) -> tuple[int, int]:
    """(tokens, segments) of a linear layer's tokens."""
    if x.device != dy.device:
        raise ValueError(f"dy must be on x's device ({x.device}), got {dy.device}; move one: dy.to(x.device)")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [T, d_in] (packed) or [B, L, d_in], got shape {list(x.shape)}")
    if dy.dim() != x.dim() or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must have the rows of x: x is {list(x.shape)}, so dy must be {[*x.shape[:-1], 'd_out']}, "
            f"got {list(dy.shape)}"
        )
    if x.dim() == 3 and cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens is for packed x [T, d_in]; in [B, L, d_in] each row of the batch is a segment. "
            "Leave cu_seqlens out, or pack both: x.flatten(0, 1), dy.flatten(0, 1)"
        )
    return _segments(x.shape[:-1], cu_seqlens, sample_ids, x.device)


def _segments(
    shape: torch.Size,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    device: torch.device,
    names: tuple[str, str] = ("cu_seqlens", "sample_ids"),
) -> tuple[int, int]:
    """(tokens, segments) of rows of shape [T] or [B, L], after the check of the tensors that describe the segments."""
    tokens, segments = (shape[0], 1) if len(shape) == 1 else (shape[0] * shape[1], shape[0])
    if cu_seqlens is not None:
        _ids(names[0], cu_seqlens, None, "S+1", device)
        if cu_seqlens.shape[0] < 1:
            raise ValueError(f"{names[0]} must have at least one entry (0), got an empty tensor")
        segments = cu_seqlens.shape[0] - 1
    _ids(names[1], sample_ids, segments, "segment", device)
    return tokens, segments


def _counts(
    segments: int,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    num_samples: int | None,
    num_groups: int | None,
    device: torch.device,
) -> tuple[int | None, int | None]:
    """(samples, groups), None where only the ids' values determine them."""
    _count("num_samples", num_samples)
    _count("num_groups", num_groups)
    samples = num_samples
    if sample_ids is None:
        if num_samples is not None and num_samples != segments:
            raise ValueError(
                f"num_samples must equal the number of segments ({segments}) when sample_ids is left out, "
                f"got {num_samples}; pass sample_ids to map segments to samples"
            )
        samples = segments
    elif samples is None and group_ids is not None:
        samples = group_ids.shape[0]
    _ids("group_ids", group_ids, samples, "sample", device)
    if group_ids is not None:
        return samples, num_groups
    if num_groups is not None and num_groups != 1:
        raise ValueError(f"num_groups must be 1 when group_ids is left out, got {num_groups}; pass group_ids")
    return samples, 1


def _embedding(
    name: str,
    ids: Tensor,
    dy: Tensor,
    offsets_name: str,
    cu_seqlens: Tensor | None,
    samples_name: str,
    sample_ids: Tensor | None,
) -> tuple[int, int]:
    """(tokens, segments) of an embedding's tokens; ``name`` is that of the gradients ``dy``."""
    _floating(name, dy)
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}; convert it: ids.long()")
    if ids.device != dy.device:
        raise ValueError(f"ids must be on the device of {name} ({dy.device}), got {ids.device}; move it")
    if ids.dim() not in (1, 2):
        raise ValueError(f"ids must be [T] (packed) or [B, L], got shape {list(ids.shape)}")
    if dy.dim() != ids.dim() + 1 or dy.shape[:-1] != ids.shape:
        raise ValueError(
            f"{name} must have one row per token id: ids is {list(ids.shape)}, so {name} must be "
            f"{[*ids.shape, 'd']}, got {list(dy.shape)}"
        )
    if ids.dim() == 2 and cu_seqlens is not None:
        raise ValueError(
            f"{offsets_name} is for packed ids [T]; in [B, L] each row of the batch is a segment. "
            f"Leave {offsets_name} out, or pack both: ids.flatten(), {name}.flatten(0, 1)"
        )
    return _segments(ids.shape, cu_seqlens, sample_ids, dy.device, (offsets_name, samples_name))


def read_offsets(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens", rows_of: str = "x") -> list[int]:
    """``cu_seqlens`` as Python ints, checked to ascend from 0 to ``tokens``. Synchronises a CUDA tensor.

    ``name`` is the tensor's name in the call, ``rows_of`` that of the argument whose rows it divides.
    """
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    if offsets[-1] != tokens:
        raise ValueError(
            f"{name} must end at the number of rows of {rows_of} ({tokens}), got {offsets[-1]}; "
            f"every row belongs to a segment: leave padding rows out of {rows_of} and "
            f"{'e' if name.startswith('e_') else 'dy'}"
        )
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"{name} must ascend, got {offsets[i - 1]} then {offsets[i]} at position {i}")
    return offsets


def read_ids(name: str, ids: Tensor, count: int | None, of: str) -> tuple[list[int], int]:
    """``ids`` as Python ints in [0, count) and the count; None reads the count from the largest id. Synchronises."""
    values: list[int] = ids.tolist()
    low, high = min(values, default=0), max(values, default=-1)
    if low < 0:
        raise ValueError(f"{name} must be at least 0, got {low} at position {values.index(low)}")
    if count is None:
        return values, high + 1
    if high >= count:
        raise ValueError(
            f"{name} must be below the number of {of} ({count}), got {high} at position {values.index(high)}"
        )
    return values, count

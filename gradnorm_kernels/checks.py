"""What each op accepts: one validation an op, shared with its fake kernel.

Two kinds of checks live here. Those on shapes, dtypes and devices (``fused_grad_norm``, ``grad_gram``, ``grad_dot``)
read no tensor data, so they run the same on real and on fake tensors. Those on *values* (``read_*``) turn the integer
tensors into Python numbers: a backend that needs the numbers on the host calls them (for a CUDA tensor that is a
synchronisation), a backend that keeps them on the device does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
ALGORITHMS = ("auto", "wgrad", "gram")


class Sizes(NamedTuple):
    """The sizes of one call. ``samples`` and ``groups`` are None where only the values of the ids tell."""

    tokens: int
    d_in: int
    d_out: int
    segments: int
    samples: int | None
    groups: int | None


def tensors(**arguments: object) -> None:
    """Raise TypeError unless every argument is a tensor, or None for those that may be left out."""
    for name, value in arguments.items():
        optional = name in ("cu_seqlens", "sample_ids", "group_ids")
        if isinstance(value, Tensor) or (optional and value is None):
            continue
        raise TypeError(
            f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(value).__name__}"
            + ("; wrap it: torch.as_tensor(...)" if isinstance(value, (list, tuple, range)) else "")
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _count(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}; leave it out to have it read from the ids")


def _ids(name: str, value: Tensor | None, length: int | None, of: str, x: Tensor) -> None:
    if value is None:
        return
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}; convert it: {name}.long()")
    if value.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional [{of}], got shape {list(value.shape)}")
    if length is not None and value.shape[0] != length:
        raise ValueError(f"{name} must have one entry for each {of} ({length}), got {value.shape[0]}")
    if value.device.type != "cpu" and value.device != x.device:
        raise ValueError(f"{name} must be on x's device ({x.device}) or on the CPU, got {value.device}")


def _packed(x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, sample_ids: Tensor | None) -> tuple[int, int, int, int]:
    """Check what all three ops share; return (tokens, d_in, d_out, segments)."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it: x.float()")
    if x.dtype != dy.dtype:
        raise TypeError(f"dy must have x's dtype ({x.dtype}), got {dy.dtype}; convert one: dy.to(x.dtype)")
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
    tokens, segments = (x.shape[0], 1) if x.dim() == 2 else (x.shape[0] * x.shape[1], x.shape[0])
    if cu_seqlens is not None:
        _ids("cu_seqlens", cu_seqlens, None, "S+1", x)
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens must have at least one entry (0), got an empty tensor")
        segments = cu_seqlens.shape[0] - 1
    _ids("sample_ids", sample_ids, segments, "segment", x)
    return tokens, x.shape[-1], dy.shape[-1], segments


def fused_grad_norm(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    group_ids: Tensor | None,
    num_samples: int | None,
    num_groups: int | None,
    algorithm: str,
    backend: str,
    backends: tuple[str, ...],
) -> Sizes:
    """Check a call of ``fused_grad_norm`` without reading data; ``backends`` are the names ``backend`` may take."""
    _one_of("algorithm", algorithm, ALGORITHMS)
    _one_of("backend", backend, ("auto", *backends))
    _count("num_samples", num_samples)
    _count("num_groups", num_groups)
    tokens, d_in, d_out, segments = _packed(x, dy, cu_seqlens, sample_ids)
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
    _ids("group_ids", group_ids, samples, "sample", x)
    groups = num_groups
    if group_ids is None:
        if num_groups is not None and num_groups != 1:
            raise ValueError(f"num_groups must be 1 when group_ids is left out, got {num_groups}; pass group_ids")
        groups = 1
    return Sizes(tokens, d_in, d_out, segments, samples, groups)


def grad_gram(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    num_samples: int | None,
    algorithm: str,
    backend: str,
    backends: tuple[str, ...],
) -> Sizes:
    """Check a call of ``grad_gram`` without reading data."""
    return fused_grad_norm(x, dy, cu_seqlens, sample_ids, None, num_samples, None, algorithm, backend, backends)


def grad_dot(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sample_ids: Tensor | None,
    num_samples: int | None,
    backend: str,
    backends: tuple[str, ...],
) -> Sizes:
    """Check a call of ``grad_dot`` without reading data."""
    sizes = grad_gram(x, dy, cu_seqlens, sample_ids, num_samples, "auto", backend, backends)
    if v.dtype not in DTYPES:
        raise TypeError(f"v must be float32, bfloat16, float16 or float64, got {v.dtype}; convert it: v.float()")
    if v.device != x.device:
        raise ValueError(f"v must be on x's device ({x.device}), got {v.device}; move it: v.to(x.device)")
    if v.dim() != 2 or v.shape[0] != sizes.d_out or v.shape[1] != sizes.d_in:
        raise ValueError(
            f"v must have the weight's shape [d_out, d_in] = [{sizes.d_out}, {sizes.d_in}], got {list(v.shape)}"
        )
    return sizes


def read_offsets(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """``cu_seqlens`` as Python ints, checked to ascend from 0 to ``tokens``. Synchronises a CUDA tensor."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
    if offsets[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at the number of rows of x ({tokens}), got {offsets[-1]}; "
            "every row belongs to a segment: leave padding rows out of x and dy"
        )
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"cu_seqlens must ascend, got {offsets[i - 1]} then {offsets[i]} at position {i}")
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

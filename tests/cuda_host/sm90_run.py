"""Runs the sm_90a wgrad of a host module (build.py) on small cases and compares it with the float64 reference."""

from __future__ import annotations

import mmap
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradnorm_kernels import reference
from gradnorm_kernels.tolerances import NORMS, WEIGHT_GRAD
from tests.cuda_host.build import Host

TYPES = {torch.bfloat16: 1, torch.float16: 2}
NAN = float("nan")
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on


@dataclass(frozen=True)
class Case:
    """One launch. Segment i has ``lengths[i]`` rows of sample ``samples[i]`` and group ``groups[i]``.

    ``gap`` rows of NaN, of no segment, follow each segment. ``unmeasured``: samples without a norm. ``parts``: the
    groups' sums of each of ``splits`` go to the workspace, but for the first ``whole_rows`` rows of tiles. ``poison``:
    a value for one element of dy, and its segment. ``stride``: elements from one row of x to the next, for matrices of
    more than 2^31.
    """

    lengths: tuple[int, ...]
    d_in: int
    d_out: int
    samples: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    gap: int = 0
    unmeasured: tuple[int, ...] = ()
    splits: int = 1
    parts: bool = False
    whole_rows: int = 0
    weight_grad: bool = True
    poison: tuple[float, int] | None = None
    stride: int = 0
    multiprocessors: int = 2
    group_m: int = 2
    staggered: bool = True
    dtype: torch.dtype = torch.bfloat16
    block_n: int = 192
    cluster: int = 1


@dataclass(frozen=True)
class Result:
    """What the launch left: partial sums added up in float64, parts added up by group."""

    sample_sq: Tensor
    group_sq: Tensor
    weight_grad: Tensor

    def same(self, other: Result) -> bool:
        """The same bits, NaN included."""
        pairs = zip(self.__dict__.values(), other.__dict__.values(), strict=True)
        return all(torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) for a, b in pairs)


def random_case(seed: int) -> Case:
    """Few rows and small weights, but every way to cut them: around 16 and 64 tokens, 64, 192 and 256 columns."""
    draw = random.Random(seed)
    lengths = [
        draw.choice((0, 1, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97, 128, 129, 200)) for _ in range(draw.randint(1, 8))
    ]
    lengths[0] = draw.choice((1, 16, 65))
    samples, groups = [0], [0]
    for _ in lengths[1:]:
        fresh = draw.random() < 0.75
        samples.append(samples[-1] + fresh)
        groups.append(groups[-1] + (draw.choice((0, 0, 1, 2)) if fresh else 0))
    parts = draw.random() < 0.4
    d_out = draw.choice((4, 8, 23, 64, 70, 128, 136, 200, 300))
    return Case(
        tuple(lengths),
        d_in=draw.choice((1, 8, 19, 64, 72, 100, 128, 192, 193, 200, 256, 384, 400)),
        d_out=d_out,
        samples=tuple(samples),
        groups=tuple(groups),
        gap=draw.choice((0, 0, 5)),
        unmeasured=tuple(sample for sample in set(samples) if draw.random() < 0.2),
        splits=draw.randint(1, min(4, samples[-1] + 1)) if parts else 1,
        parts=parts,
        whole_rows=draw.randint(0, (d_out - 1) // 128) if parts else 0,
        weight_grad=draw.random() < 0.8,
        poison=draw.choice((None, None, (NAN, 0), (float("inf"), 0))),
        multiprocessors=draw.randint(1, 7),
        group_m=draw.randint(1, 4),
        dtype=draw.choice(tuple(TYPES)),
        block_n=draw.choice((128, 192, 256)),
        staggered=draw.random() < 0.7,
    )


def paired(case: Case) -> Case:
    """The same in clusters of two blocks, with an even number of rows of tiles and multiprocessors for two clusters."""
    d_out = case.d_out if -(-case.d_out // 128) % 2 == 0 else case.d_out + 128
    whole_rows = case.whole_rows // 2 * 2
    return replace(case, d_out=d_out, whole_rows=whole_rows, cluster=2, multiprocessors=max(case.multiprocessors, 5))


def virtual(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros in memory that exists where it is touched."""
    size = count * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(pages, dtype=dtype)


def _matrix(rows: int, columns: int, stride: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[rows, columns], with NaN behind each row where rows are padded to a multiple of 8 elements."""
    padded = -(-columns // 8) * 8
    if stride:
        matrix = virtual((rows - 1) * stride + padded, dtype).as_strided((rows, padded), (stride, 1))
    else:
        matrix = torch.empty(rows, padded, dtype=dtype)
    matrix.fill_(NAN)
    matrix[:, :columns] = torch.randn(rows, columns, generator=generator).to(dtype)
    return matrix


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(host: Host, case: Case, seed: int) -> tuple[Result, Result]:
    """What the kernel and what the reference make of a case. Raises RuntimeError with the host execution's finding."""
    generator = torch.Generator().manual_seed(len(case.lengths))
    segments = range(len(case.lengths))
    samples, groups = case.samples or tuple(segments), case.groups or (0,) * len(segments)
    starts = [sum(case.lengths[:i]) + case.gap * i for i in segments]
    ends = [start + length for start, length in zip(starts, case.lengths, strict=True)]
    tokens = ends[-1] + case.gap
    x = _matrix(tokens, case.d_in, case.stride, case.dtype, generator)
    dy = _matrix(tokens, case.d_out, 0, case.dtype, generator)
    inside = torch.zeros(tokens, dtype=torch.bool)
    for start, end in zip(starts, ends, strict=True):
        inside[start:end] = True
    x[~inside], dy[~inside] = NAN, NAN
    if case.poison:
        dy[starts[case.poison[1]], 3] = case.poison[0]

    count, kinds = max(samples) + 1, max(groups) + 1
    rows = host.module.wgrad_norm_sm90_rows(d_in=case.d_in, d_out=case.d_out, block_n=case.block_n)
    targets = [-1 if sample in case.unmeasured else sample for sample in samples]
    # Splits begin at the first segment of a sample.
    begins = [i for i in segments if i == 0 or samples[i] != samples[i - 1]]
    cuts = [begins[p * len(begins) // case.splits] for p in range(case.splits)] + [len(segments)]
    parts = case.parts
    # The weight's rows above this one are those of whole rows of tiles.
    above = min(128 * case.whole_rows, case.d_out) if parts else case.d_out
    whole_rows = case.whole_rows if parts else -(-case.d_out // 128)
    below = case.d_out - above
    whole = case.weight_grad and above > 0
    buffers = {
        "x": x,
        "dy": dy,
        "segment_start": _ints(starts),
        "segment_end": _ints(ends),
        "segment_sample": _ints(targets),
        "segment_group": _ints(list(groups)),
        "split_start": _ints(cuts),
        "sample_sq": torch.zeros(rows, count),
        "group_sq": torch.zeros(rows // -(-case.d_out // 128) * whole_rows, kinds) if whole_rows else None,
        "workspace": virtual((case.splits + kinds - 1) * below * case.d_in, torch.float32) if parts else None,
        "weight_grad": torch.full((above, case.d_in), NAN, dtype=case.dtype) if whole else None,
        "running": torch.full((above, case.d_in), NAN) if whole and kinds > 1 else None,
    }
    host.reset(seed)
    for buffer in buffers.values():
        if buffer is not None:
            size = sum((n - 1) * s for n, s in zip(buffer.shape, buffer.stride(), strict=True)) + 1
            host.region(buffer.data_ptr(), size * buffer.dtype.itemsize)
    host.module.wgrad_norm_sm90(
        **{name: 0 if buffer is None else buffer.data_ptr() for name, buffer in buffers.items()},
        x_stride=x.stride(0),
        dy_stride=dy.stride(0),
        type=TYPES[case.dtype],
        tokens=tokens,
        d_in=case.d_in,
        d_out=case.d_out,
        segments=len(segments),
        samples=count,
        groups=kinds,
        splits=case.splits,
        whole_rows=whole_rows,
        block_n=case.block_n,
        group_m=case.group_m,
        staggered=case.staggered,
        cluster=case.cluster,
        multiprocessors=case.multiprocessors,
        stream=0,
    )

    x, dy = x[inside, : case.d_in], dy[inside, : case.d_out]
    offsets = torch.tensor([0, *case.lengths]).cumsum(0)
    present = sorted(set(groups))
    group_of = torch.zeros(count, dtype=torch.int64)
    group_of[list(samples)] = torch.tensor([present.index(group) for group in groups])
    ids = {"sample_ids": torch.tensor(samples), "num_samples": count, "group_ids": group_of}
    found = reference.fused_grad_norm(x, dy, offsets, weight_grad=True, num_groups=len(present), **ids)
    expected_sq, expected_group, expected_weight = found[:3]
    assert expected_weight is not None
    for sample in case.unmeasured:
        expected_sq[sample] = 0.0
    sample_sq = buffers["sample_sq"].double().sum(0)
    group_sq = torch.zeros(len(present), dtype=torch.float64)
    weight_grad = expected_weight.clone()
    if whole_rows:
        group_sq += buffers["group_sq"].double().sum(0)[present]
    if whole:
        weight_grad[:above] = buffers["weight_grad"].double()
    if parts:
        more, weight_grad[above:] = _from_parts(buffers["workspace"], (below, case.d_in), case.splits, cuts, groups)
        group_sq += more
    return Result(sample_sq, group_sq, weight_grad), Result(expected_sq, expected_group, expected_weight)


def _from_parts(
    flat: Tensor, shape: tuple[int, int], splits: int, cuts: list[int], groups: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The groups' squared norms, and the sum of all, from what each split left of each group."""
    weight = shape[0] * shape[1]
    sums: dict[int, Tensor] = {}
    for split in range(splits):
        for group in sorted(set(groups[cuts[split] : cuts[split + 1]])):
            sum_index = split + group
            part = flat[sum_index * weight : (sum_index + 1) * weight].double()
            sums[group] = sums.get(group, torch.zeros(weight, dtype=torch.float64)) + part
    group_sq = torch.stack([sums[group].square().sum() for group in sorted(sums)])
    return group_sq, sum(sums.values(), torch.zeros(weight, dtype=torch.float64)).view(shape)


def differences(case: Case, result: Result, expected: Result) -> list[str]:
    """What is not what it should be, in words; empty if all is."""
    found = []
    rounding = NORMS[case.dtype] if case.parts and not case.whole_rows else WEIGHT_GRAD[case.dtype]
    bounds = {"sample_sq": NORMS[case.dtype], "group_sq": NORMS[case.dtype], "weight_grad": rounding}
    for name, bound in bounds.items():
        is_, should = getattr(result, name), getattr(expected, name)
        finite = should.isfinite()
        if not torch.equal(is_.isnan(), should.isnan()) or not torch.equal(is_[should.isinf()], should[should.isinf()]):
            found.append(f"{name}: not finite in other places than the reference")
            continue
        if finite.any():
            scale = should[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            error = float((is_[finite] - should[finite]).abs().max() / scale)
            if not error <= bound:
                found.append(f"{name}: off by {error:.1e} of the largest")
    return found


def narrow(case: Case) -> Case:
    """The same with the other tile and the other type."""
    return replace(case, block_n=128, dtype=torch.float16)

"""The inputs that catch implementations out, as one list, and one check of a backend against the float64 reference.

Every backend passes these same cases, in the tests and in ``python -m gradnorm_kernels check`` on the machine at hand
(:mod:`.selfcheck`). Cases are built on the CPU from a fixed seed and moved; what is compared is always float64. What
does not hold raises AssertionError.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, tolerances
from .tolerances import NORMS, WEIGHT_GRAD

ALGORITHMS = ("wgrad", "gram", "auto")


@dataclass(frozen=True)
class Case:
    """One call. ``kwargs``: counts given by hand. ``loses_digits``: the Gram is a small difference of large numbers.

    ``positive``: all numbers are above 0, so that no sum has infinities of both signs: the results are infinite where
    the reference is, and never NaN.
    """

    x: Tensor
    dy: Tensor
    cu_seqlens: Tensor | None = None
    sample_ids: Tensor | None = None
    group_ids: Tensor | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    loses_digits: bool = False
    positive: bool = False

    def to(self, device: torch.device | str, ids: torch.device | str | None = None) -> Case:
        """On another device; the integer tensors on ``ids`` if it is given. Strides stay as they are."""

        def moved(tensor: Tensor | None, where: torch.device | str) -> Tensor | None:
            if tensor is None or tensor.device == torch.device(where):
                return tensor
            base = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            return base.to(where).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        x, dy = moved(self.x, device), moved(self.dy, device)
        assert x is not None and dy is not None
        where = device if ids is None else ids
        indices: dict[str, Any] = {
            name: moved(getattr(self, name), where) for name in ("cu_seqlens", "sample_ids", "group_ids")
        }
        return replace(self, x=x, dy=dy, **indices)


@dataclass(frozen=True)
class Trap:
    """A case by name; ``build`` makes it for a dtype."""

    name: str
    build: Callable[[torch.dtype], Case]

    def __str__(self) -> str:
        return self.name


def packed(lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype, **ids: Any) -> Case:
    """Random tokens in segments of these lengths; lists among ``ids`` become tensors."""
    generator = torch.Generator().manual_seed(sum(lengths) + d_in)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    x = torch.randn(tokens, d_in, generator=generator).to(dtype)
    dy = torch.randn(tokens, d_out, generator=generator).to(dtype)
    tensors: dict[str, Any] = {
        name: torch.tensor(value) if isinstance(value, list) else value for name, value in ids.items()
    }
    return Case(x, dy, cu_seqlens, **tensors)


def _poisoned(value: float, where: str) -> Callable[[torch.dtype], Case]:
    """A sample with a neighbour on both sides, another piece of it elsewhere, and other groups."""

    def build(dtype: torch.dtype) -> Case:
        case = packed([20, 20, 20, 130, 20, 7], 19, 23, dtype, sample_ids=[0, 1, 2, 3, 1, 4], group_ids=[0, 1, 2, 0, 2])
        getattr(case, where)[30, 5] = value
        return case

    return build


def _infinite(where: str) -> Callable[[torch.dtype], Case]:
    """An infinity in numbers above 0, in widths that no tile divides: times a tile's padding it would be NaN."""

    def build(dtype: torch.dtype) -> Case:
        case = packed([20, 20, 0, 130, 20, 7], 19, 23, dtype, sample_ids=[0, 1, 2, 3, 1, 4], group_ids=[0, 1, 2, 0, 2])
        x, dy = (tensor.abs().clamp_min(0.125) for tensor in (case.x, case.dy))
        (x if where == "x" else dy)[30, 5] = torch.inf
        return replace(case, x=x, dy=dy, positive=True)

    return build


def _cancelling_tokens(dtype: torch.dtype) -> Case:
    """Pairs of tokens with opposite gradients, up to a thousandth: the norm is that of what is left."""
    half = packed([50], 64, 48, torch.float32)
    nudge = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    other = half.x + nudge * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    x, dy = torch.cat([half.x, other]), torch.cat([half.dy, -half.dy])
    return Case(x.to(dtype), dy.to(dtype), loses_digits=True)


def _cancelling_samples(dtype: torch.dtype) -> Case:
    """Two samples with opposite gradients: the group's sum is nothing beside them, and U is -||G||^2."""
    half = packed([90], 33, 21, dtype)
    offsets = torch.tensor([0, 90, 180])
    return Case(torch.cat([half.x, half.x]), torch.cat([half.dy, -half.dy]), offsets)


def _zeros(dtype: torch.dtype) -> Case:
    """All-zero dy in one sample, -0.0 in another, zeros of both signs in x."""
    case = packed([9, 8, 7], 20, 24, dtype, group_ids=[0, 1, 1])
    case.dy[:9], case.dy[9:17] = 0.0, -0.0
    case.x[:, ::3], case.x[:, 1::3] = 0.0, -0.0
    return case


def _small_gradients(dtype: torch.dtype) -> Case:
    """As in training: dy a millionth of x (a thousandth in float16, whose smallest normal number is 6e-5)."""
    case = packed([64, 33, 100], 48, 40, torch.float32)
    return replace(case, x=case.x.to(dtype), dy=(case.dy * (1e-3 if dtype == torch.float16 else 1e-6)).to(dtype))


def _strided(view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[torch.dtype], Case]:
    def build(dtype: torch.dtype) -> Case:
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(6, 40, d, generator=generator).to(dtype) for d in (22, 13))
        return Case(*view(x, dy))

    return build


def _plain(*args: Any, **ids: Any) -> Callable[[torch.dtype], Case]:
    lengths, d_in, d_out = args
    return lambda dtype: packed(lengths, d_in, d_out, dtype, **ids)


_ODD_LENGTHS = [1, 0, 777, 13, 1000, 97, 0, 13]
_ODD_IDS = {"sample_ids": [3, 1, 0, 5, 2, 3, 4, 7], "group_ids": [0, 1, 0, 2, 2, 4, 0, 1]}
#: Lengths of 1, 0, 777 and 1000; a sample in two places; samples 4 and 6 and group 3 without tokens.
ODD = Trap("odd lengths", _plain(_ODD_LENGTHS, 67, 83, **_ODD_IDS))
#: The same with rows that tensor maps and wide loads take as they are; those of the first are copied or read singly. To
#: the interpreter the two are one.
ALIGNED = Trap("aligned rows", _plain(_ODD_LENGTHS, 80, 144, **_ODD_IDS))
#: The same with more tiles than a GPU has multiprocessors, so that tokens are not split. For a GPU alone.
LARGE = Trap("large", _plain(_ODD_LENGTHS, 1664, 1536, **_ODD_IDS))

LENGTHS = {
    "one token": [1],
    "one sample of 777": [777],
    "samples of one token": [1, 1, 1],
    "empty at the end": [5, 0, 0],
    "all empty": [0, 0],
    "primes": [2, 3, 5, 7, 11, 13],
    "equal lengths": [128] * 9,
    "long and short": [600, 40],
}

TRAPS = (
    ODD,
    *(Trap(name, _plain(lengths, 31, 17)) for name, lengths in LENGTHS.items()),
    *(
        Trap(f"widths {d_in} x {d_out}", _plain([7, 60, 1], d_in, d_out))
        for d_in, d_out in ((1, 1), (1, 97), (777, 2), (1000, 131), (129, 257), (64, 128), (0, 5), (5, 0))
    ),
    Trap("one segment, no offsets", lambda dtype: replace(packed([100], 40, 30, dtype), cu_seqlens=None)),
    Trap("samples that take turns", _plain([5, 60, 5, 60, 7, 130], 40, 72, sample_ids=[0, 1] * 3, group_ids=[1, 0])),
    Trap("one sample a group", _plain([40, 3, 90], 50, 60, group_ids=[2, 0, 1])),
    Trap("groups that take turns", _plain([30, 7, 64, 1, 65, 50], 33, 35, group_ids=[0, 1, 0, 1, 0, 1])),
    Trap("a hundred samples", _plain([1, 3, 2, 5] * 25, 32, 48, group_ids=[0, 1, 2, 2, 1] * 20)),
    Trap("few tiles, many tokens", _plain([700, 1500, 64], 16, 16)),
    Trap("32-bit offsets and ids", lambda dtype: _narrow(packed([5, 60, 2], 9, 8, dtype, sample_ids=[2, 0, 1]))),
    Trap(
        "counts given by hand",
        _plain([5, 6], 4, 3, sample_ids=[1, 0], group_ids=[0, 1, 1, 0], kwargs={"num_samples": 4, "num_groups": 3}),
    ),
    Trap("tokens that cancel", _cancelling_tokens),
    Trap("samples that cancel", _cancelling_samples),
    Trap("zeros of both signs", _zeros),
    Trap("small gradients", _small_gradients),
    *(
        Trap(f"{value} in {where}", _poisoned(value, where))
        for value in (float("nan"), float("inf"), float("-inf"))
        for where in ("x", "dy")
    ),
    *(Trap(f"infinite {where}, nothing negative", _infinite(where)) for where in ("x", "dy")),
    Trap("batch", _strided(lambda x, dy: (x, dy))),
    Trap("batch, sliced tokens", _strided(lambda x, dy: (x[:, 3:20], dy[:, 3:20]))),
    Trap("batch, every other row", _strided(lambda x, dy: (x[::2], dy[::2]))),
    Trap("batch, sliced features", _strided(lambda x, dy: (x[..., 2:9], dy[..., ::3]))),
    Trap("batch, transposed", _strided(lambda x, dy: (x.transpose(0, 1), dy.transpose(0, 1)))),
    Trap("expanded features", _strided(lambda x, dy: (x[..., :1].expand(6, 40, 8), dy))),
    Trap("expanded rows", _strided(lambda x, dy: (x[:1, :1].expand(6, 40, 22), dy[:, :1].expand(6, 40, 13)))),
    Trap("columns first", _strided(lambda x, dy: (x[0].T.contiguous().T, dy[0].T.contiguous().T))),
    Trap("no rows", _strided(lambda x, dy: (x[:, :0], dy[:, :0]))),
    Trap("no batch", _strided(lambda x, dy: (x[:0], dy[:0]))),
)


def _narrow(case: Case) -> Case:
    assert case.cu_seqlens is not None and case.sample_ids is not None
    return replace(case, cu_seqlens=case.cu_seqlens.int(), sample_ids=case.sample_ids.int())


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, scale: Tensor | float | None = None, what: str = "result"
) -> None:
    """Within ``tolerance`` of ``scale``; finite where, and only where, expected.

    ``scale`` is of one element or of the expected shape; without it, the largest finite expected value. The message
    says what was found and expected at the worst place: on a GPU it may be all there is to go by.
    """
    said = tolerances.difference(actual, expected, tolerance, scale)
    _hold(said is None, f"{what}: {said}")


def _hold(condition: object, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


def assert_same_bits(first: Sequence[Tensor | None], second: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Equal to the last bit, NaN where NaN is; the message says which results differ, where and by how much."""
    wrong = []
    for name, a, b in zip(names, first, second, strict=True):
        if a is None or b is None:
            _hold(a is b, f"{name}: there only once")
            continue
        differ = (a != b) & ~(a.isnan() & b.isnan())
        if differ.any():
            place = tuple(differ.nonzero()[0].tolist())
            wrong.append(
                f"{name}: {int(differ.sum())} of {differ.numel()} elements, first {a[place]:.9g} and then "
                f"{b[place]:.9g} at {place}"
            )
    _hold(not wrong, "other bits later: " + "; ".join(wrong))


def _dtypes(promised: torch.dtype, *tensors: Tensor) -> None:
    found = [tensor.dtype for tensor in tensors]
    _hold(set(found) == {promised}, f"of dtypes {found}, not {promised}")


def _clean(tensor: Tensor) -> Tensor:
    """Absolute values of rows [T, d] in float64, with zeros for what is not finite."""
    return tensor.double().flatten(0, -2).abs().nan_to_num(0, 0, 0)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory comes filled with NaN, so that a result nobody wrote shows."""
    filling: Any = torch.utils.deterministic  # torch's stub does not list its setting
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


def _own_memory(results: ops.FusedGradNorm) -> None:
    """What torch.compile takes for granted: an operator's results are laid out as its fake says, and share nothing."""
    there = [tensor for tensor in results if tensor is not None and tensor.numel()]
    _hold(all(tensor.is_contiguous() for tensor in there), f"strides {[tensor.stride() for tensor in there]}")
    _hold(len({tensor.untyped_storage().data_ptr() for tensor in there}) == len(there), "results share memory")


def _norms(case: Case) -> float:
    """The tolerance of norms, sums and inner products: no chain of products is longer than what is taken here."""
    tokens = case.x.shape[:-1].numel()
    return tolerances.norms(case.x.dtype, case.x.device, max(tokens, case.x.shape[-1], case.dy.shape[-1]))


def _same_infinities(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Infinite, of the same sign, where and only where expected, and nowhere NaN."""
    for name, tensor, right in zip(names, found, expected, strict=True):
        if tensor is None or right is None:
            continue
        here = tensor.cpu().double()
        wrong = (here != right) & ~(here.isfinite() & right.isfinite())
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(f"{name}: found {here[place]}, expected {right[place]} at {place}")


Truth = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def truth(case: Case, **wanted: bool) -> Truth:
    """The reference's results for a case, on the CPU."""
    cpu = case.to("cpu")
    ids = {"sample_ids": cpu.sample_ids, "group_ids": cpu.group_ids, **case.kwargs, **wanted}
    return reference.fused_grad_norm(cpu.x, cpu.dy, cpu.cu_seqlens, **ids)


def check(
    case: Case, backend: str, algorithm: str, runs: int = 2, expected: Truth | None = None, **wanted: bool
) -> ops.FusedGradNorm:
    """Hold every result of ``fused_grad_norm`` to the reference, and more runs to the first one's bits; return it.

    ``wanted``: ``weight_grad`` and ``group_gram``. ``expected``: the case's ``truth``, where that is known already.
    """
    call = (case.x, case.dy, case.cu_seqlens)
    ids = {"sample_ids": case.sample_ids, "group_ids": case.group_ids, **case.kwargs, **wanted}
    with poisoned_memory():
        first, *more = (ops.fused_grad_norm(*call, **ids, algorithm=algorithm, backend=backend) for _ in range(runs))
    for other in more:
        assert_same_bits(first, other, first._fields)
    _own_memory(first)
    cpu = case.to("cpu")
    sample_sq, group_sq, weight_grad, group_gram = truth(case, **wanted) if expected is None else expected

    norms = 0.5 if case.loses_digits and algorithm != "wgrad" else _norms(case)
    _dtypes(torch.float64, first.sample_sq_norms, first.group_sq_norms)
    assert_close(first.sample_sq_norms, sample_sq, norms, what="sample_sq_norms")
    finite = sample_sq.isfinite()
    each = sample_sq[finite]
    assert_close(first.sample_sq_norms.cpu()[finite], each, norms, each, "sample_sq_norms, each of its own")
    # A sum may cancel: it is held to the largest of what it is made of.
    groups = torch.zeros(len(sample_sq), dtype=torch.int64) if cpu.group_ids is None else cpu.group_ids.long()
    made_of = torch.zeros_like(group_sq).index_add_(0, groups, sample_sq.nan_to_num(0, 0, 0)).maximum(group_sq)
    assert_close(first.group_sq_norms, group_sq, norms, made_of, "group_sq_norms")
    _hold((first.weight_grad is None) == (weight_grad is None), "weight_grad is there only once")
    _hold((first.group_gram is None) == (group_gram is None), "group_gram is there only once")
    if weight_grad is not None and first.weight_grad is not None:
        _dtypes(case.x.dtype, first.weight_grad)
        terms = (_clean(cpu.dy).T @ _clean(cpu.x)).amax() if weight_grad.numel() else 0.0
        element = weight_grad.nan_to_num(0, 0, 0).abs().amax() if weight_grad.numel() else 0.0
        rounding = WEIGHT_GRAD[case.x.dtype]
        assert_close(first.weight_grad, weight_grad, rounding, element + 1e-6 / rounding * terms, "weight_grad")
    if group_gram is not None and first.group_gram is not None:
        _dtypes(torch.float64, first.group_gram)
        assert_close(first.group_gram, group_gram, norms, made_of.sqrt().outer(made_of.sqrt()), "group_gram")
    if case.positive:
        _same_infinities(first[:4], (sample_sq, group_sq, weight_grad, group_gram), first._fields[:4])
    return first


def _drawn(case: Case, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] of the case's dtype, random; above 0 if the case's numbers are."""
    drawn = torch.randn(rows, columns, generator=generator).to(case.x.dtype)
    return drawn.abs().clamp_min(0.125) if case.positive else drawn


def _terms(case: Case) -> Tensor | None:
    """What sums of products of random signs are held to: the root of the sum of their terms' squares.

    None, the largest result, where no term is negative.
    """
    return None if case.positive else (_clean(case.x).norm(dim=1) * _clean(case.dy).norm(dim=1)).norm()


def _without_tokens(case: Case, samples: int) -> Tensor:
    """[samples] bool: which samples of a case on the CPU have no tokens."""
    if case.x.dim() == 3 or case.cu_seqlens is None:
        lengths = torch.full((len(case.x) if case.x.dim() == 3 else 1,), case.x.shape[-2])
    else:
        lengths = case.cu_seqlens.diff().long()
    owners = torch.arange(len(lengths)) if case.sample_ids is None else case.sample_ids.long()
    return torch.zeros(samples, dtype=torch.int64).index_add_(0, owners, lengths) == 0


def check_pairs(case: Case, backend: str, algorithm: str, runs: int = 2) -> None:
    """Hold ``grad_gram`` and ``grad_dot`` to the reference, and more runs to the first one's bits."""
    cpu = case.to("cpu")
    counts = {"num_samples": case.kwargs["num_samples"]} if case.kwargs else {}
    generator = torch.Generator().manual_seed(3)
    v = _drawn(case, case.dy.shape[-1], case.x.shape[-1], generator)
    call = {"cu_seqlens": case.cu_seqlens, "sample_ids": case.sample_ids, "backend": backend, **counts}
    with poisoned_memory():
        grams = [ops.grad_gram(case.x, case.dy, algorithm=algorithm, **call) for _ in range(runs)]
        dots = [ops.grad_dot(case.x, case.dy, v.to(case.x.device), **call) for _ in range(runs)]
    for gram, dot in zip(grams[1:], dots[1:], strict=True):
        assert_same_bits([grams[0], dots[0]], [gram, dot], ["grad_gram", "grad_dot"])
    symmetric = 1e-8 if case.x.dtype != torch.float64 else 1e-14
    assert_close(grams[0], grams[0].T.cpu(), symmetric, what="grad_gram against its transpose")
    _dtypes(torch.float64, grams[0], dots[0])

    ids = {"cu_seqlens": cpu.cu_seqlens, "sample_ids": cpu.sample_ids, **counts}
    norms = 0.5 if case.loses_digits and algorithm != "wgrad" else _norms(case)
    gram, dots_expected = reference.grad_gram(cpu.x, cpu.dy, **ids), reference.grad_dot(cpu.x, cpu.dy, v, **ids)
    # A sample without tokens has no terms, and is 0 with every other: an infinity is not multiplied by its zeros.
    absent = _without_tokens(cpu, len(gram))
    gram[absent], gram[:, absent] = 0.0, 0.0
    assert_close(grams[0], gram, norms, what="grad_gram")
    terms = _terms(cpu)
    assert_close(dots[0], dots_expected, NORMS[case.x.dtype], terms, "grad_dot")
    if case.positive:
        _same_infinities((grams[0], dots[0]), (gram, dots_expected), ("grad_gram", "grad_dot"))


#: (r_in, r_out), None for a side that stays whole.
SKETCHES = ((7, 5), (None, 70), (65, None), (None, None))


def check_sketches(
    case: Case, backend: str, runs: int = 2, sketches: Sequence[tuple[int | None, int | None]] = SKETCHES
) -> None:
    """Hold ``grad_sketch`` to the reference for these sides, and more runs to the first one's bits."""
    cpu = case.to("cpu")
    counts = {"num_samples": case.kwargs["num_samples"]} if case.kwargs else {}
    ids = {"cu_seqlens": cpu.cu_seqlens, "sample_ids": cpu.sample_ids, **counts}
    terms = _terms(cpu)
    generator = torch.Generator().manual_seed(5)
    for r_in, r_out in sketches:
        c_in, c_out = (
            None if r is None else _drawn(case, d, r, generator)
            for d, r in ((case.x.shape[-1], r_in), (case.dy.shape[-1], r_out))
        )
        c = [None if side is None else side.to(case.x.device) for side in (c_in, c_out)]
        call = {"cu_seqlens": case.cu_seqlens, "sample_ids": case.sample_ids, "backend": backend, **counts}
        with poisoned_memory():
            first, *more = (ops.grad_sketch(case.x, case.dy, *c, **call) for _ in range(runs))
        for other in more:
            assert_same_bits([first], [other], ["grad_sketch"])
        _hold(first.is_contiguous(), f"strides {first.stride()}")
        _dtypes(torch.promote_types(case.x.dtype, torch.float32), first)
        expected = reference.grad_sketch(cpu.x, cpu.dy, c_in, c_out, **ids)
        what = f"grad_sketch, r_in={r_in}, r_out={r_out}"
        assert_close(first, expected, _norms(case), terms, what)
        if case.positive:
            _same_infinities([first], [expected], [what])

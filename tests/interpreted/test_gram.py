"""The Gram kernels, interpreted, with small tiles: samples that straddle blocks, fill them and share them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import checks, reference, segments
from gradnorm_kernels.backends.triton import gram, launch
from gradnorm_kernels.backends.triton.token_order import order
from gradnorm_kernels.segments import Segments
from gradnorm_kernels.tolerances import NORMS
from gradnorm_kernels.traps import Case, assert_close, packed, poisoned_memory
from gradnorm_kernels.tuning.tiles import KernelConfig

SMALL = KernelConfig("gram", 80, 4, 32, 32, 16, num_warps=4, num_stages=2, group_m=2)
LARGE = KernelConfig("gram", 80, 4, 128, 128, 64, num_warps=8, num_stages=2)
IDS = {"sample_ids": [3, 1, 0, 4, 2, 3, 4], "group_ids": [0, 2, 0, 2, 0, 3]}
LENGTHS = [5, 1, 70, 0, 33, 32, 9]


def prepared(case: Case) -> tuple[Tensor, Tensor, Segments]:
    arguments = (case.cu_seqlens, case.sample_ids, case.group_ids)
    batch = checks.fused_grad_norm(case.x, case.dy, *arguments, backends=("torch",))
    return case.x, case.dy, segments.device_segments(batch)


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    ids = {"sample_ids": case.sample_ids, "group_ids": case.group_ids}
    samples, groups, _, inner = reference.fused_grad_norm(case.x, case.dy, case.cu_seqlens, **ids, group_gram=True)
    assert inner is not None
    return samples, groups, inner


def sample_gram(case: Case) -> Tensor:
    samples = None if case.group_ids is None else len(case.group_ids)
    return reference.grad_gram(case.x, case.dy, case.cu_seqlens, sample_ids=case.sample_ids, num_samples=samples)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=-7.0), two.nan_to_num(nan=-7.0))


def check(case: Case, config: KernelConfig = SMALL) -> None:
    """Every launch of the module against the reference, in memory filled with NaN."""
    x, dy, segs = prepared(case)
    tolerance = NORMS[x.dtype]
    samples, groups, inner = truth(case)
    with poisoned_memory():
        norms, group_sq, group_gram = gram.pair_sums(x, dy, segs, True, config)
        again = gram.pair_sums(x, dy, segs, True, config)
        _, within, none = gram.pair_sums(x, dy, segs, False, config)
        pairs = gram.pair_gram(x, dy, segs.each_alone(), config)
    assert group_gram is not None and again[2] is not None and none is None
    assert same_bits(norms, again[0]) and same_bits(group_gram, again[2]), "other bits the second time"
    assert same_bits(group_gram, group_gram.T) and same_bits(pairs, pairs.T)
    finite = samples.isfinite()
    assert_close(norms, samples, tolerance)
    assert_close(norms[finite], samples[finite], tolerance, samples[finite])  # each by itself
    assert_close(group_sq, groups, tolerance)
    assert_close(group_gram, inner, tolerance)
    assert_close(within, groups, tolerance)
    assert_close(pairs, sample_gram(case), tolerance)


@pytest.fixture(autouse=True)
def small_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pair_sums`` takes its norms' config from the files: a small one here."""
    monkeypatch.setattr(gram, "config_for", lambda *_: SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_and_groups_across_blocks(dtype: torch.dtype) -> None:
    check(packed(LENGTHS, 19, 35, dtype, **IDS))


@pytest.mark.parametrize(
    "lengths, ids",
    [
        ([1], {}),
        ([31, 1, 32, 33], {}),
        ([3, 0, 0, 4, 0], {"group_ids": [0, 2, 2, 0, 1]}),
        ([40, 50, 40], {"sample_ids": [1, 0, 1], "group_ids": [1, 0]}),
    ],
)
def test_layouts(lengths: list[int], ids: dict[str, list[int]]) -> None:
    check(packed(lengths, 9, 16, torch.float32, **ids))


def test_more_samples_than_lanes() -> None:
    """Seventy samples of one token: more partial sums in a block than are computed at a time."""
    check(packed([1] * 70, 5, 3, torch.float32, group_ids=[0, 1] * 35))


def test_long_samples_in_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "config_for", lambda *_: LARGE)
    check(packed([300, 1, 130], 7, 50, torch.float32), LARGE)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("x", float("nan")),
        ("dy", float("inf")),
        pytest.param("x", float("inf"), marks=pytest.mark.slow),
        pytest.param("dy", float("nan"), marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_stays_in_its_sample_and_group(where: str, value: float) -> None:
    """The poisoned sample shares a block with neighbours on both sides."""
    case = packed([10, 40, 30, 20], 9, 8, torch.float32, sample_ids=[0, 1, 2, 1], group_ids=[0, 1, 2])
    getattr(case, where)[20, 3] = value
    check(case)
    assert truth(case)[0].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("longest", [0, 9, 33])
def test_longer_samples_are_left_out(longest: int) -> None:
    """They are zero, and what is in them is not looked at."""
    case = packed(LENGTHS, 19, 35, torch.float32, **IDS)
    x, dy, segs = prepared(case)
    samples = truth(case)[0]
    lengths = torch.zeros(len(samples), dtype=torch.int64).index_add_(0, segs.sample, segs.end - segs.start)
    x[6:76] = float("nan")  # the longest of all
    with poisoned_memory():
        norms = gram.sample_norms(x, dy, order(segs, len(x)), longest, SMALL)
    expected = torch.where(lengths <= longest, samples, 0.0)
    assert_close(norms, expected, NORMS[x.dtype])
    assert torch.equal(norms == 0, expected == 0)


def test_splits_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = packed([100, 90], 6, 7, torch.float32)
    x, dy, segs = prepared(case)
    for programs in (1, 12, 1000):
        monkeypatch.setattr(gram, "_PROGRAMS", programs)
        assert_close(gram.sample_norms(x, dy, order(segs, len(x)), len(x), SMALL), truth(case)[0], NORMS[x.dtype])


def test_strides_and_widths_that_need_a_copy_get_one() -> None:
    """Rows that overlap, lie apart, begin off a multiple of 16 bytes, or run the wrong way."""
    base = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, 15, 40])
    for x in (base[:, 16:32], base[:, 3:19], base[::1, ::4], base[:1, :16].expand(40, 16), base.T[:40, :16]):
        rows = launch.even_rows(x, 16)
        assert rows.data_ptr() % 16 == 0 and rows.stride(0) * 4 % 16 == 0 and rows.shape[1] % 16 == 0
        assert torch.equal(rows, x)
    check(Case(x, dy, offsets))
    assert launch.even_rows(base, 16).data_ptr() == base.data_ptr()
    assert torch.equal(launch.even_rows(base[:, :5], 16)[:, 5:], torch.zeros(40, 11))


def test_nothing_to_add_up() -> None:
    case = packed([0, 0], 4, 5, torch.float32)
    x, dy, segs = prepared(case)
    assert torch.equal(gram.sample_norms(x, dy, order(segs, 0), 10, SMALL), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(gram.pair_gram(x, dy, segs, SMALL), torch.zeros(2, 2, dtype=torch.float64))
    sums = gram.pair_sums(x, dy, segs, True, SMALL)
    assert [float(part.abs().sum()) for part in sums if part is not None] == [0.0, 0.0, 0.0]


def test_offsets_that_are_out_of_range_do_not_leave_the_arrays() -> None:
    """On a GPU wrong values are only reported afterwards: until then they must do no harm."""
    x, dy = torch.ones(50, 4), torch.ones(50, 4)
    wrong = Segments(
        torch.tensor([0, 60]), torch.tensor([3, 90]), *[torch.tensor([0, 1], dtype=torch.int32)] * 2, 2, 2, None
    )
    with poisoned_memory():
        positions = order(wrong, 50)
    assert int(positions.row.min()) >= 0 and int(positions.row.max()) < 50
    for spans in (positions.sample_span, positions.group_span):
        assert int(spans.min()) >= 0 and int(spans.max()) <= 50
    gram.pair_sums(x, dy, wrong, True, SMALL)

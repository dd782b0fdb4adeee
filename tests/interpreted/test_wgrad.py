"""Segmented wgrad on small tiles, so that a small call has many tiles, many K tiles and every kind of cut.

Three kernels run: with pointers (sm_80), with tensor descriptors (sm_90), and with nested loops (sm_100), which has
fewer forms. Every floating-point array that a kernel may write is full of NaN before the launch, every integer one full
of a number that is out of range everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import checks, reference
from gradnorm_kernels import segments as table
from gradnorm_kernels.backends.base import Results
from gradnorm_kernels.backends.triton import wgrad
from gradnorm_kernels.backends.triton.token_order import order
from gradnorm_kernels.backends.triton.wgrad_schedule import ShortSamples
from gradnorm_kernels.backends.triton.wgrad_sm100 import COMPILES, fitting_config
from gradnorm_kernels.tuning import costs, tiles
from gradnorm_kernels.tuning.tiles import KernelConfig

POINTERS = KernelConfig("wgrad", 80, 4, 16, 32, 16, 4, 3, 2)
DESCRIPTORS = replace(POINTERS, arch=90, descriptors=True)
NESTED = replace(DESCRIPTORS, arch=100)
KERNELS = pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["sm80", "sm90"])
ALL = 1 << 62
#: A sample in three places, samples and a group without rows, one token, 77 of them.
LENGTHS = [1, 0, 77, 13, 100, 97, 0, 13]
SAMPLES = [3, 1, 0, 5, 2, 3, 4, 7]
GROUPS = [0, 1, 0, 2, 2, 4, 0, 1]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty, empty = Tensor.new_empty, torch.empty

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            return tensor.fill_(255)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(1 << 30))

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))


def inputs(lengths: list[int], d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(cu_seqlens[-1])
    x = torch.randn(tokens, d_in, generator=generator).to(dtype)
    return x, torch.randn(tokens, d_out, generator=generator).to(dtype), cu_seqlens


def run(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor,
    sample_ids: list[int] | None = None,
    group_ids: list[int] | None = None,
    *,
    config: KernelConfig = POINTERS,
    splits: int | None = 1,
    programs: int = 3,
    gram_tokens: int = 0,
    workspace: int = 1 << 20,
    weight_grad: bool = True,
    group_gram: bool = True,
) -> Results:
    ids = [None if value is None else torch.tensor(value) for value in (sample_ids, group_ids)]
    batch = checks.fused_grad_norm(x, dy, cu_seqlens, *ids, backends=("triton",))
    plain = None if gram_tokens else table.plain_segments(batch)
    segments = table.device_segments(batch) if plain is None else plain
    launch = wgrad.Launch(config, programs, splits)
    short = None
    if not isinstance(segments, table.PlainSegments) and gram_tokens:
        none = torch.zeros(segments.samples, dtype=torch.float64)
        short = ShortSamples(gram_tokens, none, order(segments, len(x)).sample_span)
    return wgrad.wgrad(x, dy, segments, short, weight_grad, group_gram, workspace, launch)


def compare(
    x: Tensor,
    dy: Tensor,
    cu_seqlens: Tensor,
    sample_ids: list[int] | None = None,
    group_ids: list[int] | None = None,
    gram_tokens: int = 0,
    weight_grad: bool = True,
    group_gram: bool = True,
    **options: Any,
) -> Results:
    """Hold a run to the reference; samples of at most ``gram_tokens`` tokens must be 0."""
    wanted = {"weight_grad": weight_grad, "group_gram": group_gram}
    found = run(x, dy, cu_seqlens, sample_ids, group_ids, gram_tokens=gram_tokens, **wanted, **options)
    ids = {"sample_ids": sample_ids, "group_ids": group_ids}
    tensors = {name: torch.tensor(value) for name, value in ids.items() if value is not None}
    sample_sq, group_sq, total, gram = reference.fused_grad_norm(x, dy, cu_seqlens, **tensors, **wanted)
    of = torch.arange(len(cu_seqlens) - 1) if sample_ids is None else torch.tensor(sample_ids)
    lengths = torch.zeros(len(sample_sq), dtype=torch.int64).index_add_(0, of, cu_seqlens.diff())
    sample_sq = torch.where(lengths > gram_tokens, sample_sq, 0.0)
    near = {"rtol": 2e-5, "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(found.sample_sq, sample_sq, **near)
    torch.testing.assert_close(found.group_sq, group_sq, **near)
    assert (found.weight_grad is None, found.group_gram is None) == (total is None, gram is None)
    if found.weight_grad is not None and total is not None:
        assert found.weight_grad.dtype == x.dtype
        rounding = {torch.float32: 1e-5, torch.float16: 5e-4}[x.dtype]
        scale = float(total.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(found.weight_grad.double(), total, rtol=0, atol=rounding * scale, equal_nan=True)
    if found.group_gram is not None and gram is not None:
        scale = float(gram.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(found.group_gram, gram, rtol=0, atol=2e-5 * scale, equal_nan=True)
    return found


@KERNELS
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("gram_tokens", [0, 14, 99, ALL])
@pytest.mark.parametrize("groups", ["one", "several"])
def test_samples_in_several_places(config: KernelConfig, splits: int, gram_tokens: int, groups: str) -> None:
    """Not measured: none, those of 13 tokens at most, all but the one of 100, all."""
    x, dy, cu_seqlens = inputs(LENGTHS, 40, 8)
    ids = GROUPS if groups == "several" else None
    compare(x, dy, cu_seqlens, SAMPLES, ids, gram_tokens, config=config, splits=splits)


@KERNELS
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
def test_what_is_asked_for(config: KernelConfig, splits: int, wanted: tuple[bool, bool]) -> None:
    x, dy, cu_seqlens = inputs(LENGTHS, 40, 8, torch.float16)
    for ids in (None, GROUPS):
        options = {"weight_grad": wanted[0], "group_gram": wanted[1], "config": config, "splits": splits}
        compare(x, dy, cu_seqlens, SAMPLES, ids, **options)


@KERNELS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (31, 17), (67, 83)])
def test_widths(config: KernelConfig, splits: int, d_in: int, d_out: int) -> None:
    """Rows that are not aligned to 16 bytes go by pointers, whatever the config says."""
    x, dy, cu_seqlens = inputs([1, 33, 0, 16, 15], d_in, d_out)
    compare(x, dy, cu_seqlens, None, [0, 1, 1, 0, 2], config=config, splits=splits)


@KERNELS
@pytest.mark.parametrize("splits", [1, 7, None])
def test_lengths_that_are_no_powers_of_two(config: KernelConfig, splits: int | None) -> None:
    x, dy, cu_seqlens = inputs([777, 1, 1000, 0, 129], 24, 16, torch.float16)
    config = replace(config, block_k=64)
    compare(x, dy, cu_seqlens, config=config, splits=splits, programs=16)


@pytest.mark.parametrize("splits", [1, 3, 30])
@pytest.mark.parametrize("lengths", [[1], [40], [16, 16], [200, 5], [3] * 20])
def test_parts_of_any_size(lengths: list[int], splits: int) -> None:
    """One sample over many parts, many samples in one part, more parts than blocks."""
    x, dy, cu_seqlens = inputs(lengths, 8, 8)
    compare(x, dy, cu_seqlens, splits=splits)
    compare(x, dy, cu_seqlens, None, [i % 3 for i in range(len(lengths))], splits=splits)


@pytest.mark.parametrize("programs", [1, 5, 100])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_number_of_programs(programs: int, splits: int) -> None:
    x, dy, cu_seqlens = inputs([20, 50, 3], 70, 40)
    compare(x, dy, cu_seqlens, None, [1, 0, 1], programs=programs, splits=splits)


@pytest.mark.parametrize("workspace", [1, 3 * 512 * 2, 1 << 20])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_gram_of_groups_by_torch(workspace: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels may not hold the sums: one tile at a time, two, all."""
    monkeypatch.setattr(wgrad, "_SUMS_HELD", 0)
    x, dy, cu_seqlens = inputs([20, 50, 3, 41], 70, 40)
    compare(x, dy, cu_seqlens, None, [2, 0, 2, 1], workspace=workspace, splits=splits)


@pytest.mark.parametrize(
    ("config", "groups", "splits"),
    [
        pytest.param(
            config,
            groups,
            splits,
            marks=[pytest.mark.slow] * ((config is POINTERS) == (groups == 16)),
            id=f"{groups}-{splits}-sm{config.arch}",
        )
        for config in (POINTERS, DESCRIPTORS)
        for groups in (2, 16, 17)
        for splits in (1, 3)
    ],
)
def test_who_multiplies_the_sums_of_groups(
    config: KernelConfig, groups: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16 groups the kernels, whose programs take several tiles here; more groups torch, with the same result."""
    products = []
    monkeypatch.setattr(torch, "bmm", lambda a, b, bmm=torch.bmm: products.append(1) or bmm(a, b))
    x, dy, cu_seqlens = inputs([3, 20, *[1] * groups], 40, 24)
    ids = [*range(groups), 0, groups - 1]
    compare(x, dy, cu_seqlens, None, ids, config=config, splits=splits, programs=2, weight_grad=groups == 2)
    assert bool(products) == (groups == 17)


def test_every_sample_a_group() -> None:
    x, dy, cu_seqlens = inputs([20, 50, 0, 3, 41], 24, 40)
    found = compare(x, dy, cu_seqlens, None, [0, 1, 2, 3, 4], splits=2)
    assert torch.equal(found.sample_sq, found.group_sq)


@KERNELS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_inf_stay_in_their_sample_and_group(config: KernelConfig, splits: int, value: float) -> None:
    """The neighbours end inside the poisoned blocks; the sample comes back elsewhere, cut or not."""
    for where in (0, 1):
        data = inputs([20, 21, 20, 5], 24, 16)
        data[where][30, 3] = value
        found = run(*data, [0, 1, 2, 1], [0, 1, 0], config=config, splits=splits)
        assert found.sample_sq.isfinite().tolist() == [True, False, True]
        assert found.group_sq.isfinite().tolist() == [True, False]
        assert found.group_gram is not None
        assert found.group_gram.isfinite().tolist() == [[True, False], [False, False]]
        clean = inputs([20, 21, 20, 5], 24, 16)
        expected = reference.fused_grad_norm(*clean, sample_ids=torch.tensor([0, 1, 2, 1]))[0]
        torch.testing.assert_close(found.sample_sq[[0, 2]], expected[[0, 2]], rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("config", "splits", "where"),
    [
        pytest.param(
            config,
            splits,
            where,
            marks=[pytest.mark.slow] * (((splits == 1) == (where == "x")) != (config is POINTERS)),
            id=f"{where}-{splits}-sm{config.arch}",
        )
        for config in (POINTERS, DESCRIPTORS)
        for splits in (1, 3)
        for where in ("x", "dy")
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinity_does_not_meet_the_padding(config: KernelConfig, splits: int, where: str) -> None:
    """In widths that no tile divides: infinite where float64 is, NaN where float64 is, in every result.

    One group and several, a sample without tokens, samples whose norm is not measured, an infinity of each sign.
    """
    x, dy, cu_seqlens = inputs([20, 21, 0, 14, 5], 20, 24)
    (x if where == "x" else dy)[30, 3] = torch.inf if where == "x" else -torch.inf
    options: dict[str, Any] = {"config": config, "splits": splits}
    compare(x, dy, cu_seqlens, [0, 1, 3, 2, 1], **options)
    found = compare(x, dy, cu_seqlens, [0, 1, 3, 2, 1], [0, 1, 2, 0], gram_tokens=14, **options)
    assert found.sample_sq[1].isposinf() and found.group_sq[1].isposinf()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wgrad kernels that were launched, by name."""
    found: list[str] = []

    def watched(name: str) -> Any:
        kernel = getattr(wgrad, name)

        class Watched:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                found.append(name)
                return kernel[grid]

        return Watched()

    for name in ("wgrad_sm80_kernel", "wgrad_sm90_kernel", "wgrad_sm100_kernel"):
        monkeypatch.setattr(wgrad, name, watched(name))
    return found


needs_nested_loops = pytest.mark.skipif(not COMPILES, reason="this Triton runs the flat kernels on sm_100 too")


@needs_nested_loops
@pytest.mark.parametrize(
    ("gram_tokens", "weight_grad"),
    [(14, True), (0, False), *(pytest.param(*form, marks=pytest.mark.slow) for form in ((0, True), (ALL, True)))],
)
def test_nested_loops(launched: list[str], gram_tokens: int, weight_grad: bool) -> None:
    """A run is a sample in three places, or samples that are not measured; some have no tokens."""
    x, dy, cu_seqlens = inputs(LENGTHS, 40, 24)
    options: dict[str, Any] = {"gram_tokens": gram_tokens, "weight_grad": weight_grad, "config": NESTED}
    compare(x, dy, cu_seqlens, SAMPLES, **options)
    assert launched == ["wgrad_sm100_kernel"]


def test_what_nested_loops_lack_runs_on_the_flat_kernels(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, cu_seqlens = inputs([20, 21, 0, 14, 5], 20, 16)
    compare(x, dy, cu_seqlens, None, [0, 1, 0, 2, 1], config=NESTED)
    compare(x, dy, cu_seqlens, config=NESTED, splits=3)
    compare(x[:, 1:17], dy, cu_seqlens, config=NESTED)
    monkeypatch.setattr(wgrad, "COMPILES", False)
    compare(x, dy, cu_seqlens, config=NESTED)
    assert launched == ["wgrad_sm90_kernel", "wgrad_sm90_kernel", "wgrad_sm80_kernel", "wgrad_sm90_kernel"]


def test_a_tile_of_256_columns_is_for_widths_that_it_divides() -> None:
    config = tiles.kernel_config("", 100, "wgrad", 2, 4096, 4096)
    assert (config.block_m, config.block_n) == (128, 256)
    assert fitting_config(config, 11008, 2048) == config
    for d_in, d_out in ((11008 + 128, 2048), (11008, 2048 + 64)):
        narrow = fitting_config(config, d_in, d_out)
        assert narrow.nested and narrow.block_n == 128 and fitting_config(narrow, d_in, d_out) == narrow
        assert tiles.shared_memory_needed(narrow) <= costs.SHARED_MEMORY[100]


@needs_nested_loops
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nested_loops_in_other_respects(launched: list[str]) -> None:
    """Wide tiles and narrow matrices, long samples, an infinity beside the padding, no token, the same bits again."""
    wide = replace(NESTED, block_m=64, block_n=128, block_k=32)
    compare(*inputs([777, 1, 200, 0, 129], 24, 16, torch.float16), config=wide)
    x, dy, cu_seqlens = inputs([20, 21, 0, 14, 5], 20, 24)
    first, second = (run(x, dy, cu_seqlens, [0, 1, 3, 2, 1], config=NESTED) for _ in range(2))
    x[30, 3] = torch.inf
    compare(x, dy, cu_seqlens, [0, 1, 3, 2, 1], config=NESTED)
    for name in ("sample_sq", "group_sq", "weight_grad"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert set(launched) == {"wgrad_sm100_kernel"}


@pytest.mark.parametrize("config", [DESCRIPTORS, NESTED], ids=["sm90", "sm100"])
@pytest.mark.parametrize("blackwell", [True, False])
def test_maps_on_blackwell_begin_where_128_kib_begin(
    config: KernelConfig, blackwell: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver takes them for mapped. A small matrix is copied there, a small part of a large one is not."""
    mapped: list[Tensor] = []
    ragged = wgrad._ragged
    monkeypatch.setattr(wgrad, "_ragged", lambda tensor, *box: mapped.append(tensor) or ragged(tensor, *box))
    monkeypatch.setattr(wgrad, "_is_blackwell", lambda tensor: blackwell)
    small, dy, cu_seqlens = inputs(LENGTHS, 40, 8, torch.float16)
    large = torch.zeros(1 << 17, dtype=torch.float16)[8:].as_strided(small.shape, small.stride())
    for x in (small, large.copy_(small)):
        compare(x, dy, cu_seqlens, config=replace(config, element_bytes=2))
    behind = [tensor.untyped_storage().nbytes() - 2 * tensor.storage_offset() for tensor in mapped]
    assert [size >= 1 << 17 for size in behind] == [blackwell, blackwell, True, blackwell]
    assert [mapped[0] is small, mapped[1] is dy, mapped[2] is x] == [not blackwell, not blackwell, True]


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("tensor_memory", [True, False])
def test_tokens_are_not_split_where_triton_cannot_compile_it(
    tensor_memory: bool, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 on B200."""
    built: list[int] = []
    build = wgrad.build
    monkeypatch.setattr(wgrad, "build", lambda *args: built.append(args[4]) or build(*args))
    monkeypatch.setattr(wgrad, "has_tensor_memory", lambda tensor: tensor_memory)
    monkeypatch.setattr(wgrad, "COMPILES", compiles)
    x, dy, cu_seqlens = inputs([20, 21], 24, 16, torch.float16)
    compare(x, dy, cu_seqlens, None, [0, 1], config=replace(DESCRIPTORS, arch=90, element_bytes=2), splits=3)
    assert set(built) == {1 if tensor_memory and not compiles else 3}


@KERNELS
def test_tokens_that_cancel(config: KernelConfig) -> None:
    """The second half takes the first back, but for a thousandth: the digits that token pairs would lose are there."""
    x, dy, cu_seqlens = inputs([96, 30], 24, 16)
    x[48:96] = x[:48]
    dy[48:96] = -dy[:48] * (1 - 2**-10)
    wanted = reference.fused_grad_norm(x, dy, cu_seqlens)[0]
    assert wanted[0] < 1e-4 * wanted[1]
    for splits in (1, 3):
        found = run(x, dy, cu_seqlens, config=config, splits=splits)
        torch.testing.assert_close(found.sample_sq, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_zeros_of_either_sign(splits: int) -> None:
    x, dy, cu_seqlens = inputs([20, 21], 24, 16)
    dy[:20] = -0.0
    found = compare(x, dy, cu_seqlens, None, [0, 1], splits=splits)
    assert found.sample_sq[0] == 0
    assert found.group_sq[0] == 0


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_overlap_or_lie_apart(splits: int) -> None:
    _, dy, cu_seqlens = inputs([20, 21, 9], 24, 16)
    base = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    windows = base.view(-1).as_strided((50, 24), (8, 1))
    for x in (base[:1].expand(50, 24), base[::4][:50], base[:50, 4:20], windows):
        compare(x, dy, cu_seqlens, config=DESCRIPTORS, splits=splits)


@KERNELS
@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_bits_again(config: KernelConfig, splits: int) -> None:
    x, dy, cu_seqlens = inputs(LENGTHS, 40, 24)
    options: dict[str, Any] = {"config": config, "splits": splits}
    first, second = (run(x, dy, cu_seqlens, SAMPLES, GROUPS, **options) for _ in range(2))
    for name in ("sample_sq", "group_sq", "weight_grad", "group_gram"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_values_that_were_not_checked_stay_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the offsets are wrong, nothing may be read that is not there, and every result is NaN."""
    monkeypatch.setattr(table, "_on_host", lambda device: False)
    x, dy, _ = inputs([50], 24, 16)
    for offsets in ([0, 60, 20], [-5, 70, 90], [0, 0, 0], [7, 3, 50]):
        for more in ({}, {"sample_ids": [1, 0]}):  # with ids the table is made by torch
            found = run(x, dy, torch.tensor(offsets), splits=2, **more)
            assert found.weight_grad is not None and found.group_gram is not None
            assert found.sample_sq.isnan().all() and found.group_sq.isnan().all() and found.group_gram.isnan().all()
            assert found.weight_grad[0].isnan().all() and found.weight_grad[1:].isfinite().all()

"""The cuda backend's kernels, run on the host from their own sources (tests/cuda_host), against the float64 reference.

What is executed is everything but the GPU: the bindings, the launchers and the device code of ``segment_table.cu``,
``schedule.cu``, ``wgrad_norm_sm80.cu``, ``gram_sm80.cu`` and ``reduce.cu``. Reading out of bounds, a missing wait or
barrier and a race end a launch with an error. Every call of ``traps.check`` runs twice, under another order of blocks,
warps and arrivals, and must give the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gradnorm_kernels import checks, ops, reference, traps
from gradnorm_kernels.backends import Plan, cuda, native
from gradnorm_kernels.backends.cuda import schedule, segment_table, splits, wgrad
from gradnorm_kernels.backends.cuda.launch import old_driver, operand
from gradnorm_kernels.segments import PlainSegments, Segments
from gradnorm_kernels.tuning.tiles import CudaConfig, forced
from tests.cuda_host.backend import HostContext, host_context, install
from tests.cuda_host.build import Host, Tree
from tests.ops.sorted_segments import SEEDS, WRONG, check_sorted, check_wrong

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
VARIANTS = ({}, {"weight_grad": True}, {"group_gram": True}, {"weight_grad": True, "group_gram": True})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Host:
    objects = Path(pytestconfig.cache.mkdir("cuda_host"))  # type: ignore[union-attr]
    return Host(Tree(tmp_path_factory.mktemp("csrc"), objects).module())


@pytest.fixture
def context(host: Host, monkeypatch: pytest.MonkeyPatch) -> HostContext:
    context = host_context(host)
    install(monkeypatch, context)
    return context


# Every trap once in the default run, with the algorithms, variants and dtypes taking turns; all of them if asked for.
TURNS = [
    (trap, traps.ALGORITHMS[i % 3], VARIANTS[i % 4], FP16 if i % 5 == 2 else BF16) for i, trap in enumerate(traps.TRAPS)
]


@pytest.mark.parametrize(("trap", "algorithm", "wanted", "dtype"), TURNS, ids=[str(turn[0]) for turn in TURNS])
def test_traps(
    context: HostContext, trap: traps.Trap, algorithm: str, wanted: dict[str, bool], dtype: torch.dtype
) -> None:
    traps.check(trap.build(dtype), "cuda", algorithm, **wanted)


WIDER = [pytest.param(*turn, marks=[pytest.mark.slow] * (i % 4 != 1), id=str(turn[0])) for i, turn in enumerate(TURNS)]


@pytest.mark.parametrize(("trap", "algorithm", "wanted", "dtype"), WIDER)
def test_traps_on_the_wider_tile(
    context: HostContext, trap: traps.Trap, algorithm: str, wanted: dict[str, bool], dtype: torch.dtype
) -> None:
    if algorithm == "gram":
        algorithm = "wgrad"
    with forced(CudaConfig(80, 192)):
        traps.check(trap.build(dtype), "cuda", algorithm, **wanted)


@pytest.mark.parametrize("algorithm", traps.ALGORITHMS)
def test_pairs(context: HostContext, algorithm: str) -> None:
    traps.check_pairs(traps.ODD.build(BF16), "cuda", algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("algorithm", traps.ALGORITHMS)
@pytest.mark.parametrize("trap", traps.TRAPS, ids=str)
def test_traps_in_full(context: HostContext, trap: traps.Trap, algorithm: str, dtype: torch.dtype) -> None:
    for wanted in VARIANTS:
        traps.check(trap.build(dtype), "cuda", algorithm, **wanted)
    traps.check_pairs(trap.build(dtype), "cuda", algorithm)


@pytest.mark.parametrize("columns", [128, 192])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize(("d_in", "d_out"), [(73, 130), (128, 256), (136, 128)])
def test_an_infinity_is_no_nan(context: HostContext, where: str, d_in: int, d_out: int, columns: int) -> None:
    """A zero outside the matrix times an infinity is NaN there, and does not count: the norm is infinite."""
    case = traps.packed([20, 20, 130, 7], d_in, d_out, BF16, group_ids=[0, 1, 1, 0])
    getattr(case, where)[30, 5] = torch.inf
    with forced(CudaConfig(80, columns)):
        found = ops.fused_grad_norm(
            *(case.x, case.dy, case.cu_seqlens), group_ids=case.group_ids, algorithm="wgrad", backend="cuda"
        )
    assert found.sample_sq_norms.isinf().tolist() == [False, True, False, False]
    assert found.group_sq_norms.isinf().tolist() == [False, True]
    assert found.sample_sq_norms[0].isfinite() and found.group_sq_norms[0].isfinite()


def launches(context: HostContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launches from here on."""
    names: list[str] = []
    original = HostContext.launch

    def launch(self: HostContext, name: str, **fields: object) -> None:
        names.append(name)
        original(self, name, **fields)

    monkeypatch.setattr(HostContext, "launch", launch)
    return names


@pytest.mark.parametrize(
    ("lengths", "groups", "d_out", "multiprocessors", "whole_rows"),
    [
        # Few long samples: splits that end anywhere, sums of samples in the workspace.
        ([1500, 777], [0, 1], 24, 7, 0),
        # Many samples on a small weight: splits between samples.
        ([97, 60, 113] * 13, [0, 1, 1] * 13, 24, 7, 0),
        # A sample that goes on through the next split: that one is empty, and leaves nothing in the workspace.
        ([3] * 16 + [900] + [4] * 16, [0] * 33, 24, 7, 0),
        # Three tiles on two multiprocessors: the tokens of the last one are split.
        ([97, 60, 113] * 4, [0] * 12, 300, 2, 2),
        # The same with groups: whole rows have a running sum, and the group in the middle is in both splits.
        ([97, 0, 60, 113] * 4, [0] * 5 + [2] * 7 + [3] * 4, 300, 2, 2),
    ],
)
def test_splits(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    groups: list[int],
    d_out: int,
    multiprocessors: int,
    whole_rows: int,
) -> None:
    """Multiprocessors would have no tile: the tokens are split, and squares are taken of whole sums."""
    context = host_context(host, multiprocessors=multiprocessors)
    install(monkeypatch, context)
    names = launches(context, monkeypatch)
    chosen: list[splits.Split] = []
    choose = splits.choose

    def noted(*args: Any, **options: Any) -> splits.Split:
        chosen.append(choose(*args, **options))
        return chosen[-1]

    monkeypatch.setattr(splits, "choose", noted)
    case = traps.packed(lengths, 40, d_out, BF16, group_ids=groups)
    result = traps.check(case, "cuda", "wgrad", weight_grad=True)
    assert names[:4] == ["schedule", "wgrad_norm_sm80", "split_fixup", "finish"]
    assert chosen[-1].whole_rows == whole_rows and chosen[-1].parts > 1
    assert chosen[-1].anywhere == (len(lengths) == 2)
    # No split: the same numbers from the plain way.
    monkeypatch.setattr(splits, "choose", lambda arch, tile_rows, *_, **__: splits.Split(tile_rows, 1, False, 1.0, 1.0))
    del names[:]
    plain = ops.fused_grad_norm(
        case.x, case.dy, case.cu_seqlens, group_ids=case.group_ids, weight_grad=True, algorithm="wgrad", backend="cuda"
    )
    assert "split_fixup" not in names
    torch.testing.assert_close(plain.sample_sq_norms, result.sample_sq_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(plain.group_sq_norms, result.group_sq_norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [3, 12, 13])
def test_the_groups_gram_with_a_small_workspace(
    context: HostContext, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    """Where the workspace would be too large, the rows of the weight are taken in several passes.

    The inner products of up to FIXUP_GROUPS groups are the fix-up's, those of more come from their stored sums.
    """
    names = launches(context, monkeypatch)
    copies = groups if groups <= context.module.FIXUP_GROUPS else 2 * groups
    monkeypatch.setattr(wgrad, "WORKSPACE", copies * 4 * 70 * 130)
    products: list[bool] = []
    original = wgrad.split_fixup

    def fixup(*args: Any, **options: Any) -> Any:
        products.append(options["products"])
        return original(*args, **options)

    monkeypatch.setattr(wgrad, "split_fixup", fixup)
    ids = [*range(groups), 1]
    lengths = (
        [30, 7, 64, 50] if groups == 3 else [9, 9, 40, 9, 0] + [5] * (groups - 4)
    )  # the fourth group has no tokens
    case = traps.packed(lengths, 70, 300, BF16, group_ids=ids)
    traps.check(case, "cuda", "wgrad", weight_grad=True, group_gram=True)
    assert names.count("wgrad_norm_sm80") == 2 * 3
    assert products == [groups <= 12] * 6


def test_products_of_too_many_groups_are_refused(context: HostContext) -> None:
    buffers = ("workspace", "split_start", "split_first", "split_last", "outer", "group_sq", "products")
    fields = dict.fromkeys(buffers, torch.zeros(200, dtype=torch.int32))
    none = dict.fromkeys(("inner_sample", "sample_sq", "sums", "weight_grad"))
    sizes = {"elements": 8, "width": 8, "samples": 0, "type": 1, "groups": 13, "inner": 13}
    with pytest.raises(RuntimeError, match="^split_fixup: products are of at most 12 groups"):
        context.launch("split_fixup", **fields, **none, **sizes)


@pytest.mark.parametrize(
    ("offsets", "dtype", "algorithm"),
    [
        ([1, 5, 11, 18], torch.int32, "wgrad"),
        ([0, 5, 11, 17], torch.int64, "gram"),
        ([0, 12, 11, 18], torch.int32, "gram"),
        ([0, -1, 11, 18], torch.int64, "wgrad"),
        ([0, 5, 1 << 40, 18], torch.int64, "wgrad"),
        ([0, 5, 19, 18], torch.int32, "wgrad"),
        ([0, 540, 530, 600], torch.int32, "wgrad"),  # the tokens are split
    ],
)
def test_wrong_offsets_on_the_device_make_nan(
    host: Host, monkeypatch: pytest.MonkeyPatch, offsets: list[int], dtype: torch.dtype, algorithm: str
) -> None:
    """The prologue checks cu_seqlens that nobody reads on the host. Results are NaN: of dW the first row."""
    install(monkeypatch, host_context(host, multiprocessors=5))
    tokens = 600 if offsets[-1] == 600 else 18
    case = traps.packed([5, 6, tokens - 11], 16, 24, BF16)
    plain = PlainSegments(torch.tensor(offsets, dtype=dtype), 0, tokens, 3)
    monkeypatch.setattr(cuda, "plain_segments", lambda *_: plain)
    wanted = {"weight_grad": algorithm == "wgrad", "group_gram": algorithm == "gram"}
    result = ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, **wanted, algorithm=algorithm, backend="cuda")
    assert result.sample_sq_norms.isnan().all() and result.group_sq_norms.isnan().all()
    if result.weight_grad is not None:
        assert result.weight_grad[:1].isnan().all() and result.weight_grad[1:].isfinite().all()
    assert result.group_gram is None or result.group_gram.isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_segments_are_sorted_by_group_and_sample(context: HostContext, seed: int) -> None:
    check_sorted(segment_table.sort, seed)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_value_out_of_range_is_seen(context: HostContext, wrong: str) -> None:
    check_wrong(segment_table.sort, wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_right_offsets_on_the_device_are_taken(
    context: HostContext, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case = traps.packed([5, 0, 6, 7], 16, 24, BF16)
    expected = reference.fused_grad_norm(case.x, case.dy, case.cu_seqlens, weight_grad=True)
    # A slice starts where no vector of 16 bytes does.
    plain = PlainSegments(torch.tensor([9, 0, 5, 5, 11, 18], dtype=dtype)[1:], 0, 18, 4)
    monkeypatch.setattr(cuda, "plain_segments", lambda *_: plain)
    result = ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, weight_grad=True, backend="cuda")
    for found, truth in zip(result[:3], expected[:3], strict=True):
        assert truth is not None
        torch.testing.assert_close(found.double(), truth.double(), rtol=1e-2, atol=0.05)


def test_a_wrong_value_on_the_device_makes_nan(context: HostContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index values that nobody reads on the host are clamped, and results are NaN: of dW the first row."""
    case = traps.packed([5, 6, 7], 16, 24, BF16)
    monkeypatch.setattr(cuda, "plain_segments", lambda *_: None)
    segments = Segments(
        torch.tensor([0, 5, 5]),
        torch.tensor([5, 5, 18]),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        3,
        1,
        torch.tensor(False),
    )
    monkeypatch.setattr(cuda, "device_segments", lambda *_: segments)
    result = ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, weight_grad=True, group_gram=True, backend="cuda")
    assert result.sketches is None, "not asked for"
    for name, tensor in zip(result._fields, result[:4], strict=False):
        assert tensor is not None and tensor[:1].isnan().all(), name
        assert name == "weight_grad" or tensor.isnan().all(), name


@pytest.mark.parametrize("algorithm", ["wgrad", "gram"])
def test_more_than_two_to_the_31_elements(context: HostContext, algorithm: str) -> None:
    """Offsets of 64 bits: the rows of x lie far apart, and only a few of their elements are ever touched."""
    tokens, lengths = 2100, [700, 1, 1300, 99]
    x = torch.empty(tokens, 1 << 20, dtype=BF16)[:, :16]
    x.copy_(torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)))
    case = replace(traps.packed(lengths, 16, 24, BF16), x=x)
    result = ops.fused_grad_norm(
        case.x, case.dy, case.cu_seqlens, weight_grad=algorithm == "wgrad", algorithm=algorithm, backend="cuda"
    )
    expected = reference.fused_grad_norm(case.x, case.dy, case.cu_seqlens)
    torch.testing.assert_close(result.sample_sq_norms, expected[0], rtol=2e-5, atol=0)
    torch.testing.assert_close(result.group_sq_norms, expected[1], rtol=2e-5, atol=0)


@pytest.mark.parametrize("columns", [128, 192])
def test_no_bank_conflicts(context: HostContext, columns: int) -> None:
    """ldmatrix gets its eight rows in one turn."""
    case = traps.packed([70, 3, 40], 200, 136, BF16)
    conflicts = []
    original = context.module

    class Counting:
        def __getattr__(self, name: str) -> object:
            function = getattr(original, name)
            if name not in ("wgrad_norm_sm80", "gram_sm80"):
                return function

            def call(**fields: object) -> None:
                function(**fields)
                conflicts.append(context.host.bank_conflicts())

            return call

    object.__setattr__(context, "module", Counting())
    with forced(CudaConfig(80, columns)):
        ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, algorithm="gram", weight_grad=True, backend="cuda")
    assert conflicts == [0, 0]


def test_a_tile_that_is_not_compiled_is_refused(context: HostContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the choice, before anything is launched; and by the launch itself, which names the widths."""
    case = traps.packed([5, 6], 16, 24, BF16)
    with forced(CudaConfig(80, 256)), pytest.raises(ValueError, match=r"one of \[128, 192\] on sm_80.* got 256"):
        ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, algorithm="wgrad", backend="cuda")
    monkeypatch.setattr(wgrad, "cuda_config", lambda *_: CudaConfig(80, 64))
    with pytest.raises(RuntimeError, match="wgrad_norm_sm80: block_n must be 128 or 192"):
        ops.fused_grad_norm(case.x, case.dy, case.cu_seqlens, algorithm="wgrad", backend="cuda")


def test_more_blocks_than_a_grid_has(context: HostContext) -> None:
    """An error, not the grid that the number's low 32 bits stand for."""
    tensors = dict.fromkeys(("x", "dy", "token_row", "token_rank", "count", "partial"))
    sizes = {"x_stride": 8, "dy_stride": 8, "type": 1, "d_in": 8, "d_out": 8, "partials": 100_000, "pairwise": True}
    with pytest.raises(RuntimeError, match=r"^gram_sm80: more than 2\^31 - 1 blocks"):
        context.launch("gram_sm80", **tensors, **sizes, tokens=64 << 16, reach=1 << 16)
    with pytest.raises(RuntimeError, match="^finish: more than 46340 partial sums per side"):
        context.launch("finish", **finish_fields(pairs=torch.zeros(1), partials=46342))


def finish_fields(**fields: object) -> dict[str, object]:
    """The arguments of the epilogue of one sample and one group, whose squared norm is absent."""
    tensors = ("wgrad_samples", "wgrad_groups", "fixup_samples", "fixup_groups", "gram_samples", "sample_span")
    tensors += ("gram_groups", "group_span", "pairs", "products", "group_gram", "weight_grad")
    sizes = ("wgrad_rows", "wgrad_group_rows", "fixup_rows", "sample_reach", "group_reach", "partials", "slabs", "d_in")
    state, info = torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    out = {name: torch.zeros(1, dtype=torch.float64) for name in ("sample_sq", "group_sq")}
    flags = {"first": True, "last": True, "samples": 1, "groups": 1}
    return {**dict.fromkeys(tensors), **dict.fromkeys(sizes, 0), **out, **flags, "state": state, "info": info, **fields}


def test_the_driver_is_asked_for_its_version(host: Host) -> None:
    assert host.module.driver_version() == 13000


def test_a_failed_launch_says_which(context: HostContext) -> None:
    """An error of the device is an exception that names the launch: here, a buffer that is too short."""
    short = torch.zeros(0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="^finish: global write of 8 bytes .* outside of every buffer"):
        context.launch("finish", **finish_fields(sample_sq=short))
    fields = finish_fields()
    del fields["samples"]
    with pytest.raises(TypeError, match="missing argument: samples"):
        context.launch("finish", **fields)
    with pytest.raises(TypeError, match="an argument was given that the launch does not take"):
        context.launch("finish", **finish_fields(rows=3))


def test_without_a_device_a_launch_says_which() -> None:
    if native.cuda_unavailable_reason() is not None or torch.cuda.is_available():
        pytest.skip(native.cuda_unavailable_reason() or "there is a device")
    pointers = dict.fromkeys(("values", "token_row", "sample_span", "info", "out"), 0)
    with pytest.raises(RuntimeError, match="^token_sums: "):
        native.module().token_sums(**pointers, samples=1, stream=0)


@pytest.mark.parametrize("tokens", [1, 6])
def test_operands_are_copied_only_where_rows_are_not_aligned(tokens: int) -> None:
    wide = torch.randn(tokens, 48).to(BF16)
    assert operand(wide).data_ptr() == wide.data_ptr()
    assert operand(wide[:, 8:45]).data_ptr() == wide[:, 8:].data_ptr()
    shifted = wide[:, 1:20]
    assert operand(shifted).data_ptr() != shifted.data_ptr() and torch.equal(operand(shifted), shifted)
    narrow = torch.randn(tokens, 13).to(BF16)
    aligned = operand(narrow)
    assert torch.equal(aligned, narrow) and (tokens == 1 or aligned.stride(0) % 8 == 0)


def segments(lengths: list[int], sample: list[int], group: list[int]) -> Segments:
    ends = torch.tensor(lengths).cumsum(0)
    ids = (torch.tensor(values, dtype=torch.int32) for values in (sample, group))
    return Segments(ends - torch.tensor(lengths), ends, *ids, max(sample) + 1, max(group) + 1, None)


def test_a_row_expanded_over_tokens_is_copied() -> None:
    row = torch.randn(1, 64).to(torch.bfloat16)
    copied = operand(row.expand(7, 64))
    assert copied.stride(0) == 64 and torch.equal(copied, row.expand(7, 64))
    assert operand(row).data_ptr() == row.data_ptr()


def test_a_driver_older_than_the_toolkit_is_named() -> None:
    assert old_driver("13.0", 13000) is None and old_driver("12.8", 13020) is None
    said = old_driver("13.0", 12080)
    assert said is not None and "built with CUDA 13.0 and the driver is for CUDA 12.8: update the driver" in said


Piece = tuple[int, int, int]


def pieces(tables: schedule.WgradTables) -> list[list[Piece]]:
    """(first row, row after the last, inner sum) of each segment, by splits."""
    columns = (table.tensor().tolist() for table in (tables.start, tables.end, tables.group))
    found = list(zip(*columns, strict=True))
    begins = tables.split_start.tensor().tolist()
    assert begins[0] == 0
    return [found[a:b] for a, b in pairwise(begins)]


def test_splits_end_between_samples(context: HostContext) -> None:
    given = segments([10, 0, 30, 5, 5, 50], [0, 0, 1, 1, 2, 4], [0, 0, 0, 0, 1, 1])
    made = schedule.build(context, replace(given, groups=3), 100, CPU, gram_tokens=0, splits=3, stored=True)
    assert made.wgrad is not None and made.fixup is not None
    # Cuts at 0, 33, 66: samples begin at 0, 10, 45 and 50.
    assert pieces(made.wgrad) == [
        [(0, 10, 0), (10, 40, 0), (40, 45, 0)],
        [(45, 50, 1), (50, 100, 1)],
        [],
    ]
    assert made.fixup.first.tensor().tolist() == [0, 1, 1] and made.fixup.last.tensor().tolist() == [0, 1, 0]
    assert made.fixup.outer.tensor().tolist() == [0, 1, 2] and made.fixup.sample is None
    assert made.state.tensor().tolist() == [1, 1, 1, 0, 1, 2, 2, 0], "sample 3 and group 2 are absent"
    assert made.info.tensor().tolist() == [1, 0]


def test_splits_anywhere_cut_samples(context: HostContext) -> None:
    given = segments([70, 0, 20, 10], [0, 1, 2, 2], [0, 0, 0, 0])
    made = schedule.build(context, given, 100, CPU, gram_tokens=0, splits=4, anywhere=True, stored=True)
    assert made.wgrad is not None and made.fixup is not None and made.fixup.sample is not None
    # Inner sums are those of the samples that have rows.
    assert pieces(made.wgrad) == [
        [(0, 25, 0)],
        [(25, 50, 0)],
        [(50, 70, 0), (70, 75, 1)],
        [(75, 90, 1), (90, 100, 1)],
    ]
    assert made.wgrad.sample.tensor()[:6].tolist() == [-1] * 6
    assert made.fixup.first.tensor().tolist() == [0, 2, 1] and made.fixup.last.tensor().tolist() == [2, 3, 0]
    assert made.fixup.sample.tensor().tolist() == [0, 2, -1] and made.fixup.outer.tensor().tolist() == [0, 0, 0]
    assert made.state.tensor().tolist() == [2, 0, 2, 2]


def test_short_samples_are_for_the_gram(context: HostContext) -> None:
    given = segments([3, 40, 0, 2, 5, 30], [0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1])
    made = schedule.build(context, given, 80, CPU, gram_tokens=7, splits=1, samples_by_gram=True)
    assert made.wgrad is not None and made.tokens is not None and made.tokens.sample_rank is not None
    assert made.state.tensor().tolist() == [3, 1, 3, 1, 1, 1] and made.info.tensor().tolist() == [1, 10]
    assert made.wgrad.sample.tensor()[:5].tolist() == [-1, 1, -1, -1, 3]
    assert made.tokens.row.tensor()[:10].tolist() == [0, 1, 2, 43, 44, 45, 46, 47, 48, 49]
    assert made.tokens.sample_rank.tensor()[:10].tolist() == [0] * 3 + [2] * 7
    spans = made.tokens.sample_span.tensor().view(4, 3).tolist()
    assert spans[0] == [0, 3, 0] and spans[2] == [3, 10, 2]


@pytest.mark.parametrize("splits", [1, 5])
def test_more_segments_than_threads(context: HostContext, splits: int) -> None:
    """Sums over the block go on from one round of segments to the next."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (700,), generator=draw).tolist()
    given = segments(lengths, [i // 2 for i in range(700)], [i // 100 for i in range(700)])
    tokens = sum(lengths)
    made = schedule.build(context, given, tokens, CPU, gram_tokens=0, splits=splits, stored=splits > 1)
    assert made.wgrad is not None
    flat = [piece for split in pieces(made.wgrad) for piece in split]
    starts = [sum(lengths[:i]) for i in range(700)]
    assert flat == [(a, a + n, i // 100) for i, (a, n) in enumerate(zip(starts, lengths, strict=True)) if n]
    sample_begins = [starts[i - i % 2] for i, n in enumerate(lengths) if n]
    cuts = [p * tokens // splits for p in range(splits)]
    expected = [sum(begin >= cut for cut in cuts) - 1 for begin in sample_begins]
    assert [p for p, split in enumerate(pieces(made.wgrad)) for _ in split] == expected


@pytest.mark.parametrize(
    ("device", "dtype", "text"),
    [
        ("cuda", torch.float32, "bfloat16 and float16, not float32: use backend='triton' or backend='torch'"),
        ("cuda", torch.float64, "not float64"),
        ("cpu", BF16, "on a CUDA device, not on 'cpu'"),
    ],
)
def test_what_it_does_not_take(device: str, dtype: torch.dtype, text: str) -> None:
    assert text in str(cuda.BACKEND.unsupported_reason(device, dtype))
    assert (
        cuda.BACKEND.unsupported_reason("cuda", BF16) is None and cuda.BACKEND.unsupported_reason("cuda", FP16) is None
    )


def test_more_tokens_than_can_be_counted() -> None:
    x = torch.empty(1, 1, dtype=BF16).expand(2**31, 1)
    batch = checks.grad_gram(x, x, None, None, 1, "gram", "cuda", backends=("cuda",))
    with pytest.raises(ValueError, match="fewer than 2\\^31 - 1024 tokens"):
        cuda.grad_gram(batch, Plan("cuda", 0, "gram", 1, 1))

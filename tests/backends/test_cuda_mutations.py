"""The host execution must notice what is wrong: each entry breaks the kernels once and says what caught it.

A mutation is a change of the text of csrc in a copy, compiled for the host. If one goes unnoticed, either the tests do
not reach the place, or the line is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gradnorm_kernels import ops, reference, traps
from gradnorm_kernels.backends.cuda import segment_table
from gradnorm_kernels.tolerances import NORMS, WEIGHT_GRAD
from gradnorm_kernels.tuning.tiles import CudaConfig, forced
from tests.cuda_host.backend import host_context, install
from tests.cuda_host.build import Host, Patch, Tree
from tests.ops.sorted_segments import check_sorted

WGRAD, GRAM, REDUCE, SEGMENTS = "wgrad_norm_sm80.cu", "gram_sm80.cu", "reduce.cu", "device/segments.cuh"
SCHEDULE, TABLE = "schedule.cu", "segment_table.cu"
COPY, RACE, WRONG = "before the copy into it", "race at shared", "wrong"

MUTATIONS = {
    # Pipeline of the weight-gradient pass.
    "no wait for the copies": (
        Patch(WGRAD, r"copy_wait<C::kStages - 2>\(\);(\s+)sync_block\(\);(\s+)collect", r"\1sync_block();\2collect"),
        COPY,
    ),
    "wait for one group too few": (
        Patch(WGRAD, r"copy_wait<C::kStages - 2>(\(\);\s+sync_block\(\);\s+collect)", r"copy_wait<C::kStages - 1>\1"),
        COPY,
    ),
    "no barrier between K tiles": (Patch(WGRAD, r"sync_block\(\);(\s+collect\(step\);)", r"\1"), COPY),
    "no barrier before the last sums": (Patch(WGRAD, r"sync_block\(\);(\s+collect\(step \+ 1\);)", r"\1"), RACE),
    "notes overwritten too soon": (Patch(WGRAD, r"kNotes = 2 \* kStages", "kNotes = kStages"), RACE),
    "one place for the sums of two steps": (
        Patch(WGRAD, r"step % 2 \* \(2 \* kWarps \* 4\) \+ warp", "0 * (2 * kWarps * 4) + warp"),
        RACE,
    ),
    # The wider tile has one set of fragments, and reads a stage to its end before it leaves it.
    "a stage is left before it is read": (
        Patch(WGRAD, r"\} else \{(\n#pragma unroll\n      for \(int tokens.*?)leave\(\);", r"} else { leave();\1"),
        f"{RACE}|while a copy into it|{COPY}",
    ),
    "columns of x in another place": (Patch(WGRAD, r"\+ x_at\[pair\]", "+ x_at[pair % 2]"), WRONG),
    # Indices and masks.
    "a row too many": (
        Patch(WGRAD, r"row < cursor_\.rows \?", "row <= cursor_.rows ?"),
        f"outside of every buffer|{WRONG}",
    ),
    "columns not masked": (
        Patch(WGRAD, r"max\(0, min\(16, 2 \* \(columns - at\)\)\)", "16"),
        f"outside of every buffer|{WRONG}",
    ),
    "matrices in another order": (
        Patch(WGRAD, r"chunk_at<C::kXBytes>\(r \+ q % 2 \* 8", "chunk_at<C::kXBytes>(r + q / 2 * 8"),
        WRONG,
    ),
    "the group's sum is not started afresh": (
        Patch(WGRAD, r"pair\[0\] = pair\[1\] = pair\[2\] = pair\[3\] = 0\.0f;", ""),
        WRONG,
    ),
    "a sample's end inside a sample": (
        Patch(SEGMENTS, r" \|\| next_\.sample != now_\.sample\) ends", r" || true) ends"),
        WRONG,
    ),
    "a whole tile with the segments of a split": (
        Patch(SEGMENTS, r"split < 0 \? splits : split \+ 1", "max(split, 0) + 1"),
        WRONG,
    ),
    "split tiles placed among the whole ones": (
        Patch(SEGMENTS, r"whole \? 0 : whole_rows", "0"),
        f"outside of every buffer|write the same|{WRONG}",
    ),
    "rows above the workspace counted": (
        Patch("device/tile_sums.cuh", r"rows, args\.d_in, row - above", "rows, args.d_in, row"),
        f"outside of every buffer|{WRONG}",
    ),
    "whole rows left out of a group's norm": (
        Patch(REDUCE, r"if \(args\.wgrad_groups != nullptr\)", "if (state == kWgrad)"),
        WRONG,
    ),
    "rows that do not touch are one run": (Patch(SEGMENTS, r" && start == segment\.end", ""), WRONG),
    # The Gram.
    "Gram: no wait": (Patch(GRAM, r"copy_wait<kStages - 2>\(\);", ""), COPY),
    "Gram: terms written over a stage in use": (
        Patch(GRAM, r"(reads these any more\.)\n  sync_block\(\);", r"\1\n"),
        RACE,
    ),
    "Gram: sums of columns read too soon": (Patch(GRAM, r"sync_block\(\);(\s+const int column)", r"\1"), RACE),
    "Gram: the neighbour's terms count": (
        Patch(GRAM, r" else if \(rank == own\) \{\s+break;\s+\}", ""),
        WRONG,
    ),
    # The prologue.
    "segments read too soon": (
        Patch(SCHEDULE, r"(collect\(args, valid, filled, turn\);)\s+sync_block\(\);", r"\1"),
        "that another thread of this launch writes, no barrier between|outside of every buffer",
    ),
    "one place for two scans": (Patch(SCHEDULE, r"turn\+\+ % 2 \* \(kWarps \* 8\)", "0"), RACE),
    "a sample's last piece is left out": (
        Patch(SCHEDULE, r"split <= part\.last; \+\+split, \+\+to", "split < part.last; ++split, ++to"),
        f"outside of every buffer|{WRONG}",
    ),
    # The table of segments from ids on the device.
    "a segment comes before itself": (
        Patch(TABLE, r" && at < mine\)", ")"),
        f"outside of every buffer|{WRONG}",
    ),
    "places added up too soon": (
        Patch(TABLE, r"sync_block\(\);(\s+if \(warp > 0\) return;)", r"\1"),
        f"{RACE}|nobody wrote",
    ),
    # Reductions.
    "no barrier before the epilogue's sums": (
        Patch(REDUCE, r"sync_block\(\);(\s+if \(threadIdx\.x >= kColumns)", r"\1"),
        f"{RACE}|nobody wrote",
    ),
    "the diagonal counts twice": (Patch(REDUCE, r"offset == 0 \? 1\.0 : 2\.0", "2.0"), WRONG),
    "one place for two sums of a block": (Patch(REDUCE, r"turn % 2 \* \(kWarps \* 4\)", "0"), RACE),
    "products of warps read too soon": (
        Patch(REDUCE, r"sync_block\(\);(\s+for \(int i = threadIdx\.x; i < groups_)", r"\1"),
        f"{RACE}|nobody wrote",
    ),
    "one place for the products of two pairs": (Patch(REDUCE, r"\(pairs\(b\) \+ a\)", "pairs(b)"), WRONG),
    "a split's part is left out": (Patch(REDUCE, r"split <= last; \+\+split", "split < last; ++split"), WRONG),
}

#: Caught in the same way as another entry.
SLOW = {
    *("wait for one group too few", "no barrier between K tiles", "notes overwritten too soon", "columns not masked"),
    *("one place for the sums of two steps", "the group's sum is not started afresh", "Gram: no wait"),
    *("matrices in another order", "a row too many", "one place for two sums of a block"),
    *("a sample's end inside a sample", "Gram: terms written over a stage in use"),
    *("rows that do not touch are one run", "Gram: the neighbour's terms count", "the diagonal counts twice"),
    *("a stage is left before it is read", "columns of x in another place"),
    *("split tiles placed among the whole ones", "rows above the workspace counted"),
    *("one place for two scans", "a sample's last piece is left out", "no barrier before the epilogue's sums"),
}


def fault(monkeypatch: pytest.MonkeyPatch, host: Host) -> str:
    """The first fault that these kernels show: a launch's error, or which result is wrong; empty: none."""
    install(monkeypatch, host_context(host))
    try:
        check_sorted(segment_table.sort, 2)
    except (AssertionError, RuntimeError) as error:
        return str(error) if isinstance(error, RuntimeError) else "wrong order of segments"
    several = traps.packed(
        [33, 5, 0, 64, 100, 3, 40],
        200,
        136,
        torch.bfloat16,
        sample_ids=[0, 0, 1, 2, 3, 1, 4],
        group_ids=[0, 1, 0, 1, 1],
    )
    split = traps.packed([300, 500], 40, 24, torch.float16, group_ids=[0, 0])
    gaps = traps.packed([3, 4, 40, 5], 24, 16, torch.bfloat16, group_ids=[0, 1, 0, 0])
    plain = traps.packed([3, 2], 16, 16, torch.bfloat16)  # the prologue checks cu_seqlens
    # Two rows of tiles are whole, the third one is split.
    rest = traps.packed([97, 60, 113] * 4, 40, 300, torch.bfloat16, group_ids=[0] * 5 + [1] * 7)
    for case, multiprocessors, algorithm, columns in (
        *((several, 2, "wgrad", 128), (several, 2, "gram", 128)),
        *((split, 5, "wgrad", 128), (rest, 2, "wgrad", 128), (gaps, 1, "gram", 128), (plain, 1, "wgrad", 128)),
        (several, 2, "wgrad", 192),
    ):
        install(monkeypatch, host_context(host, multiprocessors=multiprocessors))
        ids = {"sample_ids": case.sample_ids, "group_ids": case.group_ids, "weight_grad": True}
        call = (case.x, case.dy, case.cu_seqlens)
        try:
            with traps.poisoned_memory(), forced(CudaConfig(80, columns)):
                found = ops.fused_grad_norm(*call, **ids, algorithm=algorithm, backend="cuda")
                gram = ops.grad_gram(*call, sample_ids=case.sample_ids, algorithm=algorithm, backend="cuda")
        except RuntimeError as error:
            return str(error)
        truth = (*reference.fused_grad_norm(*call, **ids)[:3], reference.grad_gram(*call, sample_ids=case.sample_ids))
        names = ("sample_sq_norms", "group_sq_norms", "weight_grad", "gram")
        for name, actual, expected in zip(names, (*found[:3], gram), truth, strict=True):
            tolerance = (WEIGHT_GRAD if name == "weight_grad" else NORMS)[case.x.dtype]
            try:
                traps.assert_close(actual, expected, tolerance)
            except AssertionError:
                return f"wrong {name}"
    return ""


def compiled(tmp_path: Path, config: pytest.Config, *patches: Patch) -> Host:
    objects = Path(config.cache.mkdir("cuda_host"))  # type: ignore[union-attr]
    return Host(Tree(tmp_path, objects, patches, flags=("-O1",)).module(without="wgrad_norm_sm90"))


def test_the_kernels_as_they_are(tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault(monkeypatch, compiled(tmp_path, pytestconfig)) == ""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MUTATIONS])
def test_a_broken_kernel_is_caught(
    tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    patch, caught = MUTATIONS[name]
    found = fault(monkeypatch, compiled(tmp_path, pytestconfig, patch))
    assert re.search(caught, found), f"caught by: {found or 'nothing'}"

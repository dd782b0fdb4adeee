"""The schedule of segmented wgrad against a few lines of plain Python."""

from __future__ import annotations

import random
from itertools import accumulate, groupby, pairwise

import pytest
import torch

from gradnorm_kernels.backends.triton import wgrad_schedule
from gradnorm_kernels.backends.triton.token_order import order
from gradnorm_kernels.backends.triton.wgrad_schedule import ShortSamples
from gradnorm_kernels.segments import PlainSegments, Segments

Row = tuple[int, int, int, int]
SAMPLE_ENDS, UNMEASURED_ENDS, GROUP_ENDS = 1, 2, 4


def expected(rows: list[Row], gram_tokens: int, block_k: int) -> list[tuple[int, int, int, int, int]]:
    """(first row, rows, flags, sample, group) of each K tile, for segments (start, end, sample, group) in order."""
    lengths: dict[int, int] = {}
    for start, end, sample, _ in rows:
        lengths[sample] = lengths.get(sample, 0) + end - start
    merged: list[list[int]] = []
    for start, end, sample, group in rows:
        measured = sample if lengths[sample] > gram_tokens else -1
        if start < end and merged and merged[-1][1:] == [start, measured, group]:
            merged[-1][1] = end
        elif start < end:
            merged.append([start, end, measured, group])
    k_tiles = []
    for number, (start, end, measured, group) in enumerate(merged):
        _, _, next_measured, next_group = merged[number + 1] if number + 1 < len(merged) else (0, 0, -1, -1)
        for row in range(start, end, block_k):
            flags = 0
            if row + block_k >= end:
                group_ends = next_group != group
                if measured >= 0 and (group_ends or next_measured != measured):
                    flags |= SAMPLE_ENDS
                if measured < 0 and (group_ends or next_measured >= 0):
                    flags |= UNMEASURED_ENDS
                flags |= GROUP_ENDS if group_ends else 0
            k_tiles.append((row, min(block_k, end - row), flags, measured, group))
    return k_tiles


@pytest.mark.parametrize("seed", range(16))
def test_the_list_of_k_tiles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is made in chunks of 16, so that merged segments and samples cross chunks."""
    monkeypatch.setattr(wgrad_schedule, "_CHUNK", 16)
    draw = random.Random(seed)
    count = draw.choice([1, 2, 5, 17, 33, 50])
    samples, groups = draw.randint(1, count + 2), draw.choice([1, 2, 4])
    offsets = [0]
    for _ in range(count):
        offsets.append(offsets[-1] + draw.choice([0, 1, 3, 7, 16, 20]))
    group_of = [draw.randrange(groups) for _ in range(samples)]
    rows = []
    for start, end in pairwise(offsets):
        sample = draw.randrange(samples)
        rows.append((start, end, sample, group_of[sample]))
    rows.sort(key=lambda row: (row[3], row[2]))
    starts, ends, ids, of = (list(column) for column in zip(*rows, strict=True))
    narrow = (torch.tensor(values, dtype=torch.int32) for values in (ids, of))
    segments = Segments(torch.tensor(starts), torch.tensor(ends), *narrow, samples, groups, None)
    gram_tokens, splits, block_k = draw.choice([0, 5, 16, 1 << 40]), draw.choice([1, 2, 3, 7]), draw.choice([1, 4, 16])
    spans = order(segments, offsets[-1]).sample_span
    short = ShortSamples(gram_tokens, torch.empty(0), spans) if gram_tokens else None
    schedule = wgrad_schedule.build(segments, offsets[-1], short, block_k, splits, torch.device("cpu"))
    right(schedule, expected(rows, gram_tokens, block_k), samples, groups)


@pytest.mark.parametrize("seed", range(8))
def test_the_list_of_plain_segments(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """cu_seqlens, or one length for all, is the whole table: the list is that of the table written out."""
    monkeypatch.setattr(wgrad_schedule, "_CHUNK", 16)
    draw = random.Random(seed)
    count = draw.choice([1, 2, 17, 40])
    even = draw.choice([1, 3, 16, 20]) if seed % 2 else None
    lengths = [draw.choice([0, 1, 3, 16, 40]) if even is None else even for _ in range(count)]
    offsets = [0, *accumulate(lengths)]
    splits, block_k = draw.choice([1, 2, 3]), draw.choice([1, 4, 16])
    wanted = expected([(lo, hi, i, 0) for i, (lo, hi) in enumerate(pairwise(offsets))], 0, block_k)
    for dtype in (torch.int32, torch.int64):
        # A slice: nothing is compiled anew for where it starts.
        given = torch.tensor([7, *offsets], dtype=dtype)[1:] if even is None else None
        plain = PlainSegments(given, even or 0, offsets[-1], count)
        found = wgrad_schedule.build(plain, offsets[-1], None, block_k, splits, torch.device("cpu"))
        assert int(found.count[1]) == 1
        right(found, wanted, count, 1)


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 5, 3, 9],
        [1, 5, 7, 9],
        [0, 5, 7, 8],
        [0, 5, 7, 10],
        [-1, 5, 7, 9],
        [0, 20, 7, 9],
        [0, 5, -(1 << 30), 9],
        [9, 9, 9, 9],
    ],
)
def test_offsets_that_are_out_of_range_are_noticed_and_fill_no_more_than_there_is_room(offsets: list[int]) -> None:
    """Every row is in the list once, in the first sample: no kernel leaves its arrays."""
    plain = PlainSegments(torch.tensor(offsets), 0, 9, 3)
    found = wgrad_schedule.build(plain, 9, None, 4, 1, torch.device("cpu"))
    assert found.count.tolist() == [3, 0]
    assert [value >> 20 for value in found.k_tiles.tolist()[:3]] == [0, 4, 8]
    assert found.sample.tolist()[:3] == [0, 0, 0]


def right(
    schedule: wgrad_schedule.Schedule, wanted: list[tuple[int, int, int, int, int]], samples: int, groups: int
) -> None:
    """Hold a schedule to its K tiles, and to where the norms are found."""
    splits, k_tiles = schedule.splits, int(schedule.count[0])
    packed = zip(schedule.k_tiles.tolist()[:k_tiles], schedule.sample.tolist(), schedule.group.tolist(), strict=False)
    found = [(value >> 20, value & 0xFFFF, (value >> 16) & 15, measured, group) for value, measured, group in packed]
    assert found == wanted
    assert int(schedule.k_tiles[k_tiles]) == 0
    ends = [0, *(at + 1 for at, k_tile in enumerate(wanted) if k_tile[2])]
    assert schedule.runs.tolist()[: len(ends) + 1] == [len(ends) - 1, *ends] and ends[-1] == k_tiles

    # Split s holds the K tiles from s * k_tiles // splits on.
    split_of = [max(s for s in range(splits) if s * k_tiles // splits <= k_tile) for k_tile in range(k_tiles)]
    state = [0] * (samples + groups)
    for field, ends_here in ((3, SAMPLE_ENDS), (4, GROUP_ENDS)):
        for key, members in groupby(enumerate(wanted), key=lambda item: item[1][field]):
            numbers = [number for number, _ in members]
            if key >= 0 and wanted[numbers[-1]][2] & ends_here:
                cut = split_of[numbers[0]] != split_of[numbers[-1]] or (field == 4 and groups == 1 and splits > 1)
                state[key + (samples if field == 4 else 0)] = 2 + split_of[numbers[-1]] if cut else 1
    assert schedule.state.tolist() == state

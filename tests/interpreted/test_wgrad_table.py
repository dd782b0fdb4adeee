"""The list of token blocks and the sums at the end, each held to a few lines of plain Python."""

from __future__ import annotations

import random
from itertools import groupby, pairwise

import pytest
import torch

from gradnorm_kernels.backends.triton import reduce, wgrad_table
from gradnorm_kernels.segments import Segments

Row = tuple[int, int, int, int]
MEASURED, FLUSH, GROUP_ENDS = 1, 2, 4


def expected(rows: list[Row], gram_tokens: int, block_k: int) -> list[tuple[int, int, int, int, int]]:
    """(first row, rows, flags, owner, group) of each block, for segments (start, end, sample, group) in order."""
    lengths: dict[int, int] = {}
    for start, end, sample, _ in rows:
        lengths[sample] = lengths.get(sample, 0) + end - start
    runs: list[list[int]] = []
    for start, end, sample, group in rows:
        owner = sample if lengths[sample] > gram_tokens else -1
        if start < end and runs and runs[-1][1:] == [start, owner, group]:
            runs[-1][1] = end
        elif start < end:
            runs.append([start, end, owner, group])
    blocks = []
    for number, (start, end, owner, group) in enumerate(runs):
        _, _, next_owner, next_group = runs[number + 1] if number + 1 < len(runs) else (0, 0, -1, -1)
        for row in range(start, end, block_k):
            flags = 0
            if row + block_k >= end:
                group_ends = next_group != group
                if owner >= 0 and (group_ends or next_owner != owner):
                    flags |= MEASURED
                if owner < 0 and (group_ends or next_owner >= 0):
                    flags |= FLUSH
                flags |= GROUP_ENDS if group_ends else 0
            blocks.append((row, min(block_k, end - row), flags, owner, group))
    return blocks


@pytest.mark.parametrize("seed", range(16))
def test_the_list_of_blocks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is made in chunks of 16, so that runs and samples cross from chunk to chunk."""
    monkeypatch.setattr(wgrad_table, "_CHUNK", 16)
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
    table = wgrad_table.build(segments, offsets[-1], gram_tokens, block_k, splits)

    wanted = expected(rows, gram_tokens, block_k)
    blocks = int(table.count)
    packed = zip(table.blocks.tolist()[:blocks], table.owner.tolist(), table.group.tolist(), strict=False)
    found = [(value >> 20, value & 0xFFFF, (value >> 16) & 15, owner, group) for value, owner, group in packed]
    assert found == wanted
    assert int(table.blocks[blocks]) == 0

    # Split s holds the blocks from s * blocks // splits on.
    part_of = [max(s for s in range(splits) if s * blocks // splits <= block) for block in range(blocks)]
    state = [0] * (samples + groups)
    for place, ends_here in ((3, MEASURED), (4, GROUP_ENDS)):
        for key, members in groupby(enumerate(wanted), key=lambda item: item[1][place]):
            numbers = [number for number, _ in members]
            if key >= 0 and wanted[numbers[-1]][2] & ends_here:
                cut = part_of[numbers[0]] != part_of[numbers[-1]] or (place == 4 and groups == 1 and splits > 1)
                state[key + (samples if place == 4 else 0)] = 2 + part_of[numbers[-1]] if cut else 1
    assert table.state.tolist() == state


@pytest.mark.parametrize("samples", [1, 31, 777])
def test_norms_take_what_is_there_and_nothing_else(samples: int) -> None:
    """In float64 and over more rows than one step takes; the rest of the partials is NaN."""
    generator = torch.Generator().manual_seed(samples)
    columns, splits = samples + 3, 4
    partials = torch.full((45, columns), torch.nan, dtype=torch.float64)
    joined = torch.full((splits, 2, 70), torch.nan, dtype=torch.float64)
    state = torch.zeros(columns, dtype=torch.int32)
    wanted = torch.zeros(columns, dtype=torch.float64)
    for column in range(0, columns, 3):
        partials[:, column] = torch.rand(45, generator=generator, dtype=torch.float64)
        state[column], wanted[column] = 1, partials[:, column].sum()
    for column, split, kind in ((samples - 1, 2, 0), (samples + 2, 3, 1)):
        joined[split, kind] = torch.rand(70, generator=generator, dtype=torch.float64)
        state[column], wanted[column] = 2 + split, joined[split, kind].sum()
    found = reduce.norms(state, partials, joined, samples, None)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    twice = reduce.norms(state, partials, joined, samples, found.clone())
    torch.testing.assert_close(twice, 2 * wanted, rtol=1e-14, atol=0)

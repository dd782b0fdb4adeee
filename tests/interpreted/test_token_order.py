"""The order of tokens against a few lines of plain Python."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch

from gradnorm_kernels.backends.triton import token_order
from gradnorm_kernels.segments import Segments
from gradnorm_kernels.traps import poisoned_memory


def ordered(lengths: list[int], sample_of: list[int], group_of: list[int], samples: int, groups: int) -> Segments:
    """The segments one behind the other in memory, sorted by (group, sample)."""
    offsets = [0, *accumulate(lengths)]
    places = sorted(range(len(lengths)), key=lambda at: (group_of[sample_of[at]], sample_of[at]))
    start, end = (torch.tensor([offsets[at + more] for at in places], dtype=torch.int64) for more in (0, 1))
    sample = torch.tensor([sample_of[at] for at in places], dtype=torch.int32)
    group = torch.tensor([group_of[sample_of[at]] for at in places], dtype=torch.int32)
    return Segments(start, end, sample, group, samples, groups, None)


@pytest.mark.parametrize("seed", range(16))
def test_the_order_of_positions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In programs of 16, so that segments, samples and groups cross what a program takes and what it looks at."""
    for name in ("_POSITIONS", "_IDS", "_SEGMENTS", "_CHUNK"):
        monkeypatch.setattr(token_order, name, 16)
    draw = random.Random(seed)
    count = draw.choice([1, 2, 15, 16, 17, 50])
    samples, groups = draw.randint(1, count + 3), draw.choice([1, 2, 5, 20])
    lengths = [draw.choice([0, 0, 1, 2, 15, 16, 40]) for _ in range(count)]
    lengths[draw.randrange(count)] = 7  # one of them has rows
    sample_of, group_of = [draw.randrange(samples) for _ in lengths], [draw.randrange(groups) for _ in range(samples)]
    segments, tokens = ordered(lengths, sample_of, group_of, samples, groups), sum(lengths)
    with poisoned_memory():
        found = token_order.order(segments, tokens)
    columns = zip(*(column.tolist() for column in (segments.start, segments.end, segments.sample)), strict=True)
    places = [(row, sample) for start, end, sample in columns for row in range(start, end)]
    assert found.row.tolist() == [row for row, _ in places]
    assert found.sample.tolist() == [sample for _, sample in places]
    assert found.group.tolist() == [group_of[sample] for _, sample in places]
    for ids, spans in ((found.sample, found.sample_span), (found.group, found.group_span)):
        for owner, (begin, stop) in enumerate(spans.tolist()):
            assert (ids == owner).nonzero().flatten().tolist() == list(range(begin, stop)) and begin >= 0
            assert begin or stop or owner not in ids


def test_as_large_as_it_is_launched() -> None:
    lengths = [300, 0, 1, 255, 257, 2, *[3] * 200]
    count = len(lengths)
    segments = ordered(lengths, list(range(count)), [0] * count, count, 1)
    with poisoned_memory():
        found = token_order.order(segments, sum(lengths))
    assert found.row.tolist() == list(range(sum(lengths)))
    assert found.sample.tolist() == [sample for sample, length in enumerate(lengths) for _ in range(length)]
    ends = list(accumulate(lengths))
    spans = [[end - length, end] if length else [0, 0] for end, length in zip(ends, lengths, strict=True)]
    assert found.sample_span.tolist() == spans and found.group_span.tolist() == [[0, ends[-1]]]


@pytest.mark.parametrize(("samples", "count"), [(3, 2), (3, 0), (0, 0)])
def test_without_rows(samples: int, count: int) -> None:
    """Nothing to order: spans are empty, whatever the memory held."""
    with poisoned_memory():
        found = token_order.order(ordered([0] * count, [0] * count, [0] * samples, samples, 1), 0)
    assert not found.row.numel() and not found.sample_span.any() and not found.group_span.any()

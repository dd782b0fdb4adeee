"""Index tensors for the kernels that sort segments, and the table by Python's own sort."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch

from gradnorm_kernels.segments import IndexTensors, Segments

SEEDS = range(12)
#: (what is wrong, how): each breaks the index tensors of a seed that has all of them.
WRONG = ("first offset", "last offset", "descending", "negative sample", "sample", "negative group", "unused group")


def index_tensors(seed: int, wrong: str = "") -> IndexTensors:
    """Segments in random order of samples and groups, with empty ones; with ``wrong`` one value is out of range."""
    draw = random.Random(seed)
    count = draw.choice([1, 2, 31, 32, 33, 130, 300]) if not wrong else 40
    samples, groups = draw.choice([1, count, count + 3]), draw.choice([1, 4])
    offsets = [0, *accumulate(draw.choice([0, 1, 2, 9]) for _ in range(count))]
    ids = [draw.randrange(samples) for _ in range(count)]
    of = [draw.randrange(groups) for _ in range(samples)]
    if wrong:
        samples, ids, of = 41, [i % 40 for i in ids], [*of, *[0] * 41][:41]
    tokens = offsets[-1]
    if wrong == "first offset":
        offsets[0] = 1
    elif wrong == "last offset":
        offsets[-1] += 1
    elif wrong == "descending":
        offsets[20] = offsets[21] + 1
    elif wrong == "negative sample":
        ids[35] = -1
    elif wrong == "sample":
        ids[3] = samples
    elif wrong == "negative group":
        of[ids[7]] = -5
    elif wrong == "unused group":
        of[40] = groups
    has = [True, True, True] if wrong else [seed % 4 != 0, seed % 3 != 0 or count != samples, seed % 5 != 1]
    if not has[0]:
        offsets = [3 * i for i in range(count + 1)]
        tokens = offsets[-1]
    if not has[1]:
        samples, of = count, [draw.randrange(groups) for _ in range(count)]
    if not has[2]:
        groups = 1
    dtypes = [draw.choice([torch.int32, torch.int64]) for _ in has]
    tensors = [
        torch.tensor(values, dtype=dtype) if there else None
        for values, dtype, there in zip((offsets, ids, of), dtypes, has, strict=True)
    ]
    return IndexTensors(*tensors, count, samples, groups, tokens, 0 if has[0] else 3)  # type: ignore[arg-type]


def check_sorted(sort: Callable[[IndexTensors], Segments], seed: int) -> None:
    """The table is that of Python's stable sort by (group, sample)."""
    given = index_tensors(seed)
    offsets = range(0, 3 * given.segments + 1, 3) if given.cu_seqlens is None else given.cu_seqlens.tolist()
    ids = range(given.segments) if given.sample_ids is None else given.sample_ids.tolist()
    of = [0] * given.samples if given.group_ids is None else given.group_ids.tolist()
    rows = [(start, end, sample, of[sample]) for (start, end), sample in zip(pairwise(offsets), ids, strict=True)]
    rows.sort(key=lambda row: (row[3], row[2]))
    table = sort(given)
    assert table.valid is not None and bool(table.valid)
    assert (table.samples, table.groups) == (given.samples, given.groups)
    found = zip(*(part.tolist() for part in (table.start, table.end, table.sample, table.group)), strict=True)
    assert list(found) == rows


def check_wrong(sort: Callable[[IndexTensors], Segments], wrong: str) -> None:
    """The table is not valid, and still one that a kernel can walk: all rows once, ids in range and in order."""
    given = index_tensors(1, wrong)
    table = sort(given)
    assert table.valid is not None and not bool(table.valid)
    assert table.start.tolist() == [0] + [given.tokens] * (given.segments - 1)
    assert table.end.tolist() == [given.tokens] * given.segments
    keys = list(zip(table.group.tolist(), table.sample.tolist(), strict=True))
    assert keys == sorted(keys)
    assert all(0 <= group < given.groups and 0 <= sample < given.samples for group, sample in keys)

"""The kernel that sorts segments by ids on the device, interpreted."""

from __future__ import annotations

import pytest

from gradnorm_kernels.backends.triton.segment_table import sort
from gradnorm_kernels.traps import poisoned_memory
from tests.ops.sorted_segments import SEEDS, WRONG, check_sorted, check_wrong


@pytest.mark.parametrize("seed", SEEDS)
def test_segments_are_sorted_by_group_and_sample(seed: int) -> None:
    with poisoned_memory():
        check_sorted(sort, seed)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_value_out_of_range_is_seen(wrong: str) -> None:
    with poisoned_memory():
        check_wrong(sort, wrong)

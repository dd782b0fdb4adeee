"""How many operations a call puts on the device: launches of our kernels, and of torch's beside them.

A launch costs some microseconds, which is much beside the product of a small layer. The tables are exact: a call that
takes one more fails, and so does one that takes fewer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import ops
from tests.fake_cuda.device import FakeCuda

TOKENS = 16384
CALLS: dict[str, dict[str, Any]] = {
    "dW": {"weight_grad": True},
    "groups, dW": {"weight_grad": True, "groups": 4},
    "group Gram": {"group_gram": True, "groups": 4},
}
#: (d_in = d_out, tokens per sample): "long" samples are past the crossover, and have no Gram part.
SHAPES = {
    "wide, long": (4096, 2048),
    "narrow, long": (576, 2048),
    "wide, short": (4096, 64),
    "narrow, short": (576, 64),
}

#: With cu_seqlens and ids on the host, as the tracker has them: the first operation is their copy.
HOST = {
    "triton": {
        "wide, long": {"dW": 4, "groups, dW": 4, "group Gram": 14},
        "narrow, long": {"dW": 5, "groups, dW": 5, "group Gram": 6},
        "wide, short": {"dW": 15, "groups, dW": 15, "group Gram": 25},
        "narrow, short": {"dW": 16, "groups, dW": 16, "group Gram": 17},
    },
    "cuda": {
        "wide, long": {"dW": 8, "groups, dW": 8, "group Gram": 69},
        "narrow, long": {"dW": 65, "groups, dW": 65, "group Gram": 51},
        "wide, short": {"dW": 55, "groups, dW": 55, "group Gram": 116},
        "narrow, short": {"dW": 90, "groups, dW": 90, "group Gram": 98},
    },
}
#: With all of them on the device, where ids are sorted by torch.
DEVICE = {
    "triton": {
        "wide, long": {"dW": 3, "groups, dW": 29, "group Gram": 39},
        "narrow, long": {"dW": 4, "groups, dW": 30, "group Gram": 31},
        "wide, short": {"dW": 26, "groups, dW": 42, "group Gram": 52},
        "narrow, short": {"dW": 27, "groups, dW": 43, "group Gram": 44},
    },
    "cuda": {
        "wide, long": {"dW": 23, "groups, dW": 39, "group Gram": 100},
        "narrow, long": {"dW": 80, "groups, dW": 96, "group Gram": 82},
        "wide, short": {"dW": 70, "groups, dW": 86, "group Gram": 147},
        "narrow, short": {"dW": 105, "groups, dW": 121, "group Gram": 129},
    },
}


@pytest.fixture
def fake(both: FakeCuda) -> FakeCuda:
    """The launches are counted, and not run."""
    both.silent = True
    return both


def operations(fake: FakeCuda, shape: str, where: str, backend: str, groups: int = 1, **wanted: bool) -> list[str]:
    """The names of what one call puts on the device."""
    d, length = SHAPES[shape]
    x, dy = (fake.put(torch.empty(TOKENS, d, dtype=torch.bfloat16)) for _ in range(2))
    given: dict[str, Any] = {"cu_seqlens": torch.arange(0, TOKENS + 1, length, dtype=torch.int32)}
    if groups > 1:
        given |= {"group_ids": torch.arange(TOKENS // length) % groups}
    if where == "device":
        given = {name: fake.put(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    del fake.operations[:]
    ops.fused_grad_norm(x, dy, **given, num_groups=groups if groups > 1 else None, backend=backend, **wanted)
    return list(fake.operations)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_call_takes_so_many_operations(fake: FakeCuda, where: str, backend: str) -> None:
    table = (HOST if where == "host" else DEVICE)[backend]
    found = {
        shape: {name: operations(fake, shape, where, backend, **options) for name, options in CALLS.items()}
        for shape in SHAPES
    }
    counts = {shape: {name: len(names) for name, names in row.items()} for shape, row in found.items()}
    assert counts == table, found


def test_three_launches_and_nothing_else(fake: FakeCuda) -> None:
    """Prologue, main kernel, finaliser; where the tokens are split, the fix-up of what the splits cut."""
    three = ["schedule_kernel", "wgrad_sm90_kernel", "finish_kernel"]
    assert operations(fake, "wide, long", "device", "triton", weight_grad=True) == three
    split = operations(fake, "narrow, long", "device", "triton", weight_grad=True)
    assert split == [*three[:2], "split_fixup_kernel", three[2]]
    of_tracker = operations(fake, "narrow, long", "host", "triton", groups=4, group_gram=True)
    assert of_tracker == ["_to_copy", *split[:3], "bmm", three[2]]

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
from gradnorm_kernels.backends.triton import wgrad
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
        "wide, long": {"dW": 4, "groups, dW": 4, "group Gram": 4},
        "narrow, long": {"dW": 5, "groups, dW": 5, "group Gram": 5},
        "wide, short": {"dW": 7, "groups, dW": 7, "group Gram": 7},
        "narrow, short": {"dW": 8, "groups, dW": 8, "group Gram": 8},
    },
    "cuda": {
        "wide, long": {"dW": 4, "groups, dW": 4, "group Gram": 5},
        "narrow, long": {"dW": 5, "groups, dW": 5, "group Gram": 5},
        "wide, short": {"dW": 5, "groups, dW": 5, "group Gram": 6},
        "narrow, short": {"dW": 6, "groups, dW": 6, "group Gram": 6},
    },
}
#: With all of them on the device. One launch checks and sorts ids.
DEVICE = {
    "triton": {
        "wide, long": {"dW": 3, "groups, dW": 4, "group Gram": 4},
        "narrow, long": {"dW": 4, "groups, dW": 5, "group Gram": 5},
        "wide, short": {"dW": 7, "groups, dW": 7, "group Gram": 7},
        "narrow, short": {"dW": 8, "groups, dW": 8, "group Gram": 8},
    },
    "cuda": {
        "wide, long": {"dW": 3, "groups, dW": 4, "group Gram": 5},
        "narrow, long": {"dW": 4, "groups, dW": 5, "group Gram": 5},
        "wide, short": {"dW": 4, "groups, dW": 5, "group Gram": 6},
        "narrow, short": {"dW": 5, "groups, dW": 6, "group Gram": 6},
    },
}


@pytest.fixture
def fake(both: FakeCuda) -> FakeCuda:
    """The launches are counted, and not run."""
    both.silent = True
    return both


def operations(
    fake: FakeCuda, shape: str, where: str, backend: str, groups: int = 1, tokens: int = TOKENS, **options: Any
) -> list[str]:
    """The names of what one call puts on the device."""
    d, length = SHAPES[shape]
    x, dy = (fake.put(torch.empty(tokens, d, dtype=torch.bfloat16)) for _ in range(2))
    given: dict[str, Any] = {"cu_seqlens": torch.arange(0, tokens + 1, length, dtype=torch.int32)}
    if groups > 1:
        given |= {"group_ids": torch.arange(tokens // length) % groups}
    if where == "device":
        given = {name: fake.put(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    del fake.operations[:]
    ops.fused_grad_norm(x, dy, **given, num_groups=groups if groups > 1 else None, backend=backend, **options)
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


def test_three_launches_and_nothing_else(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prologue, main kernel, finaliser; where the tokens are split, the fix-up of what the splits cut."""
    three = ["schedule_kernel", "wgrad_sm90_kernel", "finish_kernel"]
    assert operations(fake, "wide, long", "device", "triton", weight_grad=True) == three
    split = operations(fake, "narrow, long", "device", "triton", weight_grad=True)
    assert split == [*three[:2], "split_fixup_kernel", three[2]]
    of_tracker = operations(fake, "narrow, long", "host", "triton", groups=4, group_gram=True)
    assert of_tracker == ["_to_copy", *split]
    # The kernels multiply the sums of up to 16 groups; those of more are stored, and multiplied by torch.
    many = operations(fake, "narrow, long", "host", "triton", tokens=2048 * 17, groups=17, group_gram=True)
    assert many == ["_to_copy", *split[:3], "bmm", three[2]]
    short = operations(fake, "wide, short", "host", "triton", groups=4, group_gram=True)
    assert short == ["_to_copy", "token_order_kernel", "gram_norms_kernel", "position_sums_kernel", *three]
    # Where accumulators are in tensor memory, torch multiplies those of few groups too.
    monkeypatch.setattr(wgrad, "has_tensor_memory", lambda x: True)
    assert operations(fake, "narrow, long", "host", "triton", groups=4, group_gram=True) == many


def test_three_launches_of_the_cuda_backend(fake: FakeCuda) -> None:
    """The same of the hand-written kernels; the Gram of short samples is one launch more."""
    three = ["schedule", "wgrad_norm_sm90", "finish"]
    assert operations(fake, "wide, long", "device", "cuda", weight_grad=True) == three
    assert operations(fake, "wide, long", "device", "cuda") == three
    split = operations(fake, "narrow, long", "device", "cuda", weight_grad=True)
    assert split == [*three[:2], "split_fixup", three[2]]
    short = operations(fake, "wide, short", "device", "cuda", weight_grad=True)
    assert short == ["schedule", "gram_sm80", "wgrad_norm_sm90", "finish"]
    for shape in ("narrow, long", "wide, long"):
        assert operations(fake, shape, "host", "cuda", groups=4, group_gram=True) == ["_to_copy", *split]
    # The fix-up keeps the sums of up to twelve groups; those of more are stored, and multiplied by torch.
    for groups, products in ((12, []), (13, ["bmm"])):
        found = operations(fake, "narrow, long", "host", "cuda", tokens=2048 * 16, groups=groups, group_gram=True)
        assert found == ["_to_copy", *split[:3], *products, three[2]]


def test_norms_from_pairs_of_tokens_alone(fake: FakeCuda) -> None:
    """The Gram of samples, and the Gram of groups, which is pairwise where it is wanted."""
    four = ["schedule", "gram_sm80", "gram_sm80", "finish"]
    for pairwise in (False, True):
        options = {"algorithm": "gram", "group_gram": pairwise}
        assert operations(fake, "wide, short", "device", "cuda", tokens=256, **options) == four

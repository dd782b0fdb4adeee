"""Batches of other lengths and numbers of samples launch the same compiled kernels.

Triton compiles a kernel anew where a pointer is, or is not, at a multiple of 16 bytes, and where an integer is 1, or is
divisible by 16, or is not: seconds, in the middle of a training run. What is seen here are the arguments of every
launch; the forms of a kernel that a call may choose between (constants and dtypes) are kept apart.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from gradnorm_kernels import ops, segments
from gradnorm_kernels.backends.triton import embedding

Seen = dict[Hashable, set[tuple[tuple[str, str], ...]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(kernel, constants and dtypes) -> what Triton would compile it for: one entry per compilation."""
    found: Seen = defaultdict(set)
    run = InterpretedFunction.run

    def watched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        plain = self.kwargs["do_not_specialize"] or ()
        traits, constants = [], []
        for name, value in given.items():
            if isinstance(value, Tensor):
                constants.append((name, value.dtype))
                traits.append((name, "aligned" if value.data_ptr() % 16 == 0 else "unaligned"))
            elif name not in self.arg_names or name.isupper():
                constants.append((name, value))
            elif name not in plain:
                traits.append((name, "one" if value == 1 else "divisible" if value % 16 == 0 else "plain"))
        found[self.fn.__name__, tuple(constants)].add(tuple(traits))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", watched)
    return found


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """x, dy, cu_seqlens, sample_ids, group_ids and the numbers of samples and groups."""
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 2, 7, 13, 40]) for _ in range(draw.randint(2, 9))] + [3]
    samples, groups = draw.randint(2, 8), draw.randint(2, 5)
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(sum(lengths), d, generator=generator) for d in (32, 48))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sample_ids = torch.tensor([draw.randrange(samples) for _ in lengths])
    group_ids = torch.tensor([draw.randrange(groups) for _ in range(samples)])
    return x, dy, offsets, sample_ids, group_ids, samples, groups


def report(found: Seen) -> str:
    return "\n".join(f"{kernel}: {sorted(traits)}" for kernel, traits in found.items() if len(traits) > 1)


@pytest.mark.parametrize("on_device", [False, True])
def test_ops(on_device: bool, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        monkeypatch.setattr(segments, "_on_host", lambda device: False)
    for seed in range(4):
        x, dy, offsets, sample_ids, group_ids, samples, groups = batch(seed)
        for algorithm in ("wgrad", "gram"):
            ids: dict[str, Any] = {"algorithm": algorithm, "backend": "triton"}
            ops.fused_grad_norm(x, dy, offsets, weight_grad=True, **ids)
            ids |= {"sample_ids": sample_ids, "num_samples": samples}
            ops.fused_grad_norm(x, dy, offsets, group_ids=group_ids, num_groups=groups, group_gram=True, **ids)
            ops.grad_gram(x, dy, offsets, **ids)
        v = torch.ones(48, 32)
        ops.grad_dot(x, dy, v, offsets, sample_ids=sample_ids, num_samples=samples, backend="triton")
    assert {name for name, _ in seen} >= {  # type: ignore[misc]
        "wgrad_sm80_kernel",
        "schedule_kernel",
        "finish_kernel",
        "token_order_kernel",
        "gram_norms_kernel",
        "gram_pairs_kernel",
        "row_sums_kernel",
        "position_sums_kernel",
        "dot_kernel",
    }
    assert not report(seen), report(seen)
    unaligned = [(kernel, kinds) for kernel, kinds in seen.items() if "unaligned" in str(kinds)]
    assert not unaligned, f"the report of compiled kernels takes all pointers for aligned: {unaligned}"


def test_the_tracker_s_kernels(seen: Seen) -> None:
    for seed in range(5):
        x, dy, offsets, sample_ids, _, samples, _ = batch(seed)
        owner = sample_ids.repeat_interleave(offsets.diff())
        words = torch.randint(-1, 9, (len(x),), generator=torch.Generator().manual_seed(seed))
        embedding.embedding_gram(words, dy, owner, samples)
        embedding.embedding_norms(words, dy, owner, samples)
        order = torch.argsort(sample_ids, stable=True)
        start, end, owners = offsets[:-1][order], offsets[1:][order], sample_ids[order].int()
        of = segments.Segments(start, end, owners, owners, samples, samples, None)
        embedding.tied_gram(x, dy, of, words.clamp_min(0), x.clone(), of)
    assert {name for name, _ in seen} >= {"embedding_pairs_kernel", "tied_pairs_kernel"}  # type: ignore[misc]
    assert not report(seen), report(seen)

"""Selective activation checkpointing: it counts operations, and a hook that runs some must not shift the count.

A shifted count gives an operation of the recomputation the saved output of another one. Where the shapes agree nothing
fails: gradients and U are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gradnorm_kernels.tracking.quiet import uncounted
from tests.tracking.measured import TASKS, agree, next_token_losses, token_ids
from tests.tracking.models.tiny import tiny_model

ROWS = len(TASKS)
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save matrix products and recompute the rest, as trainers do."""
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def everything(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def checkpointed(model: nn.Module, policy: Callable[..., CheckpointPolicy]) -> nn.Module:
    """The model with every decoder layer checkpointed by a policy."""
    contexts = partial(create_selective_checkpoint_contexts, policy)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    return model


@pytest.mark.filterwarnings("ignore:not measured:UserWarning")
@pytest.mark.parametrize(
    ("name", "layers", "fused", "policy"),
    [
        pytest.param("llama", "all", False, products, id="all"),
        pytest.param("llama", "all", False, everything, id="all, everything saved"),
        pytest.param("llama", "last_attention", True, products, id="fused"),
        pytest.param("gpt_oss", "all", False, products, id="experts"),
    ],
)
def test_gradients_and_u_are_those_without_checkpointing(
    name: str, layers: str, fused: bool, policy: Callable[..., CheckpointPolicy]
) -> None:
    """In the first micro-batch, in which the layers are verified."""
    plain = tiny_model(name).to(torch.float64)
    model = checkpointed(deepcopy(plain), policy)
    agree(model, next_token_losses(model, token_ids()), layers, fused=fused)
    next_token_losses(plain, token_ids())(range(ROWS)).mean().backward()
    for (parameter, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=parameter)


class Counting(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def test_other_modes_still_see_the_trackers_operations() -> None:
    """Only the modes of selective checkpointing are taken off. All come back in their order, also after an error."""
    x = torch.ones(2, 2)
    saving, _ = create_selective_checkpoint_contexts(everything)
    with Counting() as outer, saving, Counting() as inner:
        with uncounted():
            x @ x
        with pytest.raises(KeyError), uncounted():
            raise KeyError
        assert (outer.products, inner.products, dict(saving.func_counter)) == (1, 1, {})
        x @ x
        assert (outer.products, inner.products) == (2, 2)
        assert sum(saving.func_counter.values()) == 1

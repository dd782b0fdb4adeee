"""What crosses ranks: a step's sums between data-parallel ranks, shards of one matrix between tensor-parallel ones.

Squared norms do not add over data-parallel ranks; inner products of pairs do, so ranks exchange those
(:class:`~gradnorm_kernels.estimation.moments.StepSums`, a few numbers per sample) and every rank computes the same
estimates. Shards of one weight matrix do add: ``<G, H> = sum over shards of <G_shard, H_shard>``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def resolve(process_group: Any) -> Any:
    """The group whose ranks share a step's samples, or None: "auto" is the default group, where there are several
    ranks.

    Raises:
        TypeError: neither "auto", None nor a ProcessGroup.
    """
    if process_group is None:
        return None
    available = dist.is_available() and dist.is_initialized()
    if process_group == "auto":
        return dist.group.WORLD if available and dist.get_world_size() > 1 else None
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            'process_group must be "auto" (all ranks), None (this rank alone) or a torch.distributed.ProcessGroup of '
            f"the data-parallel ranks, got {process_group!r}"
        )
    return process_group


def rank(group: Any) -> int:
    """This process's rank in the group; 0 without one."""
    return dist.get_rank(group) if group is not None else 0


def gather(value: T, group: Any) -> list[T]:
    """Every rank's value (any object that pickles), in the order of ranks; ``[value]`` without a group.

    Raises:
        RuntimeError: another rank stopped, or did not take part in time; the text says what was being exchanged.
    """
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    with _named("the step's sums", group):
        dist.all_gather_object(found, value, group=group)
    return found


def sum_over(tensors: list[Tensor], group: Any) -> None:
    """Sum each tensor over the group's ranks, in place and in order. Every rank passes the same shapes.

    Raises:
        RuntimeError: as :func:`gather`.
    """
    with _named("sums of gradients", group):
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


class _named:
    """Turn a failed collective into an error that says what it was for."""

    def __init__(self, what: str, group: Any) -> None:
        self.what, self.group = what, group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            raise RuntimeError(
                f"rank {rank(self.group)} could not exchange {self.what} with the other ranks ({error}): one of them "
                "stopped, or did not call tracker.step() as often as this one"
            ) from error


def local(tensor: Tensor) -> Tensor:
    """The rank's own part of a DTensor; any other tensor as it is."""
    own: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return own


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a ``torch.distributed.tensor.DTensor``."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_groups(parameter: Tensor, besides: Any = None) -> tuple[Any, ...]:
    """The groups over which a parameter is sharded *while its layer computes* (tensor parallel); () where it is whole.

    FSDP2 gathers a layer's parameters before the layer runs, so they are plain tensors then. ``besides``: a group that
    does not count.
    """
    if not is_dtensor(parameter):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    found = [mesh.get_group(dim) for dim, place in enumerate(placements) if place.is_shard() and mesh.size(dim) > 1]
    left_out = [] if besides is None else dist.get_process_group_ranks(besides)
    return tuple(group for group in found if dist.get_process_group_ranks(group) != left_out)


def rows_are_whole(name: str, x: Tensor, dy: Tensor) -> None:
    """Refuse activations whose tokens are split over ranks: a sample's gradient would need all its tokens.

    Raises:
        ValueError: ``x`` or ``dy`` is a DTensor sharded in a dimension before the last (sequence or context parallel).
    """
    for what, tensor in (("input", x), ("output gradient", dy)):
        if not is_dtensor(tensor):
            continue
        split = [p.dim for p in tensor.placements if p.is_shard() and p.dim % tensor.dim() != tensor.dim() - 1]  # type: ignore[attr-defined]
        if split:
            raise ValueError(
                f"layer {name!r}: its {what} is sharded over ranks in dimension {split[0]} of {tensor.dim()} (sequence "
                "or context parallelism): a sample's tokens lie on several ranks, which is not supported; measure "
                "without it, or leave the layer out of layers="
            )

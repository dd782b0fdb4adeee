"""The rows of one micro-batch: their tasks, samples, weights and scales, checked before anything runs.

A row is one sequence: a row of a padded batch, or one of several sequences packed one after another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..segments import to_device
from .packing import CuSeqlens, Packing, make_packing, real_tokens

Ids = Sequence[Hashable] | Tensor


@dataclass
class Rows:
    """One micro-batch of B rows from N samples in ``num_blocks`` blocks. Index tensors are int64 on the CPU.

    A row's gradient enters with the factor ``scale`` (it turns the row's share of the differentiated loss into its
    share of the sample's mean over rows): G_p = sum over p's rows of scale_r * (gradient through row r).
    """

    batch: int
    samples: list[Hashable]  # [N] keys, in order of first appearance
    tasks: list[Hashable]  # [N] the task of each sample
    row_sample: Tensor  # [B] -> N
    sample_block: Tensor  # [N] -> blocks
    block_keys: list[Hashable]
    block_tasks: list[Hashable]
    scale: Tensor  # [B] float64
    sample_scale: Tensor | None  # [N] float64: the rows' common factor; None when rows of one sample differ
    weight: Tensor  # [N] float64: share of the sample's rows present here
    rows_present: list[int]  # [N]
    mask: Tensor | None  # [B, L] bool; None for packed rows
    packing: Packing | None = None  # where B packed sequences lie
    inner_products: bool = True  # whether those between blocks are wanted, or only the blocks' squares

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_blocks(self) -> int:
        return len(self.block_keys)

    @property
    def length(self) -> int | None:
        """L, the tokens of a row, where the mask says so."""
        return None if self.mask is None else self.mask.shape[1]


def _as_list(ids: Ids, name: str) -> list[Hashable]:
    if isinstance(ids, str) or not isinstance(ids, (Sequence, Tensor)):
        raise TypeError(
            f"{name} must be a list or a 1-D tensor with one id (int or string) per row, got {type(ids).__name__}"
        )
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} must be a 1-D integer tensor, got shape {tuple(ids.shape)} and dtype {ids.dtype}")
        return list(ids.tolist())
    for row, value in enumerate(ids):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise TypeError(
                f"{name} must hold ints or strings, got {value!r} ({type(value).__name__}) for row {row}: "
                "give every row an id"
            )
    return list(ids)


def _per_row(value: float | Sequence[float] | Tensor, batch: int, name: str) -> Tensor:
    """A number or [B] numbers as a [B] float64 tensor of finite values."""
    try:
        out = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one number per row, got {value!r}") from None
    if out.dim() == 0:
        out = out.expand(batch)
    if out.shape != (batch,):
        raise ValueError(
            f"{name} must be a number or have one entry per row: got shape {tuple(out.shape)} for {batch} rows"
        )
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return out


def _packed(cu_seqlens: CuSeqlens, batch: int, attention_mask: Tensor | None) -> Packing:
    """The packing of ``batch`` sequences. A mask's values are not read: only its shape [B, L] counts."""
    packing = make_packing(cu_seqlens)
    if len(packing) != batch:
        raise ValueError(
            f"task_ids must have one entry per sequence: cu_seqlens describes {len(packing)} sequences, task_ids has "
            f"{batch} entries"
        )
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            given = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"attention_mask must be a [B, L] tensor of the packed rows, got {given}")
        packing.settle((attention_mask.shape[0], attention_mask.shape[1]))
    return packing


def is_task_block(key: Hashable) -> bool:
    """Whether a block's key stands for all samples of a task, in every micro-batch and on every rank."""
    return isinstance(key, tuple) and key[0] == "task"


def make_blocks(
    tasks: Sequence[Hashable], samples: Sequence[Hashable], max_blocks: int | None, serial: int
) -> tuple[list[int], list[Hashable], list[Hashable]]:
    """(the block of each sample, the blocks' keys, the blocks' tasks).

    A block is one sample while there are at most ``max_blocks``, else one of equal folds inside each task. With
    ``max_blocks`` None it is a whole task.
    """
    if max_blocks is None:
        names = list(dict.fromkeys(tasks))
        return [names.index(task) for task in tasks], [("task", task) for task in names], names
    if len(samples) <= max_blocks:
        return list(range(len(samples))), list(samples), list(tasks)
    names = list(dict.fromkeys(tasks))
    folds = max(3, max_blocks // len(names))
    seen = dict.fromkeys(names, 0)
    index: dict[tuple[Hashable, int], int] = {}
    assigned = []
    for task in tasks:
        key = (task, seen[task] % folds)
        seen[task] += 1
        assigned.append(index.setdefault(key, len(index)))
    return assigned, [("fold", *key, serial) for key in index], [task for task, _ in index]


def make_rows(
    task_ids: Ids,
    sample_ids: Ids | None,
    attention_mask: Tensor | None,
    row_scale: float | Sequence[float] | Tensor | None,
    rows_per_sample: int | Sequence[int] | Tensor | None,
    *,
    cu_seqlens: CuSeqlens | None = None,
    serial: int,
    max_blocks: int | None,
    inner_products: bool = True,
) -> Rows:
    """Check one micro-batch's description and work out its weights.

    ``serial`` tells micro-batches of a step apart. ``max_blocks``: as in :func:`make_blocks`. ``inner_products``: as in
    :class:`Rows`.
    """
    tasks_of_rows = _as_list(task_ids, "task_ids")
    batch = len(tasks_of_rows)
    if not batch:
        raise ValueError("task_ids is empty: a micro-batch needs at least one row")
    packing = None if cu_seqlens is None else _packed(cu_seqlens, batch, attention_mask)
    rows: list[Hashable] = (
        [("row", serial, r) for r in range(batch)] if sample_ids is None else _as_list(sample_ids, "sample_ids")
    )
    if len(rows) != batch:
        raise ValueError(f"sample_ids must have one entry per row like task_ids: got {len(rows)} for {batch} rows")
    mask = None
    if attention_mask is not None and packing is None:
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            given = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(
                f"attention_mask must be a [B, L] tensor with B = {batch} (the length of task_ids), got {given}"
            )
        mask = real_tokens(attention_mask.detach())
    index: dict[Hashable, int] = {}
    tasks: list[Hashable] = []
    for sample, task in zip(rows, tasks_of_rows, strict=True):
        at = index.setdefault(sample, len(index))
        if at == len(tasks):
            tasks.append(task)
        elif tasks[at] != task:
            raise ValueError(
                f"sample_ids: sample {sample!r} has rows of two tasks, {tasks[at]!r} and {task!r}; a sample belongs "
                f"to one task"
            )
    row_sample = torch.tensor([index[sample] for sample in rows], device="cpu")
    present = torch.bincount(row_sample, minlength=len(index))
    first_row = torch.tensor([rows.index(sample) for sample in index], device="cpu")
    whole = present[row_sample].to(torch.float64)
    if rows_per_sample is not None:
        whole = _per_row(rows_per_sample, batch, "rows_per_sample")
        if bool((whole < present[row_sample]).any()) or bool((whole != whole.round()).any()):
            raise ValueError(
                f"rows_per_sample must be whole numbers, at least the rows of the sample in this micro-batch (up to "
                f"{int(present.max())}), "
                f"got {rows_per_sample!r}"
            )
        if bool((whole != whole[first_row][row_sample]).any()):
            raise ValueError(f"rows_per_sample must be the same for all rows of a sample, got {rows_per_sample!r}")
    factor = _per_row(batch if row_scale is None else row_scale, batch, "row_scale")
    one = isinstance(row_scale, (int, float)) or (isinstance(row_scale, Tensor) and row_scale.dim() == 0)
    if isinstance(row_scale, bool) or (one and not factor.any()):  # rows of their own may all be without a gradient
        raise ValueError(
            f"row_scale must be the factor from a row's share of the loss to the row's own loss, got {row_scale!r} for "
            "all rows: that is the number of rows for their mean, times the accumulation steps where it is divided by "
            "them"
        )
    scale = factor / whole
    same_inside = bool((scale == scale[first_row][row_sample]).all())
    block, keys, block_tasks = make_blocks(tasks, list(index), max_blocks, serial)
    return Rows(
        batch=batch,
        samples=list(index),
        tasks=tasks,
        row_sample=row_sample,
        sample_block=torch.tensor(block, device="cpu"),
        block_keys=keys,
        block_tasks=block_tasks,
        scale=scale,
        sample_scale=scale[first_row] if same_inside else None,
        weight=present.to(torch.float64) / whole[first_row],
        rows_present=present.tolist(),
        mask=mask,
        packing=packing,
        inner_products=inner_products,
    )


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU, where a shape that depends on data would stall the host."""
    return tensor.is_cuda


def sum_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """``out[k] = sum over i with index[i] == k of values[i]``, in a fixed order: [count, ...] in values' dtype.

    values [n, ...] on any device, index [n] int64 on the CPU. On a GPU by sorted segments: adding by index there uses
    atomics, in an order that varies.
    """
    if not on_gpu(values):
        return values.new_zeros(count, *values.shape[1:]).index_add_(0, index, values)
    if count == len(index) and torch.equal(index, torch.arange(count, device="cpu")):
        return values
    order = to_device(torch.argsort(index, stable=True), values.device)
    lengths = to_device(torch.bincount(index, minlength=count), values.device)
    return torch.segment_reduce(values[order], "sum", lengths=lengths, unsafe=True, initial=0.0)

"""What follows the products (``csrc/reduce.cu``): the split-K fix-up, and the epilogue that adds in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..base import Results
from .launch import LaunchContext
from .schedule import Schedule

if TYPE_CHECKING:
    from .gram import GramPartials


class SquareSums(NamedTuple):
    """Partial sums of one launch, float32: squares of ``sample`` [rows, N] and ``group`` [rows', K], or None.

    ``products`` [slabs, K, K], or None: inner products of the groups' sums, by slabs of the weight. Those above the
    diagonal count.
    """

    sample: Tensor | None
    group: Tensor | None
    products: Tensor | None = None


def split_fixup(
    context: LaunchContext,
    workspace: Tensor,
    schedule: Schedule,
    weight_grad: Tensor | None,
    element: int,
    *,
    products: bool = False,
    sums: Tensor | None = None,
) -> SquareSums:
    """The squares of the inner sums over the splits, where these are samples', and of the groups'.

    ``workspace`` [splits + inner - 1, elements] holds each split's sums. ``products``: also the inner products of the
    groups' sums, of at most FIXUP_GROUPS groups. ``sums`` [K, at least elements] and ``weight_grad``, if given, are
    overwritten.
    """
    tables, split = schedule.fixup, schedule.wgrad
    assert tables is not None and split is not None
    elements = workspace.shape[1]
    width = elements if sums is None else sums.shape[1]
    rows = context.size("split_fixup_rows", width=width)
    sample_sq = None if tables.sample is None else workspace.new_empty(rows, schedule.samples)
    group_sq = workspace.new_empty(rows, schedule.groups)
    of_pairs = workspace.new_empty(rows, schedule.groups, schedule.groups) if products else None
    context.launch(
        "split_fixup",
        workspace=workspace,
        elements=elements,
        split_start=split.split_start,
        split_first=tables.first,
        split_last=tables.last,
        outer=tables.outer,
        inner_sample=tables.sample,
        inner=tables.outer.size,
        samples=schedule.samples,
        groups=schedule.groups,
        sample_sq=sample_sq,
        group_sq=group_sq,
        products=of_pairs,
        sums=sums,
        width=width,
        type=element,
        weight_grad=weight_grad,
    )
    return SquareSums(sample_sq, group_sq, of_pairs)


def finish(
    context: LaunchContext,
    results: Results,
    schedule: Schedule,
    *,
    of_wgrad: SquareSums | None = None,
    of_fixup: SquareSums | None = None,
    of_samples: GramPartials | None = None,
    of_groups: GramPartials | None = None,
    first: bool = True,
    last: bool = True,
) -> None:
    """Add one pass over rows of the weight to the results. After the ``last`` one all are NaN if values were wrong.

    ``of_samples`` and ``of_groups``, of all rows, count in the ``first`` pass; ``of_groups`` is pairwise where the Gram
    is wanted. ``first``: the results hold nothing yet. Of weight_grad only the first row becomes NaN.
    """
    wgrad, fixup = of_wgrad or SquareSums(None, None), of_fixup or SquareSums(None, None)
    tokens = schedule.tokens
    products = fixup.products
    pairwise = of_groups is not None and results.group_gram is not None
    weight_grad = results.weight_grad
    context.launch(
        "finish",
        state=schedule.state,
        info=schedule.info,
        samples=schedule.samples,
        groups=schedule.groups,
        wgrad_samples=wgrad.sample,
        wgrad_groups=wgrad.group,
        wgrad_rows=_rows(wgrad.sample),
        wgrad_group_rows=_rows(wgrad.group),
        fixup_samples=fixup.sample,
        fixup_groups=fixup.group,
        fixup_rows=_rows(fixup.group),
        gram_samples=None if of_samples is None else of_samples.partial,
        sample_span=None if tokens is None else tokens.sample_span,
        sample_reach=0 if of_samples is None else of_samples.reach,
        gram_groups=None if of_groups is None or pairwise else of_groups.partial,
        group_span=None if tokens is None else tokens.group_span,
        group_reach=0 if of_groups is None else of_groups.reach,
        pairs=of_groups.partial if of_groups is not None and pairwise else None,
        partials=0 if of_groups is None else len(of_groups.partial),
        products=products,
        slabs=0 if products is None else len(products),
        first=first,
        last=last,
        sample_sq=results.sample_sq,
        group_sq=results.group_sq,
        group_gram=results.group_gram,
        weight_grad=weight_grad,
        d_in=0 if weight_grad is None else weight_grad.shape[1],
    )


def _rows(partial: Tensor | None) -> int:
    return 0 if partial is None else partial.shape[0]


def finish_pairs(context: LaunchContext, gram: Tensor, schedule: Schedule, of_groups: GramPartials) -> None:
    """Fill ``gram`` [K, K] float64 from the pairwise partial sums of the groups."""
    groups_only = Schedule(
        0,
        schedule.groups,
        schedule.info,
        schedule.state.part(schedule.samples, schedule.groups),
        None,
        None,
        schedule.tokens,
    )
    nothing = gram.new_empty(0)
    finish(context, Results(nothing, gram.new_empty(len(gram)), None, gram), groups_only, of_groups=of_groups)


def token_sums(context: LaunchContext, values: Tensor, schedule: Schedule) -> Tensor:
    """``out[n] = sum over the tokens t of sample n of values[t]``: [N] float64, for ``values`` [T] float64.

    NaN where the values of index tensors were out of range.
    """
    tokens = schedule.tokens
    assert tokens is not None
    out = values.new_empty(schedule.samples)
    context.launch(
        "token_sums",
        values=values,
        token_row=tokens.row,
        sample_span=tokens.sample_span,
        info=schedule.info,
        samples=schedule.samples,
        out=out,
    )
    return out

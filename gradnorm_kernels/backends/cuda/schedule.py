"""The prologue of a call (``csrc/schedule.cu``): one launch that checks the segments and makes the kernels' tables.

It reads no value back, and no table has to be zeroed before or after it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...segments import PlainSegments, Segments
from .launch import LaunchContext, Table


class WgradTables(NamedTuple):
    """Segments without empty ones, and the splits that they are in; see WgradNorm in csrc/launchers.h.

    ``start``, ``end``, ``sample``, ``group``: [S + splits], used as far as ``split_start`` [splits + 1] says.
    ``sample`` is -1 where it is not measured. ``group`` is the inner sum that a segment belongs to.
    """

    start: Table
    end: Table
    sample: Table
    group: Table
    split_start: Table

    @property
    def splits(self) -> int:
        """The number of splits."""
        return self.split_start.size - 1


class FixupTables(NamedTuple):
    """Which splits hold an inner sum, and whose it is; see SplitFixup in csrc/launchers.h. All [inner].

    ``sample`` is None where inner sums are the groups'.
    """

    first: Table
    last: Table
    outer: Table
    sample: Table | None


class TokenTables(NamedTuple):
    """The tokens that are for the Gram, in the order of the segments; see Gram and Span in csrc/launchers.h.

    ``row``: [T]. ``sample_rank``, ``group_rank``: [T] or None. ``sample_span``: [N, 3]. ``group_span``: [K, 3] or None.
    ``total``: [1], how many there are. ``ranks``: the most samples, and the most groups, that have tokens.
    """

    row: Table
    sample_rank: Table | None
    group_rank: Table | None
    sample_span: Table
    group_span: Table | None
    total: Table
    ranks: tuple[int, int]


class Schedule(NamedTuple):
    """The tables of a call.

    ``info``: [2], 1 if the values of the index tensors were in range, else 0; and the number of tokens for the Gram.
    ``state``: [N + K], where the squared norm of each sample and then of each group is found.
    """

    samples: int
    groups: int
    info: Table
    state: Table
    wgrad: WgradTables | None
    fixup: FixupTables | None
    tokens: TokenTables | None


def segment_count(segments: Segments | PlainSegments) -> int:
    """S, the number of segments, empty ones included."""
    return segments.samples if isinstance(segments, PlainSegments) else segments.start.shape[0]


def build(
    context: LaunchContext,
    segments: Segments | PlainSegments,
    tokens: int,
    device: torch.device,
    *,
    gram_tokens: int,
    splits: int = 0,
    anywhere: bool = False,
    stored: bool = False,
    samples_by_gram: bool = False,
    groups_by_gram: bool = False,
) -> Schedule:
    """The schedule of at least one segment and at least one token. ``tokens`` is T.

    ``gram_tokens``: samples of at most so many tokens are for the Gram; 0: none.
    ``splits``: of the tokens for wgrad; 0: wgrad measures nothing, and ``gram_tokens`` must be T.
    ``anywhere``: splits end anywhere, and the inner sums are those of samples; otherwise splits end between samples,
    and the inner sums are those of groups. ``stored``: the inner sums are stored, for the split-K fix-up.
    ``samples_by_gram``, ``groups_by_gram``: make the ranks of samples and of groups, and the groups' spans.
    """
    samples, groups, count = segments.samples, segments.groups, segment_count(segments)
    by_gram = gram_tokens > 0
    inner = min(samples, count) if anywhere else groups
    places, size = _layout(
        samples,
        groups,
        count,
        tokens if by_gram else 0,
        splits,
        inner if stored else 0,
        anywhere,
        samples_by_gram,
        groups_by_gram,
    )
    memory = torch.empty(size, dtype=torch.int32, device=device)
    out = {name: None if place is None else Table(memory, *place) for name, place in places.items()}
    context.launch(
        "schedule",
        **_given(segments),
        segments=count,
        samples=samples,
        groups=groups,
        tokens=tokens,
        gram_tokens=gram_tokens,
        splits=splits,
        anywhere=anywhere,
        stored=stored,
        inner=inner,
        **out,
    )

    def table(name: str) -> Table:
        found = out[name]
        assert found is not None
        return found

    wgrad: WgradTables | None = None
    fixup: FixupTables | None = None
    of_gram: TokenTables | None = None
    if splits:
        start, end, sample, group = (table(f"segment_{name}") for name in ("start", "end", "sample", "group"))
        wgrad = WgradTables(start, end, sample, group, table("split_start"))
    if stored:
        fixup = FixupTables(table("split_first"), table("split_last"), table("outer"), out["inner_sample"])
    info = table("info")
    if by_gram:
        ranks = min(samples, count), min(groups, count)
        of_gram = TokenTables(
            table("token_row"),
            out["sample_rank"],
            out["group_rank"],
            table("sample_span"),
            out["group_span"],
            info.part(1, 1),
            ranks,
        )
    return Schedule(samples, groups, info, table("state"), wgrad, fixup, of_gram)


# A call's layout is that of the next layer of the same shape: counting it again would take longer than a launch.
@lru_cache(maxsize=4096)
def _layout(
    samples: int,
    groups: int,
    segments: int,
    gram_tokens: int,
    splits: int,
    inner: int,
    anywhere: bool,
    samples_by_gram: bool,
    groups_by_gram: bool,
) -> tuple[dict[str, tuple[int, int] | None], int]:
    """(where in the memory each table starts and how many elements it has, None without any; the memory's elements).

    ``gram_tokens``: tokens that may be for the Gram. ``inner``: of the inner sums that are stored. Each starts at a
    multiple of 16 bytes.
    """
    pieces = segments + splits if splits else 0
    sizes = {
        "workspace": 7 * (segments + 1),
        "spans": 2 * samples,
        "info": 2,
        "state": samples + groups,
        "segment_start": pieces,
        "segment_end": pieces,
        "segment_sample": pieces,
        "segment_group": pieces,
        "split_start": splits + 1 if splits else 0,
        "split_first": inner,
        "split_last": inner,
        "outer": inner,
        "inner_sample": inner if anywhere else 0,
        "token_row": gram_tokens,
        "sample_rank": gram_tokens if samples_by_gram else 0,
        "group_rank": gram_tokens if groups_by_gram else 0,
        "sample_span": 3 * samples if gram_tokens else 0,
        "group_span": 3 * groups if groups_by_gram else 0,
    }
    places: dict[str, tuple[int, int] | None] = {}
    at = 0
    for name, size in sizes.items():
        places[name] = (at, size) if size else None
        at += -(-size // 4) * 4
    return places, at


def _given(segments: Segments | PlainSegments) -> dict[str, object]:
    """The fields of the launch that say which rows are whose."""
    if isinstance(segments, PlainSegments):
        offsets = segments.offsets
        wide = offsets is not None and offsets.dtype == torch.int64
        ids = dict.fromkeys(("end", "sample", "group", "valid"))
        return {"start": offsets, "wide": wide, "length": segments.length, **ids}
    valid = None if segments.valid is None else segments.valid.view(torch.uint8)
    given = {name: getattr(segments, name) for name in ("start", "end", "sample", "group")}
    return {**given, "valid": valid, "wide": True, "length": 0}

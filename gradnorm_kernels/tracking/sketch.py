"""``accumulate="sketch"``: a random projection of each sample's gradient, kept over micro-batches, added over ranks.

``S_p = C_rows^T G_p C_columns / sqrt(r_rows r_columns)`` for every weight [rows, columns], with independent entries of
+-1 in both C. Then ``E<S_p, S_q> = <G_p, G_q>`` for any two samples, so that every pair of different samples of a step
counts, in whatever micro-batches and on whatever ranks their rows are, and U stays unbiased (docs/mathematics.md).

The projections follow from the parameter's name and the step's number alone: they are the same on every rank and after
a resume, and other ones in the next step. A side that is no wider than its r is not projected. Parameters of one
dimension are kept whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.torch.numerics import exact_matmuls
from ..estimation.moments import PairSums
from ..ops import grad_sketch
from ..segments import to_device
from . import distributed
from .parameter_gram import Tokens
from .rows import Rows, sum_by

#: The default width of a projection where up to ``_WEIGHTS`` matrices are measured, and the narrowest default.
_WIDTH, _WEIGHTS, _NARROWEST = 128, 4, 16
#: Columns of the sketches that are widened to float64 at a time.
_COLUMNS = 1 << 14


def default_width(weights: int) -> int:
    """``128 sqrt(4 / weights)``, rounded up to a multiple of 16, for ``weights`` measured matrices: 16 to 128.

    The layers' projections are independent, so the variance that they add to an inner product of whole gradients is of
    the order of ``1 / (weights r^2)``: this keeps it at that of four matrices at r = 128.
    """
    wanted = _WIDTH * math.sqrt(_WEIGHTS / max(weights, 1))
    return min(_WIDTH, max(_NARROWEST, 16 * math.ceil(wanted / 16)))


class Projections:
    """The projections of one step."""

    def __init__(self, width: int, step: int) -> None:
        self.width, self.step = width, step
        self._made: dict[tuple[Any, ...], tuple[Tensor | None, Tensor | None]] = {}

    def of(
        self, name: str, shape: tuple[int, int], shards: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(C_rows [rows, r], C_columns [columns, r]) of +-1 in ``like``'s dtype and device; None for a side kept whole.

        ``shards``: which shards of the matrix this rank has, as its ranks in the groups that share it.
        """
        key = (name, shape, shards, like.dtype, like.device)
        if key not in self._made:
            seed = hashlib.blake2b(f"{self.step} {shards} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(seed, "little") >> 1)
            rows, columns = (self._signs(size, generator, like) for size in shape)
            self._made[key] = rows, columns
        return self._made[key]

    def _signs(self, size: int, generator: torch.Generator, like: Tensor) -> Tensor | None:
        if size <= self.width:
            return None
        # 64 signs per random number: an eighth of a byte each to draw and to copy.
        low, high = -(1 << 63), (1 << 63) - 1
        shape = (size, math.ceil(self.width / 64))
        words = torch.randint(low, high, shape, generator=generator, dtype=torch.int64, device="cpu")
        bits = to_device(words, like.device)[:, :, None] >> torch.arange(64, device=like.device) & 1
        return (1 - 2 * bits.flatten(1)[:, : self.width]).to(like.dtype)


class Sketch(NamedTuple):
    """One parameter's sketches of N samples: [N, r_rows, r_columns], or [N, d] of a parameter of one dimension.

    ``projected``: whether the rows are, and the columns.
    """

    values: Tensor
    projected: tuple[bool, bool]


class MicrobatchSketches:
    """The sketches of one micro-batch's samples, which enter the step's when the micro-batch is complete."""

    def __init__(self, rows: Rows, projections: Projections) -> None:
        self._rows, self._projections = rows, projections
        self._found: dict[str, Sketch] = {}

    def add_weight(self, name: str, tokens: Tokens, groups: tuple[Any, ...], vocabulary: int) -> None:
        """Add one use of a weight: ``sum over the sample's tokens of scale (C_rows^T dy)(C_columns^T x)^T``.

        ``groups``: over which the weight is sharded. ``vocabulary``: rows of the matrix, where the tokens are an
        embedding's. The matrices of experts, of which there are ``vocabulary``, are one below the other.
        """
        x, dy, width = tokens.x, tokens.dy, tokens.dy.shape[1]
        matrices = 1 if tokens.expert is None else vocabulary
        shape = (vocabulary, width) if tokens.embedding else (matrices * width, x.shape[1])
        shards = tuple(map(distributed.rank, groups))
        of_rows, of_columns = self._projections.of(name, shape, shards, dy)
        factors, owner, scale = self._owners(tokens)
        cu_seqlens = torch.nn.functional.pad(tokens.lengths.cumsum(0), (1, 0))
        if tokens.embedding:
            # one_hot(id) C_rows is a row of C_rows, and the two sides change places.
            dy = torch.where((x >= 0)[:, None], dy, 0.0)
            ids = x.clamp_min(0)
            x = torch.nn.functional.one_hot(ids, vocabulary).to(dy.dtype) if of_rows is None else of_rows[ids]
            found = grad_sketch(x, dy, None, of_columns, cu_seqlens, sample_ids=owner, num_samples=len(factors)).mT
        elif tokens.expert is not None:
            dy = _along_experts(tokens, of_rows, matrices)
            x = x.to(dy.dtype)
            found = grad_sketch(x, dy, of_columns, None, cu_seqlens, sample_ids=owner, num_samples=len(factors))
        else:
            x = x.to(dy.dtype)
            found = grad_sketch(x, dy, of_columns, of_rows, cu_seqlens, sample_ids=owner, num_samples=len(factors))
        for side in (of_rows, of_columns):
            factors = factors / math.sqrt(1 if side is None else side.shape[1])
        found = found * to_device(factors, found.device).to(found.dtype)[:, None, None]
        if scale:
            found = sum_by(found, tokens.row_sample, self._rows.num_samples)
        self._add(name, Sketch(found, (of_rows is not None, of_columns is not None)))

    def _owners(self, tokens: Tokens) -> tuple[Tensor, Tensor, bool]:
        """(factors, the owner of each row, whether owners are rows): rows of one sample may need different factors."""
        count = self._rows.num_samples
        factors = torch.ones(count, dtype=torch.float64, device="cpu")
        factors[tokens.row_sample] = tokens.scale
        if torch.equal(factors[tokens.row_sample], tokens.scale):
            return factors, tokens.row_sample, False
        return tokens.scale, torch.arange(len(tokens.scale), device="cpu"), True

    def add_vector(self, name: str, grads: Tensor) -> None:
        """Add a small parameter's gradients of the N samples, [N, d]."""
        self._add(name, Sketch(grads, (False, False)))

    def _add(self, name: str, more: Sketch) -> None:
        known = self._found.get(name)
        self._found[name] = more if known is None else more._replace(values=known.values + more.values)

    def complete(self, step: StepSketches, skipped: Iterable[str]) -> None:
        """Enter the step's sketches, but for the parameters that are left out."""
        left_out = set(skipped)
        for name, sketch in self._found.items():
            if name not in left_out:
                step.add(name, sketch, self._rows.samples)


def _along_experts(tokens: Tokens, of_rows: Tensor | None, count: int) -> Tensor:
    """[T, r_rows] float32 or wider: each token's dy, at the rows of its expert's matrix, projected."""
    wide, width = torch.promote_types(tokens.dy.dtype, torch.float32), tokens.dy.shape[1]
    rows = count * width if of_rows is None else of_rows.shape[1]
    found = torch.zeros(len(tokens.dy), rows, dtype=wide, device=tokens.dy.device)
    token = 0
    for expert, own in tokens.by_expert():
        part, own_rows = slice(token, token + len(own.dy)), slice(expert * width, (expert + 1) * width)
        if of_rows is None:
            found[part, own_rows] = own.dy.to(wide)
        else:
            with exact_matmuls(found.device):
                found[part] = own.dy.to(wide) @ of_rows[own_rows].to(wide)
        token = part.stop
    return found


@dataclass
class StepSketches:
    """The sketches of the samples seen in a step so far on this rank, by the parameter's name."""

    _values: dict[str, dict[Hashable, Tensor]] = field(default_factory=dict)
    _projected: dict[str, tuple[bool, bool]] = field(default_factory=dict)

    def add(self, name: str, sketch: Sketch, samples: Sequence[Hashable]) -> None:
        """Add one micro-batch's part of the samples' sketches of a parameter."""
        self._projected[name] = sketch.projected
        own = self._values.setdefault(name, {})
        for sample, value in zip(samples, sketch.values, strict=True):
            own[sample] = own[sample] + value if sample in own else value

    def reset(self) -> None:
        """Forget the samples."""
        self._values, self._projected = {}, {}

    def layout(self) -> dict[str, tuple[Any, ...]]:
        """{parameter: (shape, dtype, type of device, projected)} of what was seen."""
        first = {name: next(iter(own.values())) for name, own in self._values.items() if own}
        return {
            name: (tuple(one.shape), one.dtype, one.device.type, self._projected[name]) for name, one in first.items()
        }

    def whole(
        self,
        layouts: Sequence[Mapping[str, tuple[Any, ...]]],
        samples: Sequence[Hashable],
        mine: Mapping[Hashable, Hashable],
        group: Any,
        shards: Mapping[str, tuple[Any, ...]],
    ) -> Iterator[tuple[str, Sketch, tuple[Any, ...]]]:
        """(name, sketches of all ranks' samples, groups of its shards) of each parameter, in the order of names.

        ``layouts``: every rank's. ``samples``: of all ranks. ``mine``: {sample of this rank: its name here}.
        ``shards``: {parameter: the groups over which it is sharded}.

        Raises:
            RuntimeError: the ranks' sketches do not belong together.
        """
        known: dict[str, tuple[Any, ...]] = {}
        for found in layouts:
            for name, form in found.items():
                if known.setdefault(name, form) != form:
                    raise RuntimeError(
                        f"ranks have different sketches of {name!r}: {known[name]} and {form}; make every rank's "
                        "tracker with the same options and layers"
                    )
        for name in sorted(known):
            shape, dtype, device, projected = known[name]
            own = self._values.get(name, {})
            zero = torch.zeros(shape, dtype=dtype, device=device)
            values = torch.stack([own.get(mine[sample], zero) if sample in mine else zero for sample in samples])
            if group is not None:
                distributed.sum_over([values], group)
            yield name, Sketch(values, projected), shards.get(name, ())


class SketchSums(NamedTuple):
    """A step's sketches as the estimator needs them.

    ``pairs``: the sums of its one "micro-batch" of all samples. ``sample_sq`` [N] float64: the samples' own squares.
    ``variance`` [K, K] float64: the estimated variance that the projections add to the tasks'
    ``sum over pairs of <S_p, S_q>``.
    """

    pairs: PairSums
    sample_sq: Tensor
    variance: Tensor


def sketch_sums(
    sketches: Iterable[tuple[str, Sketch, tuple[Any, ...]]],
    shares: Sequence[float],
    sample_task: Sequence[int],
    num_tasks: int,
    blocks: tuple[Sequence[int], Sequence[Hashable]],
) -> SketchSums:
    """Add up the parameters' Grams over N samples.

    ``shares``, ``sample_task`` [N]: the share of each sample's rows that was seen, and its task. ``blocks``: the block
    of each sample, and the blocks' keys.
    """
    block, keys = torch.tensor(blocks[0], dtype=torch.long, device="cpu"), blocks[1]
    task = torch.tensor(sample_task, dtype=torch.long, device="cpu")
    count = len(keys)
    gram = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    sample_sq = torch.zeros(len(sample_task), dtype=torch.float64, device="cpu")
    variance = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device="cpu")
    for _, sketch, groups in sketches:
        parts = [*_gram(sketch.values, block, count), _variance(sketch, task, num_tasks)]
        for shards in groups:
            distributed.sum_over(parts, shards)
        for total, part in zip((gram, sample_sq, variance), parts, strict=True):
            total += part.cpu()
    weights = torch.tensor(shares, dtype=torch.float64, device="cpu")
    weight, weight_sq, self_sq = (sum_by(w, block, count) for w in (weights, weights**2, sample_sq))
    block_task = torch.zeros(count, dtype=torch.long, device="cpu").scatter_(0, block, task)
    pairs = PairSums(gram, self_sq, weight, weight_sq, block_task, keys)
    return SketchSums(pairs, sample_sq, variance.clamp_min(0.0))


def _gram(values: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(inner products of the blocks' sums [count, count], the samples' own squares [N]), float64 on values' device."""
    flat = values.flatten(1)
    gram = torch.zeros(count, count, dtype=torch.float64, device=flat.device)
    sample_sq = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for lo in range(0, flat.shape[1], _COLUMNS):
        part = flat[:, lo : lo + _COLUMNS].double()
        sample_sq += part.square().sum(1)
        sums = sum_by(part, block, count)
        gram += sums @ sums.T
    return gram, sample_sq


def _variance(sketch: Sketch, task: Tensor, num_tasks: int) -> Tensor:
    """[K, K] float64: an unbiased estimate of the variance of ``sum over pairs of <S_p, S_q>`` over projections.

    The sum is one of terms f(u_a, v_b) over the columns u_a of C_rows and v_b of C_columns, which are independent draws
    of one distribution: the variance of its row sums and that of its column sums, less that of the interaction, which
    both contain.
    """
    found = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=sketch.values.device)
    if not any(sketch.projected):
        return found
    values = sketch.values.double()
    sums, squares = sum_by(values, task, num_tasks), sum_by(values.square(), task, num_tasks)
    for a in range(num_tasks):
        terms = sums[a] * sums
        terms[a] -= squares[a]
        found[a] = _variance_of_total(terms, *sketch.projected)
    return found


def _variance_of_total(terms: Tensor, rows: bool, columns: bool) -> Tensor:
    """[K]: the variance of ``terms.sum((1, 2))``, terms [K, m, n], where the rows, the columns or both are random."""
    m, n = terms.shape[1:]
    by_row, by_column = terms.sum(2), terms.sum(1)
    of_rows = m / (m - 1) * (by_row - by_row.mean(1, keepdim=True)).square().sum(1) if rows else 0.0
    of_columns = n / (n - 1) * (by_column - by_column.mean(1, keepdim=True)).square().sum(1) if columns else 0.0
    if not (rows and columns):
        return of_rows + of_columns  # type: ignore[return-value]
    mean = terms.mean((1, 2), keepdim=True)
    rest = terms - by_row[:, :, None] / n - by_column[:, None, :] / m + mean
    return of_rows + of_columns - m * n / ((m - 1) * (n - 1)) * rest.square().sum((1, 2))  # type: ignore[operator]

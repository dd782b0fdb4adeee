"""The tracker's own total gradient of each measured parameter, compared with what autograd accumulated.

With random u and v, ``u^T dW v = sum_t (u . dy_t)(x_t . v)``, so that dW of the recorded tokens is never formed. The
two sides differ where a use of the parameter was not seen (a functional call, a tied head, a regulariser in the loss),
where tokens were lost or where x and dy do not belong together. Autograd's side is taken by a hook on the parameter,
which fires once per engine pass with the sum over the uses in that pass, before it is accumulated into ``.grad`` and
before ranks reduce it. Both sides are computed without the caller's autocast, which may be on during backward too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends.torch.numerics import exact_matmuls
from ..segments import to_device
from ..tolerances import relative, rounding
from .parameter_gram import Tokens

PROJECTIONS = 4
_CHUNK = 8192  # rows of a gradient converted to a wider dtype at once


@dataclass
class _Totals:
    """One parameter: projections of both sides [PROJECTIONS] and what their rounding is measured against."""

    parameter: Tensor
    mine: Tensor | None = None
    theirs: Tensor | None = None
    norm: Tensor | None = None  # ||dW||_F of autograd's side, summed over passes
    noise: Tensor | None = None  # of the recorded side's sum, by rounding
    dtypes: set[torch.dtype] = field(default_factory=set)


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """(rows, columns): a parameter of one dimension is one row, the matrices of experts [E, a, b] are E a rows."""
    if parameter.dim() <= 1:
        return 1, parameter.numel()
    return parameter.shape[:-1].numel(), parameter.shape[-1]


#: Why a parameter is refused whose gradient comes from elsewhere alone.
ELSEWHERE = "autograd computed a gradient for it, but none of its uses was a call of its layer that could be measured"


class Arrivals:
    """Which parameters autograd computes a gradient of in one micro-batch; :meth:`close` removes the hooks."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names: set[str] = set()
        self._handles = [parameter.register_hook(self._hook(name)) for name, parameter in parameters.items()]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda grad: self.names.add(name)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class Reconciliation:
    """Both sides of the comparison for one micro-batch; :meth:`close` removes the hooks."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """``parameters``: {name: leaf tensor that trains}."""
        self._totals = {name: _Totals(parameter) for name, parameter in parameters.items()}
        self._remove: list[Callable[[], None]] = []
        for name, parameter in parameters.items():
            handle = parameter.register_hook(self._hook(name))
            # Before the caller's own hooks: those may change the gradient.
            hooks = parameter._backward_hooks
            assert hooks is not None
            others = [item for item in hooks.items() if item[0] != handle.id]
            for key, _ in others:
                del hooks[key]
            hooks.update(others)
            self._remove.append(handle.remove)

    def close(self) -> None:
        """Remove the hooks."""
        for remove in self._remove:
            remove()
        self._remove = []

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            with torch.no_grad(), exact_matmuls(grad.device):
                self._add_theirs(name, grad.detach())

        return hook

    def _directions(self, name: str, size: int, side: str, like: Tensor) -> Tensor:
        """[PROJECTIONS, size] standard normal, the same at every call; no random state of the caller is used."""
        generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{side}{size}{name}".encode()))
        normal = torch.randn(PROJECTIONS, size, generator=generator, dtype=torch.float32, device="cpu")
        return to_device(normal, like.device).to(torch.promote_types(like.dtype, torch.float32))

    def _add_theirs(self, name: str, grad: Tensor) -> None:
        totals = self._totals[name]
        matrix = grad.reshape(_matrix_shape(totals.parameter))
        wide = torch.promote_types(grad.dtype, torch.float32)
        u, v = self._pair(name, totals.parameter, matrix)
        seen = torch.zeros(PROJECTIONS, dtype=torch.float64, device=grad.device)
        square = torch.zeros((), dtype=torch.float64, device=grad.device)
        for start in range(0, matrix.shape[0], _CHUNK):
            part = matrix[start : start + _CHUNK].to(wide)
            seen += (u[:, start : start + _CHUNK] * (v @ part.T)).sum(1, dtype=torch.float64)
            square += part.square().sum(dtype=torch.float64)
        totals.theirs = seen if totals.theirs is None else totals.theirs + seen
        totals.norm = square.sqrt() if totals.norm is None else totals.norm + square.sqrt()
        totals.dtypes.add(totals.parameter.dtype)

    def _pair(self, name: str, parameter: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of a parameter's rows and columns."""
        rows, columns = _matrix_shape(parameter)
        u = self._directions(name, rows, "u", like)
        return (torch.ones_like(u) if parameter.dim() <= 1 else u), self._directions(name, columns, "v", like)

    def _add_mine(self, name: str, mine: Tensor, noise: Tensor, dtype: torch.dtype) -> None:
        totals = self._totals[name]
        totals.mine = mine if totals.mine is None else totals.mine + mine
        totals.noise = noise if totals.noise is None else totals.noise + noise
        totals.dtypes.add(dtype)

    def add_weight(self, name: str, tokens: Tokens, factor: float, *, transposed: bool) -> None:
        """The recorded tokens of one use. ``transposed``: the parameter is [d_in, d_out], as GPT-2's is."""
        if name not in self._totals:
            return
        dy, x = tokens.dy, tokens.x
        wide = torch.promote_types(dy.dtype, torch.float32)
        rows, columns = self._pair(name, self._totals[name].parameter, dy)
        with exact_matmuls(dy.device):
            if tokens.embedding:
                along_x = torch.where(x >= 0, rows[:, x.clamp_min(0)], 0.0)
                along_dy = columns @ dy.to(wide).T
            elif tokens.expert is not None:
                inputs, outputs = (dy, x) if transposed else (x, dy)
                along_x, along_dy = columns @ inputs.to(wide).T, self._along_rows(rows, tokens, outputs.to(wide))
            else:
                u, v = (columns, rows) if transposed else (rows, columns)
                along_x, along_dy = v @ x.to(wide).T, u @ dy.to(wide).T
        products = (along_x * along_dy).double() * factor
        self._add_mine(name, products.sum(1), 16 * rounding(wide) * products.abs().sum(1).mean(), dy.dtype)

    def _along_rows(self, rows: Tensor, tokens: Tokens, values: Tensor) -> Tensor:
        """[PROJECTIONS, T]: values [T, a] along the part of ``rows`` [PROJECTIONS, E a] of each token's expert."""
        assert tokens.expert is not None
        found = rows.new_empty(len(rows), len(values))
        token, width = 0, values.shape[1]
        for expert, own in tokens.by_expert():
            part = slice(token, token + len(own.dy))
            found[:, part] = rows[:, expert * width : (expert + 1) * width] @ values[part].T
            token = part.stop
        return found

    def add_vector(self, name: str, total: Tensor, dy: Tensor) -> None:
        """The recorded total gradient of a small parameter, and the output gradients of which it is a sum."""
        if name not in self._totals:
            return
        _, v = self._pair(name, self._totals[name].parameter, total)
        wide = torch.promote_types(dy.dtype, torch.float32)
        sizes = dy.reshape(-1, dy.shape[-1]).to(wide).norm(dim=-1).double()
        # Autograd adds up in float32 or wider what it may have rounded to dy's dtype.
        noise = 16 * rounding(torch.float32) * sizes.sum() + 4 * rounding(dy.dtype) * sizes.norm()
        self._add_mine(name, (v * total.reshape(1, -1)).sum(1), noise, dy.dtype)
        self._totals[name].dtypes.add(torch.float32)  # norms compute in it whatever their dtype is

    def verdicts(self) -> dict[str, str | None]:
        """{parameter: None where both sides agree, else what is wrong}. Not in it: no gradient, or not a finite one."""
        found: dict[str, str | None] = {}
        for name, totals in self._totals.items():
            if totals.theirs is None or totals.norm is None:
                continue
            if totals.mine is None or totals.noise is None:
                found[name] = ELSEWHERE
                continue
            norm, noise = float(totals.norm), float(totals.noise)
            difference = float((totals.mine.double().cpu() - totals.theirs.cpu()).square().mean().sqrt())
            if not (difference < float("inf") and norm < float("inf")):
                continue
            if difference > relative(*totals.dtypes) * norm + noise:
                share = f", {difference / norm:.0%} of autograd's" if norm else ""
                found[name] = f"the gradient recorded for it differs from autograd's by {difference:.3g}{share}"
            elif norm > 10 * noise and norm > 0:  # else the gradient is nothing but rounding: not a test of anything
                found[name] = None
        return found

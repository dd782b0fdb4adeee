"""How far two computations of a number may differ by rounding, by dtype: one table for checks, tests, benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

#: Squared norms and inner products, relative to the largest squared norm among those compared. Products accumulate in
#: float32 whatever the inputs are, so half-precision inputs are held to the tolerance of float32 inputs.
NORMS = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}

#: What tensor cores may add to that, per product in a chain that goes through one float32 accumulator. They add 16
#: products per step and are reported to truncate the sum where a processor rounds it to nearest (Fasi et al. 2021,
#: PeerJ Computer Science 7:e330), so the errors do not cancel. A model of such sums of random products, not a
#: measurement, puts the relative error of a squared norm at -3e-9 per product; this is twice that.
TRUNCATED = 6e-9

#: ``weight_grad``, relative to its largest element: one rounding to the inputs' dtype.
WEIGHT_GRAD = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


def norms(dtype: torch.dtype, device: torch.device, chain: int) -> float:
    """``max(NORMS[dtype], TRUNCATED * chain)`` for half precision on a GPU, where tensor cores add; else ``NORMS``.

    Args:
        dtype: of the inputs.
        device: where the result was computed.
        chain: products that go through one accumulator: the tokens of a sample; the features of a token where norms
            come from inner products; the tokens of all samples for a sum over samples.

    Returns:
        The tolerance, relative to the largest squared norm.
    """
    truncated = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return max(NORMS[dtype], TRUNCATED * chain if truncated else 0.0)


#: ||a - b|| / ||b|| of two computations of one tensor in a model's own dtypes, whose operands are of this dtype.
RELATIVE = {
    torch.float64: 1e-6,  # many modules compute in float32 whatever their dtype is
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}


def relative(*dtypes: torch.dtype) -> float:
    """The tolerance of the coarsest of several dtypes."""
    return max(RELATIVE.get(dtype, RELATIVE[torch.bfloat16]) for dtype in dtypes)


def rounding(*dtypes: torch.dtype) -> float:
    """The unit roundoff of the coarsest of several floating-point dtypes."""
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def difference(found: Tensor, expected: Tensor, tolerance: float, scale: Tensor | float | None = None) -> str | None:
    """How ``found`` differs from ``expected`` by more than ``tolerance * scale``; None if it does not.

    Both must be finite in the same places.

    Args:
        found: what was computed, on any device and of any dtype.
        expected: float64, on the CPU.
        tolerance: relative to ``scale``.
        scale: of one element or of the expected shape. Default: the largest finite expected value.

    Returns:
        What was found and expected at the worst place, as the end of a sentence.
    """
    shape = tuple(expected.shape)
    if tuple(found.shape) != shape:
        return f"has shape {tuple(found.shape)}, not {shape}"
    found, finite = found.cpu().double(), expected.isfinite()
    wrong = found.isfinite() != finite
    if wrong.any():
        return f"not finite where it should be, or the other way: {_at(wrong, found, expected)}"
    if not finite.any():
        return None
    largest = expected[finite].abs().max() if scale is None else scale
    bound = torch.as_tensor(largest, device="cpu").expand_as(expected).where(finite, 1.0)
    error = (found - expected).abs().where(finite, 0.0)
    bad = ~(error <= tolerance * bound)
    if not bad.any():
        return None
    worst = (error / bound).nan_to_num(nan=torch.inf).where(bad, -1.0)
    return (
        f"off by {worst.max():.2e} of its scale, {tolerance:.1e} allowed: "
        f"{_at(worst == worst.max(), found, expected)}; {int(bad.sum())} of {bad.numel()} elements are off, "
        f"shape {shape}"
    )


def _at(places: Tensor, found: Tensor, expected: Tensor) -> str:
    """The first of the places, with what was found and expected there."""
    place = tuple(places.nonzero()[0].tolist())
    return f"found {found[place]:.8g}, expected {expected[place]:.8g} at {place}"

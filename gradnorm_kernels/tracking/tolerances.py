"""How far two computations of the same tensor may differ by rounding, by dtype: one table for all verifications."""

from __future__ import annotations

import torch

#: ||a - b|| / ||b|| of two computations of one tensor whose operands are of this dtype.
RELATIVE = {
    torch.float64: 1e-8,
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

"""How far a result may be from the float64 reference: one table, by the dtype of the inputs."""

from __future__ import annotations

import torch

#: Squared norms and inner products, relative to the largest squared norm among those compared. Products accumulate in
#: float32 whatever the inputs, so half-precision inputs are held to what float32 inputs are.
NORMS = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}

#: What tensor cores may add to that, for each product in a chain that goes through one float32 accumulator. They add
#: 16 products a step and are reported to cut the sum off where a processor rounds it to the nearest (Fasi et al. 2021,
#: PeerJ Computer Science 7:e330), so that errors do not cancel. A model of such sums of random products, not a
#: measurement, puts a squared norm's relative error at -3e-9 a product: this is twice that.
TRUNCATED = 6e-9

#: ``weight_grad``, relative to its largest element: one rounding to the inputs' dtype.
WEIGHT_GRAD = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


def norms(dtype: torch.dtype, device: torch.device, chain: int) -> float:
    """``NORMS``, or what chains of ``chain`` products may need where tensor cores add them up: on a GPU, but float32.

    A chain is as long as a sample has tokens, or as a token has features where norms come from inner products; that of
    a sum over samples is as long as its tokens.
    """
    truncated = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return max(NORMS[dtype], TRUNCATED * chain if truncated else 0.0)

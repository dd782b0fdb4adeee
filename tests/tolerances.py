"""How far a result may be from the float64 reference: one table, by the dtype of the inputs."""

from __future__ import annotations

import torch

#: Squared norms and inner products, relative to the largest squared norm among those compared. Products accumulate in
#: float32 whatever the inputs, so half-precision inputs are held to what float32 inputs are.
NORMS = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}

#: ``weight_grad``, relative to its largest element: one rounding to the inputs' dtype.
WEIGHT_GRAD = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}

"""How hard each task pulls on a shared model: per-sample gradient norms from the weight-gradient GEMM, without bias."""

from __future__ import annotations

from .control.sampler import TaskSampler
from .estimation.estimator import CrossProduct, RunningEstimate, TaskGradient, cross_product
from .estimation.interval import ConfidenceInterval, confidence_interval
from .ops import FusedGradNorm, fused_grad_norm, grad_dot, grad_gram, grad_sketch
from .tracking.accumulate import StepPlan
from .tracking.packing import cu_seqlens_from_position_ids
from .tracking.tracker import GradNormTracker, StepStats

__version__ = "0.1.0"

__all__ = [
    "ConfidenceInterval",
    "CrossProduct",
    "FusedGradNorm",
    "GradNormTracker",
    "RunningEstimate",
    "StepPlan",
    "StepStats",
    "TaskGradient",
    "TaskSampler",
    "confidence_interval",
    "cross_product",
    "cu_seqlens_from_position_ids",
    "fused_grad_norm",
    "grad_dot",
    "grad_gram",
    "grad_sketch",
]

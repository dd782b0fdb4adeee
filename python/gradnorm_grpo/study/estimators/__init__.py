"""Estimators of a task's squared gradient norm side by side on stored rollouts, and sketches of the gradients."""

from .comparison import compare, estimators

__all__ = ["compare", "estimators"]

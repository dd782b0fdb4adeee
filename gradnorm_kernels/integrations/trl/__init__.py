"""TRL's GRPOTrainer and SFTTrainer: :func:`attach` measures tasks, draws them and corrects their imbalance."""

from __future__ import annotations

from .attach import attach

__all__ = ["attach"]

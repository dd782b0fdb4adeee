"""TRL's GRPOTrainer and SFTTrainer: :func:`attach` measures tasks, draws them and corrects their imbalance."""

from __future__ import annotations

from .attach import attach
from .packing import pack_train_dataset

__all__ = ["attach", "pack_train_dataset"]

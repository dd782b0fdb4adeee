"""Multi-task GRPO that measures how hard each task pulls: `train_grpo.py train|probe|report`, see --help."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("gradnorm_kernels") is None:  # a checkout that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gradnorm_grpo.cli import main
from gradnorm_grpo.threads import wait_passively

if __name__ == "__main__":
    wait_passively()  # before the command imports torch: OpenMP reads its settings once
    sys.exit(main())

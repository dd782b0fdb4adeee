"""Multi-task GRPO that measures how hard each task pulls: `train_grpo.py train|probe|report`, see --help."""

from __future__ import annotations

import sys

from gradnorm_grpo.cli import main

if __name__ == "__main__":
    sys.exit(main())

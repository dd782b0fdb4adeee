"""What a run says about settings that bend the measurement."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from gradnorm_grpo.parse import parse_settings
from gradnorm_grpo.train import remarks


def said(*arguments: str) -> str:
    return " ".join(remarks(parse_settings(["--preset", "tiny", *arguments])[0], 6))


def test_remarks_name_the_setting() -> None:
    assert said() == ""
    assert "sampling_floor 0.01 may leave a task with" in said("--sampling_floor", "0.01")
    assert said("--sampling_floor", "0.01", "--sampling_strategy", "uniform") == ""
    assert "scale_rewards 'batch'" in said("--scale_rewards", "batch")
    assert "measured in the first iteration" in said("--num_iterations", "2")
    assert said("--num_iterations", "2", "--scale_rewards", "batch", "--track", "false") == ""

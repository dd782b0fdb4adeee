"""TRL's own GRPO and SFT tests, run from TRL's sources with and without attach(...) on every trainer."""

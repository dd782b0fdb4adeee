"""Measured constants and launch configs: costs, every backend's tiles, the autotuner, the GPU timer, ``configs/``."""

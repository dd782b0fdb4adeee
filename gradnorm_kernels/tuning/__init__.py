"""Measured constants, tile configurations and the command that finds them on a GPU."""

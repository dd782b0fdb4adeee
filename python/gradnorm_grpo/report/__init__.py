"""The report of a run: one HTML page and one table in the terminal, both from the run's folder alone."""

from __future__ import annotations

from .page import write_report
from .table import print_table

__all__ = ["print_table", "write_report"]

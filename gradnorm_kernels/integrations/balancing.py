"""``TaskBalancer`` under the name it had before it moved to :mod:`gradnorm_kernels.control`."""

from __future__ import annotations

from ..control.balancer import TaskBalancer

__all__ = ["TaskBalancer"]

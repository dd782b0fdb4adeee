"""verl: the actor's update measured, and prompts drawn by task. Written against verl 0.9.1."""

from .attach import Attachment, attach, measure_actor
from .draw import DrawnRows, draw_tasks
from .loss_scale import row_scale

__all__ = ["Attachment", "DrawnRows", "attach", "draw_tasks", "measure_actor", "row_scale"]

"""Tasks: GLUE by name from the hub, local files and folders, and the embedded demo; tokenising and metrics."""

from ticketops.tasks.demo import demo_model
from ticketops.tasks.glue import GLUE
from ticketops.tasks.loading import load_task, tokenize
from ticketops.tasks.task import Kind, Task

__all__ = ["GLUE", "Kind", "Task", "demo_model", "load_task", "tokenize"]

"""Tasks: GLUE by name from the hub, local files of six kinds, and the embedded demo; encoding and metrics."""

from ticketops.kinds import KINDS, Kind
from ticketops.tasks.choices import ChoiceTask
from ticketops.tasks.demo import DEMO_MODELS, demo_model
from ticketops.tasks.embedders import EmbedderTask
from ticketops.tasks.entities import EntityTask
from ticketops.tasks.glue import GLUE
from ticketops.tasks.kept_rows import tokenized_splits
from ticketops.tasks.loading import load_task, tokenize
from ticketops.tasks.questions import QuestionTask
from ticketops.tasks.sequences import SequenceTask
from ticketops.tasks.task import Task

__all__ = [
    "DEMO_MODELS",
    "GLUE",
    "KINDS",
    "ChoiceTask",
    "EmbedderTask",
    "EntityTask",
    "Kind",
    "QuestionTask",
    "SequenceTask",
    "Task",
    "demo_model",
    "load_task",
    "tokenize",
    "tokenized_splits",
]

"""The kinds of tasks that runs train on. Imports nothing, so that a command line knows them at once."""

from typing import Literal, get_args

Kind = Literal[
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
    "multiple-choice",
]
KINDS: tuple[str, ...] = get_args(Kind)

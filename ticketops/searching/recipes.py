"""How trials train where a configuration does not say otherwise. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ticketops.searching.config import json_identity


@dataclass(frozen=True)
class Recipe:
    """How a trial trains where the configuration does not say otherwise.

    Attributes:
        optimizer: "adamw", or "adamax" for the authors' (`ticketops.optim.Adamax`).
        betas: decay rates of the two moment estimates.
        eps: added to the denominator of the update.
        learning_rate: peak step size.
        epochs: passes over the training split.
        batch_size: examples a step.
        train_rows: rows of the training split used at most; None for all.
        warmup: share of the steps over which the step size rises from zero; it then falls linearly back to zero.
        weight_decay: of all weights but biases and LayerNorm.
        clip: largest l2 norm of a step's gradient over all parameters.
        parameter_clip: largest l2 norm of each parameter's gradient after that; for adamax only.
        dropout: of hidden states and attention; None leaves the checkpoint's.
        long_tasks: tasks that train for `long_epochs` instead, since they have many rows.
        long_epochs: passes over the training split of `long_tasks`.
    """

    optimizer: Literal["adamw", "adamax"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    learning_rate: float = 5e-5
    epochs: int = 3
    batch_size: int = 32
    train_rows: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    parameter_clip: float = 1.0
    dropout: float | None = None
    long_tasks: tuple[str, ...] = ()
    long_epochs: int = 3


RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    # The recipe of the authors' code: arXiv 2105.12002 and its repository.
    "paper": Recipe(optimizer="adamax", eps=1e-6, epochs=6, dropout=0.1, long_tasks=("mnli", "qnli")),
    # Small enough for a laptop's processor.
    "demo": Recipe(learning_rate=1e-4, epochs=1, train_rows=3000),
}

#: Fields of a run that a recipe decides where they are left out -> the recipe's own.
BY_RECIPE = {
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "train_rows": "train_rows",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "clip",
}


def training(recipe: str) -> dict[str, Any]:
    """What of a recipe a configuration does not say: the optimizer and its constants, as JSON values.

    Args:
        recipe: its name.
    """
    apart = (*BY_RECIPE.values(), "epochs", "long_tasks", "long_epochs")
    values = dataclasses.asdict(RECIPES[recipe])
    return json_identity({name: value for name, value in values.items() if name not in apart})


def without_options(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides what earlier versions kept of a recipe: some of its constants are options of a search by now.

    Args:
        training: as such a run kept it.

    Returns:
        What `training` keeps, and fields of `SearchConfig`.
    """
    moved = {field: training[name] for field, name in BY_RECIPE.items() if name in training}
    return {name: value for name, value in training.items() if name not in BY_RECIPE.values()}, moved


_CONSTANTS = {"betas": [0.9, 0.999], "warmup": 0.1, "weight_decay": 0.01, "clip": 1.0}
#: What `training` gave when runs did not keep it yet.
FORMAT_1_TRAINING: dict[str, dict[str, Any]] = {
    "default": {**_CONSTANTS, "optimizer": "adamw", "eps": 1e-8, "dropout": None},
    # Not the authors' optimizer, which has been this recipe's since.
    "paper": {**_CONSTANTS, "optimizer": "torch.optim.Adamax", "eps": 1e-6, "dropout": 0.1},
    "demo": {**_CONSTANTS, "optimizer": "adamw", "eps": 1e-8, "dropout": None},
}

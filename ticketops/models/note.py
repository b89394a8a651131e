"""The applied ticket in a patched model's configuration, which every way of saving the model writes."""

import copy
from typing import Any

from transformers import PreTrainedModel

from ticketops.models.record import APPLIED


class Note:
    """The applied ticket in the configurations of all models with the patched encoder.

    Other models may share a configuration object, so the models get a copy of it before the first change.

    Attributes:
        record: the ticket, as `record_of` returns it; None if no ticket is applied.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        self._models: list[PreTrainedModel] = []
        self._own: list[Any] = []

    def add(self, model: PreTrainedModel) -> None:
        """Adds a model, whose configuration gets the ticket at the next `write`.

        Args:
            model: bare model or model with a task head.
        """
        self._models.append(model)

    def write(self, record: dict[str, Any] | None) -> None:
        """Writes a ticket to the configurations that do not have it yet.

        Args:
            record: the ticket, as `record_of` returns it; None removes it.
        """
        self.record = record
        for model in self._models:
            config = model.config
            if vars(config).get(APPLIED) is record:
                continue
            if not any(config is own for own in self._own):
                config = copy.deepcopy(config)
                replace_config(model, model.config, config)
                self._own.append(config)
            if record is None:
                vars(config).pop(APPLIED, None)
            else:
                vars(config)[APPLIED] = record


def replace_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Replaces a configuration object in all modules of a model.

    Args:
        model: bare model or model with a task head.
        old: configuration object to replace.
        new: replacement, a changed copy of `old`.
    """
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def without_note(config: Any) -> Any:
    """Copies a configuration without the applied ticket.

    Args:
        config: configuration, with or without an applied ticket; not changed.
    """
    config = copy.deepcopy(config)
    vars(config).pop(APPLIED, None)
    return config

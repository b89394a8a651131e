"""What a patched model's configuration says of the ticket applied to it, so that whatever saves the model keeps it."""

import copy
from typing import Any

from transformers import PreTrainedModel

from ticketops.models.record import APPLIED


class Note:
    """The applied ticket, noted in the configuration of every model with the patched encoder.

    A configuration that other models may have, too, is left alone: the models get a copy of it, once.

    Attributes:
        record: what is noted, as `record_of` writes it; None where no ticket is applied.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        self._models: list[PreTrainedModel] = []
        self._own: list[Any] = []

    def add(self, model: PreTrainedModel) -> None:
        """Has a model's configuration bear the note from the next time on that it is written.

        Args:
            model: bare or with a task head.
        """
        self._models.append(model)

    def write(self, record: dict[str, Any] | None) -> None:
        """Notes a ticket; writes nothing where it is noted already.

        Args:
            record: of the ticket; None removes the note.
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
    """Gives a model another configuration object.

    Args:
        model: bare or with a task head.
        old: all of its modules that have this one get the new one.
        new: a changed copy of the old one.
    """
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def without_note(config: Any) -> Any:
    """A copy of a configuration, for a model of which no ticket is applied.

    Args:
        config: with a note or without; left as it is.
    """
    config = copy.deepcopy(config)
    vars(config).pop(APPLIED, None)
    return config

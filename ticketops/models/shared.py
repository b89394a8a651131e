"""SharedModel: one encoder for several tasks, each with its own head and ticket."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ticketops.errors import InputError, TicketopsError
from ticketops.files import new_folder, read_json, read_manifest, user_path, write_manifest
from ticketops.models.checkpoint import load, read_config
from ticketops.models.freezing import Frozen, freeze, unfreeze
from ticketops.models.handle import PatchHandle
from ticketops.models.indices import Indices
from ticketops.models.note import without_note
from ticketops.models.record import num_neurons
from ticketops.models.registry import find_adapter
from ticketops.models.swapping import stock_class
from ticketops.text import count, html
from ticketops.tickets import Ticket

_HEAD, _TICKET = "head.safetensors", "ticket.safetensors"
#: Version 2 has the checksums of all files, so that swapped heads are detected.
_FORMAT, _VERSION = "ticketops.shared", 2
_REMEDY = "save it again, or run the search or share that made it again with --save-models"
_WHOLE = Frozen(0, 1, Indices([0]))


class SharedModel(nn.Module):
    """Several tasks on one encoder. A batch of a task runs and trains only that task's ticket and head.

    The forward pass applies the task's ticket; switching copies nothing. The following optimizer step changes only the
    structures that the ticket keeps: gradients, momentum and weight decay reach neither the other prunable structures
    nor their moment estimates. So a structure that two tickets keep gets the updates of both tasks. The heads of other
    tasks are frozen as well; embeddings, LayerNorms and the pooler belong to all tasks. Each optimizer step must be of
    one task. If gradients are None or zero before the backward pass, clipping measures only that task's gradient.

    Args:
        models: task -> transformers model with the task's head; all of one architecture, though some heads need no
            pooler. The encoder of the first model, or of the first one with a pooler, is patched and replaces those of
            the others, in place.
        tickets: task -> its ticket; None or a missing task keeps everything.
        graphs: see `ticketops.patch`.

    Attributes:
        handle: PatchHandle of the encoder.
        tickets: task -> its ticket.

    Raises:
        InputError: there is no task, a ticket has no task or another shape, or a model has another architecture.
        UnsupportedError: ticketops does not support the model.

    Source: arXiv 2105.12002, section 4.
    """

    # The loss is the mean over the batch's rows; tells the Trainer not to normalise it again.
    accepts_loss_kwargs = False
    #: File in a saved folder with the names of the tasks and the checksums of all other files.
    NOTE = "shared.json"

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        tickets: Mapping[str, Ticket | None] | None = None,
        *,
        graphs: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        if not models:
            raise InputError("a shared model needs a task: give a model for each task by its name")
        # A model without a pooler runs on an encoder with one as well.
        models = dict(sorted(models.items(), key=lambda entry: -len(_shape(find_adapter(entry[1])[1]))))
        first, *others = models.values()
        _, base = find_adapter(first)
        prefix = first.base_model_prefix
        shape = _shape(base)
        for task, model in models.items():
            find_adapter(model)
            apart = _apart(shape, _shape(model.base_model))
            if stock_class(model.base_model) is not stock_class(base) or apart:
                raise InputError(
                    f"the model of task {task} has another encoder ({_described(model.base_model)}) than the first one "
                    f"({_described(base)}), apart in {', '.join(apart[:3]) or 'its class'}: give models of one "
                    "architecture"
                )
        by_task = dict(tickets or {})
        if unknown := [task for task in by_task if task not in models]:
            raise InputError(f"a ticket for {unknown[0]!r}, and no such task: the tasks are {', '.join(models)}")
        # Check all tickets before anything is changed.
        full = Ticket.full(base.config.num_hidden_layers, base.config.num_attention_heads)
        self.tickets = {task: by_task.get(task) or full for task in models}
        for task, ticket in self.tickets.items():
            _check(task, ticket, full, num_neurons(base.config))
        self.handle = PatchHandle(first, graphs=graphs)
        # A ticket in a loaded state_dict is not applied: each task has its own.
        self.handle.loads_tickets = False
        for model in others:
            setattr(model, prefix, base)
            self.handle.watch(model)
        self._places = {task: place for place, task in enumerate(models)}
        self._models = nn.ModuleList(models.values())
        self._heads = {task: _head_parameters(model) for task, model in models.items()}
        self._selected: str | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self._places)

    def __repr__(self) -> str:
        # The encoder's modules would fill pages, once for each task.
        lines = [f"{task}: {self.tickets[task]!r}" for task in self.tasks]
        return "\n  ".join([f"<SharedModel: {self._title}", *lines]) + ">"

    def _repr_html_(self) -> str:
        shown = "".join(f"<div>{html(task)}{ticket._repr_html_()}</div>" for task, ticket in self.tickets.items())
        return f"<div><div>SharedModel: {html(self._title)}</div>{shown}</div>"

    @property
    def _title(self) -> str:
        return f"{stock_class(self.handle.model.base_model).__name__} for {count(len(self.tasks), 'task')}"

    def select(self, task: str) -> PreTrainedModel:
        """Applies a task's ticket to the encoder.

        Args:
            task: name of the task.

        Returns:
            The task's model: the shared encoder and the task's head. Valid until another task is selected.

        Raises:
            InputError: there is no such task.
        """
        if task not in self._places:
            raise InputError(f"no task {task!r} in this shared model: the tasks are {', '.join(self._places)}")
        self.handle.apply(self.tickets[task])
        if task != self._selected:
            for other, parameters in self._heads.items():
                for parameter in parameters:
                    # Freeze: with gradients of zero, as zero_grad(set_to_none=False) sets them, momentum would change
                    # it.
                    unfreeze(parameter) if other == task else freeze(parameter, _WHOLE)
            self._selected = task
        model: Any = self._models[self._places[task]]
        return model

    def forward(self, task: str, **inputs: Any) -> Any:
        """Runs the model of one task with its ticket applied.

        Args:
            task: name of the task.
            inputs: keyword arguments of the task's model.

        Returns:
            The output of the task's model.
        """
        return self.select(task)(**inputs)

    def single(self, task: str) -> PreTrainedModel:
        """Makes a model of one task that shares nothing with this one.

        Args:
            task: name of the task.

        Returns:
            A whole stock model on the CPU, in evaluation mode. `ticketops.export` and `ticketops.shrink` cut it to
            `tickets[task]`.

        Raises:
            InputError: there is no such task.
        """
        model = self.select(task)
        twin = stock_class(model)._from_config(without_note(model.config), dtype=model.dtype)
        # As a plain dictionary, without the metadata about the ticket.
        own = twin.state_dict().keys()
        # The shared encoder may have a pooler that this head does not need.
        twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
        return twin.eval()

    def save(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Writes the first task's whole model, the heads of the others, and all tickets, atomically.

        Args:
            folder: folder to create; must not exist, or must be empty.
            tokenizer: tokenizer to save with the first task's model.

        Returns:
            The folder.

        Raises:
            StoreError: the folder is not empty, or cannot be written.
        """
        folder = user_path(folder, "the folder to write")
        with new_folder(folder) as temporary:
            # The tickets are saved in separate files.
            self.handle.apply(None)
            for place, task in enumerate(self.tasks):
                model: Any = self._models[place]
                own = temporary / f"task-{place}"
                if place == 0:
                    model.save_pretrained(own)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(own)
                else:
                    model.config.architectures = [type(model).__name__]
                    model.config.save_pretrained(own)
                    save_file({key: value.contiguous() for key, value in _head(model).items()}, own / _HEAD)
                self.tickets[task].save(own / _TICKET)
            write_manifest(temporary, self.NOTE, {"format": _FORMAT, "version": _VERSION, "tasks": self.tasks})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Loads a folder written by `save`. Only safetensors and JSON are read; no code is executed.

        Args:
            folder: folder of a shared model.

        Returns:
            The shared model with all its tickets, on the CPU, in evaluation mode.

        Raises:
            InputError: a file is missing, damaged, or does not fit the others.
        """
        folder = user_path(folder, "the folder of the shared model")
        try:
            return cls._load(folder)
        except TicketopsError as error:
            raise type(error)(f"cannot load the shared model {folder}: {error}") from error
        # As in ticketops.models.load, damage raises exceptions of many types.
        except Exception as error:
            reason = " ".join((str(error) or type(error).__name__).split())[:300]
            raise InputError(
                f"cannot load the shared model {folder}: it is damaged ({reason}); save it again"
            ) from error

    @classmethod
    def check(cls, folder: Path) -> None:
        """Verifies the checksums of a folder written by `save`.

        Args:
            folder: folder of a shared model. Without shared.json, or with one of version 1, there is nothing to verify.

        Raises:
            InputError: shared.json is damaged, or a file is missing or was changed.
        """
        if (folder / cls.NOTE).exists() and read_json(folder / cls.NOTE, _REMEDY).get("version") == _VERSION:
            read_manifest(folder, cls.NOTE, _REMEDY)

    @classmethod
    def _load(cls, folder: Path) -> Self:
        if not (folder / cls.NOTE).is_file():
            raise InputError(f"no {cls.NOTE} of a shared model; give a folder made by SharedModel.save")
        cls.check(folder)
        note = read_json(folder / cls.NOTE, _REMEDY)
        if note.get("format") != _FORMAT or note.get("version") not in (1, _VERSION):
            raise InputError(f"{cls.NOTE} is of another format; save it again with this version")
        tasks = note.get("tasks")
        if not (
            isinstance(tasks, list) and all(isinstance(task, str) for task in tasks) and len({*tasks}) == len(tasks)
        ):
            raise InputError(f"{cls.NOTE} does not list tasks by their names; {_REMEDY}")
        if not tasks:
            raise InputError(f"{cls.NOTE} lists no task; {_REMEDY}")
        first = load(folder / "task-0")
        models, tickets = {}, {}
        for place, task in enumerate(tasks):
            own = folder / f"task-{place}"
            models[task] = _with_head(first.base_model, own) if place else first
            tickets[task] = Ticket.load(own / _TICKET)
        return cls(models, tickets).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def revert(self) -> None:
        """Restores the encoder's stock classes and removes all tickets; the encoder stays shared."""
        self.handle.revert()
        for parameters in self._heads.values():
            for parameter in parameters:
                unfreeze(parameter)


def _shape(base: Any) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in base.state_dict().items()}


def _apart(shape: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> list[str]:
    """The weights in which two encoders differ, apart from a pooler that only the first one has."""
    names = [name for name in shape if not (name.startswith("pooler.") and name not in other)]
    return [name for name in {**dict.fromkeys(names), **other} if shape.get(name) != other.get(name)]


def _described(base: Any) -> str:
    config = base.config
    return (
        f"{type(base).__name__}, {config.num_hidden_layers} layers x {config.num_attention_heads} heads of hidden size "
        f"{config.hidden_size}"
    )


def _check(task: str, ticket: Ticket, full: Ticket, neurons: int) -> None:
    try:
        ticket.check(full.num_layers, full.num_heads, neurons)
    except InputError as error:
        raise InputError(f"task {task}: {error}") from error


def _head(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the part of a model's state_dict that is not the encoder's."""
    inside = f"{model.base_model_prefix}."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}


def _head_parameters(model: PreTrainedModel) -> list[Tensor]:
    inside = f"{model.base_model_prefix}."
    return [parameter for name, parameter in model.named_parameters() if not name.startswith(inside)]


def _with_head(base: Any, folder: Path) -> PreTrainedModel:
    """Builds a task's model around an encoder. The head's file is checked before its memory is allocated."""
    kind, config = read_config(folder)
    sizes = [(each.num_hidden_layers, each.hidden_size) for each in (config, base.config)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{folder.name} is not of this encoder; save it again")
    with torch.device("meta"), no_init_weights():
        skeleton = kind(without_note(config))
    if type(skeleton.base_model) is not stock_class(base) or _apart(_shape(base), _shape(skeleton.base_model)):
        raise InputError(f"{folder.name} is not of this encoder; save it again")
    head = load_file(folder / _HEAD)
    wanted = {key: (value.shape, base.dtype) for key, value in _head(skeleton).items()}
    if {key: (value.shape, value.dtype) for key, value in head.items()} != wanted:
        raise InputError(f"the weights of {folder.name} are not what its configuration makes; save it again")
    setattr(skeleton, skeleton.base_model_prefix, base)
    skeleton.load_state_dict(head, strict=False, assign=True)
    return skeleton.eval()

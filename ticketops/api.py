"""The public functions search, share and transfer: each runs the trials and writes the report."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Unpack

from ticketops.errors import InputError, shown
from ticketops.launch import follows
from ticketops.progress_view import watched
from ticketops.reporting import read, write_report
from ticketops.reporting.results import SearchResult, ShareResult, TransferResult
from ticketops.searching.config import Config
from ticketops.searching.keywords import SearchFields, ShareFields, TransferFields
from ticketops.searching.objects import Objects, named_metric, named_task, named_tasks
from ticketops.searching.plan import SearchConfig
from ticketops.searching.processes import check_processes, follow, leading
from ticketops.searching.run import run_search
from ticketops.searching.sharing import run_share
from ticketops.searching.sharing_plan import ShareConfig
from ticketops.searching.transfer import run_transfer
from ticketops.searching.transfer_plan import TransferConfig
from ticketops.searching.trial import Listener

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_fields(kind: type[Config]) -> Callable[[Function], Function]:
    """Lists the fields of a configuration in a function's signature, with their defaults, in place of `**fields`."""

    def sign(function: Function) -> Function:
        first, *others = inspect.signature(function).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        fields = [inspect.Parameter(each.name, keyword, default=each.default) for each in kind.fields()]
        own = [each for each in others if each.kind is keyword]
        signed: Any = function
        signed.__signature__ = inspect.Signature([first, *fields, *own])
        return function

    return sign


@_with_fields(SearchConfig)
def search(
    config: SearchConfig | None = None,
    *,
    listener: Listener | None = None,
    trainer_factory: Callable[..., Any] | None = None,
    **fields: Unpack[SearchFields],
) -> SearchResult:
    """Finds the super ticket of a model on a task and writes the report. Finished trials do not run again.

    Args:
        config: configuration of the search; or pass its fields:
        listener: callbacks on the progress of trials and steps. By default the progress is shown in notebooks and
            interactive sessions, and not in scripts; `ticketops.Listener()` shows nothing.
        trainer_factory: function that makes each trial's Trainer: it takes the keyword arguments of a transformers
            Trainer (model, args, train_dataset, eval_dataset, data_collator, callbacks, optimizer_cls_and_kwargs, ...)
            and returns one, with anything changed but model and callbacks. Its loss is the one that importance is of.
        fields: fields of `SearchConfig`, which are the flags of `ticketops search`; `help(ticketops.SearchConfig)`
            says what each means. `task` may also be a `datasets.Dataset`, a `DatasetDict`, a dictionary of splits, or
            a `ticketops.tasks.Task`; `metric` also a function (labels, predictions) -> float, an object with
            `compute(predictions=, references=)`, or {name: one of these}.

    Returns:
        Records, the super ticket, its gain over the full model, and the report's path.

    Raises:
        InputError: a field, the model or the task is bad.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed; where only some did, the result's `failures` says why.

    Source: arXiv 2105.12002.
    """
    configured, objects = _configured(SearchConfig, config, fields)
    objects = dataclasses.replace(objects, trainer_factory=trainer_factory)
    return _run(run_search, configured, listener, objects)


@_with_fields(ShareConfig)
def share(
    config: ShareConfig | None = None, *, listener: Listener | None = None, **fields: Unpack[ShareFields]
) -> ShareResult:
    """Trains several tasks on one encoder, each on its own ticket, against multi-task training without tickets.

    Args:
        config: configuration of the run; or pass its fields:
        listener: callbacks on the progress of trials and steps. By default the progress is shown in notebooks and
            interactive sessions, and not in scripts; `ticketops.Listener()` shows nothing.
        fields: fields of `ShareConfig`, which are the flags of `ticketops share`; `help(ticketops.ShareConfig)`
            says what each means. `tasks` may have such objects as `task` of `search`, in a list or as {name: object}.

    Returns:
        Records, the tasks' tickets, and the report's path.

    Raises:
        InputError: a field, the model, a task or a ticket is bad.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed; where only some did, the result's `failures` says why.

    Source: arXiv 2105.12002, section 4.
    """
    configured, objects = _configured(ShareConfig, config, fields)
    return _run(run_share, configured, listener, objects)


@_with_fields(TransferConfig)
def transfer(
    config: TransferConfig | None = None, *, listener: Listener | None = None, **fields: Unpack[TransferFields]
) -> TransferResult:
    """Adapts a fine-tuned source model to shares of a target task's rows, super ticket against full model.

    Args:
        config: configuration of the run; or pass its fields:
        listener: callbacks on the progress of trials and steps. By default the progress is shown in notebooks and
            interactive sessions, and not in scripts; `ticketops.Listener()` shows nothing.
        fields: fields of `TransferConfig`, which are the flags of `ticketops transfer`;
            `help(ticketops.TransferConfig)` says what each means. `source` and `target` may be such
            objects as `task` of `search`.

    Returns:
        Records, the scores of full model and super ticket by share of the rows, and the report's path.

    Raises:
        InputError: a field, the model, a task, its labels or a share is bad.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed; where only some did, the result's `failures` says why.

    Source: arXiv 2105.12002, section 5.
    """
    configured, objects = _configured(TransferConfig, config, fields)
    return _run(run_transfer, configured, listener, objects)


def _run(run: Callable[..., Path], config: Config, listener: Listener | None, objects: Objects) -> Any:
    """Runs what is missing, shows the progress in interactive sessions, writes the report, and reads the result."""
    check_processes(config)
    if follows():
        follow()
        return read(config.output)  # type: ignore[attr-defined]
    with leading():
        with watched(listener) as shown_to:
            folder = run(config, shown_to, objects)
        return write_report(folder)[0]


AnyConfig = TypeVar("AnyConfig", bound=Config)


def _configured(kind: type[AnyConfig], config: AnyConfig | None, given: Mapping[str, Any]) -> tuple[AnyConfig, Objects]:
    """The configuration itself or one with these fields, and the objects that it names."""
    if config is not None and not isinstance(config, kind):
        raise InputError(
            f"{kind.verb}() takes a {kind.__name__}, or its fields as keywords such as output='runs/one', and not "
            f"{shown(config)}"
        )
    fields = dict(given)
    if config is not None and not fields:
        return config, Objects()
    tasks: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("task", "source", "target"):
            fields[name], found = named_task(value, name, "data" if name == "task" else name)
            tasks |= found
        elif name == "tasks":
            fields[name], tasks = named_tasks(value)
        elif name == "metric":
            fields[name], metrics = named_metric(value, kind is not SearchConfig)
    values = config.to_dict() if config is not None else {}
    return kind.from_dict({**values, **fields}, source=f"{kind.verb}()"), Objects(tasks, metrics)

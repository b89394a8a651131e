"""Exports a model from the folder of a run or of a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from ticketops.errors import InputError, TicketopsError, UnsupportedError, spelled
from ticketops.files import user_path
from ticketops.models import Format, SharedModel, export, load
from ticketops.models.checkpoint import LOCAL, check_files, check_folder
from ticketops.models.containers import is_container_folder, load_container
from ticketops.searching.selection import select
from ticketops.searching.setting import find_model, loading_model, quiet
from ticketops.searching.store import Store
from ticketops.tickets import Ticket


def release(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: Format = "compact",
    *,
    ticket: str | os.PathLike[str] | None = None,
    trial: str | None = None,
    task: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Exports a trained ticket of a run, one task of a shared model, or a model's folder with a ticket.

    Args:
        source: output folder of a run with saved models, a shared model's folder, or a folder of `save_pretrained`.
        output: folder to create.
        format: `compact`, `dense` or `onnx`.
        ticket: file of a ticket, if `source` is a model's folder; by default its ticket.safetensors, if it has one.
        trial: id of a run's trial; by default the best seed of a search's super ticket, or of a share with tickets.
        task: name of the task to export, if `source` is a share or a shared model.
        push_to_hub: repository of the Hugging Face hub to which the folder is also uploaded.

    Returns:
        The folder.

    Raises:
        InputError: there is no such model, ticket, trial or task.
        UnsupportedError: ticketops does not support the model, or a library for its image processor is missing.
        StoreError: the folder cannot be written.
        TicketopsError: the exported model's outputs differ from the model's.
    """
    folder = user_path(source, "the folder to export")
    if not folder.is_dir():
        raise InputError(f"{source} is no folder: give a run's {spelled('output')} folder, or a model's")
    run: dict[str, Any] = {}
    tokenizer: Any = None
    with quiet():
        if (folder / "trials").is_dir():
            if ticket is not None:
                raise InputError(
                    f"{spelled('ticket')} goes with a model's folder: name a trial of the run with "
                    f"{spelled('trial')} instead"
                )
            store = Store.read(folder)
            record = _record(store, trial)
            kept = store.model(next(trial for trial in store.plan if trial.id == record["id"]))
            if kept is None:
                raise InputError(
                    f"{store.folder} has no model of {record['id']}: run the same command with "
                    f"{spelled('save_models', True)}"
                )
            folder = kept
            names = ("task", "model", "kind", "sparsity", "seed", "steps")
            run = {name: record[name] for name in names if name in record}
            if task is None or task in record.get("tasks", ()):
                run |= _scores(record if task is None else record["tasks"][task])
            run |= {"config": store.config.to_dict(), "command": store.config.command()}
        elif trial is not None:
            raise InputError(
                f"{folder} is no finished run: {spelled('trial')} goes with a run's {spelled('output')} folder"
            )
        # A shared model has its tokenizer in the folder of its first task.
        vocabulary = folder / "task-0" if (folder / "task-0").is_dir() else folder
        try:
            check_folder(vocabulary)
            check_files(folder)
            SharedModel.check(folder)
        except (InputError, OSError) as error:
            raise InputError(f"cannot export {source}: {error}") from error
        if (vocabulary / "tokenizer_config.json").is_file():
            with loading_model(str(source)):
                tokenizer = AutoTokenizer.from_pretrained(vocabulary, **LOCAL)
        elif run:
            # Earlier versions of ticketops saved models without their tokenizer.
            place = find_model(run["config"]["model"], run["config"].get("revision"))
            with loading_model(run["config"]["model"]):
                tokenizer = AutoTokenizer.from_pretrained(place, **LOCAL)
        elif (folder / "preprocessor_config.json").is_file():
            try:
                tokenizer = AutoImageProcessor.from_pretrained(folder, **LOCAL)
            except ImportError as error:
                raise UnsupportedError(
                    f"{folder} has an image processor, for which this transformers needs torchvision: pip install it"
                ) from error
        if (folder / "shared.json").is_file():
            shared = SharedModel.load(folder)
            if task is None or ticket is not None:
                raise InputError(
                    f"{folder} is a shared model: name one of its tasks, {spelled('task', shared.tasks[0])}"
                )
            single, run = shared.single(task), {**run, "task": task}
            options = {"ticket": shared.tickets[task], "tokenizer": tokenizer, "run": run, "push_to_hub": push_to_hub}
            return export(single, output, format, **options)
        if task is not None:
            raise InputError(
                f"{folder} is no shared model: {spelled('task')} goes with one, or with a share's "
                f"{spelled('output')} folder"
            )
        path = user_path(ticket, spelled("ticket")) if ticket is not None else folder / "ticket.safetensors"
        keep = Ticket.load(path) if ticket is not None or path.is_file() else None
        options = {"ticket": keep, "tokenizer": tokenizer, "run": run, "push_to_hub": push_to_hub}
        # Suppress the notice that a ticket must be applied again: `export` applies it.
        with quiet():
            model: Any = load(folder)
            if is_container_folder(folder):
                with loading_model(str(source)):
                    model = load_container(folder)
        return export(model, output, format, **options)


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model card about scores: the score of the split for reporting, and separately that of the
    split for selection."""
    split = "validation" if record.get("report_score") is None else "report"
    found = {"metric": record["metric"], "score": record["score"], "split": f"{split}, which selected too"}
    if split == "report":
        found |= {
            "score": record["report_score"],
            "split": split,
            "score that selected": record["score"],
        }
    if rows := record.get("rows", {}).get(split):
        found["rows scored"] = rows
    if constant := record.get("constant_scores", {}).get(split):
        found["score of one constant answer"] = constant
    return found


def _record(store: Store, trial: str | None) -> dict[str, Any]:
    records = store.records()
    if trial is not None:
        found = [record for record in records if record["id"] == trial]
        if not found:
            ids = ", ".join([*(record["id"] for record in records[:3]), "..."])
            raise InputError(
                f"no finished trial {trial!r} in {store.folder}: use one of the ids in its results.csv ({ids})"
            )
        return found[0]
    if store.kind == "transfer":
        raise InputError(
            f"{store.folder} is a transfer: name one of its trials with {spelled('trial')}, such as {store.plan[0].id}"
        )
    if store.kind == "share":
        own = [record for record in records if record["kind"] == "tickets"]
        if not own:
            raise TicketopsError(
                f"{store.folder} has no trial with tickets yet: finish it, or name a {spelled('trial')}"
            )
        return max(own, key=lambda record: record["score"])
    level = select(records, store.config.seeds).super_level
    if level is None:
        raise TicketopsError(f"{store.folder} has no super ticket yet: finish the search, or name a {spelled('trial')}")
    of_level = [r for r in records if (r["kind"], r["sparsity"]) == (level.kind, level.sparsity)]
    return max(of_level, key=lambda record: record["score"])

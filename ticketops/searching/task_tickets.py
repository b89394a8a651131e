"""Each task's ticket for sharing: read from searches or files, combined or redrawn for what it is compared with."""

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ticketops.errors import InputError, spelled
from ticketops.files import user_path
from ticketops.searching.selection import Selection, at_sparsity, select
from ticketops.searching.setting import Setting
from ticketops.searching.sharing_plan import SEARCHES, ShareConfig, ShareTrial
from ticketops.searching.store import Record, Store
from ticketops.tickets import Importance, Ticket, prune

#: Task -> seed -> ticket.
Tickets = Mapping[str, Mapping[int, Ticket]]


@dataclass(frozen=True)
class KnownTickets:
    """Tickets of the tasks, and the scores of the searches that found them.

    Attributes:
        tickets: task -> seed -> ticket.
        single: task -> the scores of its single-task trainings, as `single_scores` makes them; none for a mere file.
    """

    tickets: dict[str, Mapping[int, Ticket]]
    single: dict[str, Record]


def load_tickets(
    config: ShareConfig, settings: Mapping[str, Setting], chosen: Mapping[str, float | None]
) -> KnownTickets | None:
    """Reads the tickets that `--tickets` names.

    Args:
        config: the run.
        settings: of the tasks.
        chosen: task -> the sparsity that the run has chosen for it already.

    Returns:
        Of a search its super tickets, each for the seed that it was found with; of a file its ticket, for all seeds.
        None where tickets are to be found on the way.

    Raises:
        InputError: a task or seed has no ticket, a ticket is of the wrong shape, or a search is of another model.
    """
    if config.tickets is None:
        return None
    found = KnownTickets({}, {})
    fingerprint = next(iter(settings.values())).identity()["model_fingerprint"]
    for entry in config.tickets:
        name, _, rest = entry.partition("=")
        task = name if name in settings else None
        path = user_path(rest if task else entry, spelled("tickets"))
        if not path.exists():
            raise InputError(
                f"{spelled('tickets')} {entry!r}: there is no {path}; give a search's output folder or a ticket's "
                f"file, as PATH or TASK=PATH with one of the tasks {', '.join(settings)}"
            )
        for folder in _searches(path, settings) if task is None else [path]:
            own, tickets, single, model = _read_tickets(folder, config, chosen, task)
            own = task or own
            if own not in settings:
                raise InputError(
                    f"{folder} holds a ticket of {own or 'an unnamed task'!r}, none of the tasks "
                    f"{', '.join(settings)}: say whose it is with TASK={folder}"
                )
            if own in found.tickets:
                raise InputError(f"there are two tickets for task {own} in {spelled('tickets')}: give one")
            for ticket in tickets.values():
                try:
                    ticket.check(settings[own].num_layers, settings[own].num_heads, settings[own].num_neurons)
                except InputError as error:
                    raise InputError(f"task {own}, {folder}: {error}") from error
            if model not in (None, fingerprint):
                raise InputError(
                    f"{folder} searched other pre-trained weights than those of {config.model}: a ticket belongs "
                    "to the weights that it was found in; search again with this model"
                )
            found.tickets[own] = tickets
            if single:
                found.single[own] = single
    if missing := [task for task in settings if task not in found.tickets]:
        raise InputError(
            f"there is no ticket for task {missing[0]} in {spelled('tickets')}: add {missing[0]}=PATH, or leave that "
            "out to "
            "find all of them on the way"
        )
    return found


def _searches(path: Path, tasks: Collection[str]) -> list[Path]:
    """The folder of a search as it is; of a share, the searches inside, of these tasks."""
    inside = path / SEARCHES
    return [inside / task for task in tasks if (inside / task).is_dir()] if inside.is_dir() else [path]


def _read_tickets(
    path: Path, config: ShareConfig, chosen: Mapping[str, float | None], task: str | None
) -> tuple[str, dict[int, Ticket], Record, str | None]:
    """Task, tickets by seed, single-task scores and the model's fingerprint of a search or a ticket's file."""
    if path.is_file():
        ticket = Ticket.load(path)
        return Path(str(ticket.metadata.get("task", ""))).name, dict.fromkeys(config.seeds, ticket), {}, None
    store = Store.read(path, "search")
    records = store.records()
    selection = select(records, store.config.seeds)
    if records:
        selection = at_sparsity(selection, chosen.get(task or records[0]["task"]))
    level = selection.super_level
    if level is None:
        raise InputError(
            f"{path} has no super ticket yet: finish that search, with winning among its {spelled('kinds')}"
        )
    tickets = store.tickets(level.kind, level.sparsity)
    # A search may have gained seeds since, which are no part of this run.
    if missing := [seed for seed in config.seeds if seed not in tickets]:
        raise InputError(
            f"{path} has no super ticket of seed {missing[0]}, only of {', '.join(map(str, tickets))}: search with "
            f"that seed, or give {spelled('seeds')} that it has"
        )
    return (
        records[0]["task"],
        {seed: tickets[seed] for seed in config.seeds},
        single_scores(records, selection),
        store.description["identity"]["model_fingerprint"],
    )


def single_scores(records: Sequence[Record], selection: Selection) -> Record:
    """What the report compares sharing with: a task's full model and super ticket, each trained alone.

    Args:
        records: of its search.
        selection: of its levels.

    Returns:
        JSON values: the metric and what a constant answer scores, the super ticket's sparsity, and by seed the scores
        of both on the splits that select and report.
    """
    levels = {"full": selection.full, "winning": selection.super_level}
    scores = {
        kind: {str(seed): [score, level.report_scores.get(seed)] for seed, score in level.scores.items()}
        for kind, level in levels.items()
        if level is not None
    }
    best = selection.super_level
    return {
        "metric": records[0]["metric"],
        "majority": records[0]["majority"],
        "rows": dict(selection.rows),
        "constant_scores": dict(selection.constants),
        "sparsity": None if best is None else best.sparsity,
        "scores": scores,
    }


def arm_tickets(trial: ShareTrial, tickets: Mapping[str, Ticket]) -> dict[str, Ticket | None]:
    """The ticket of each task in a trial.

    Args:
        trial: the trial, for its arm and the seed of random tickets.
        tickets: task -> its own ticket.

    Returns:
        Task -> ticket, or None for everything.
    """
    if trial.kind == "tickets":
        return dict(tickets)
    if trial.kind == "plain":
        return dict.fromkeys(tickets)
    if trial.kind == "random":
        return {task: random_ticket(ticket, task, trial.seed) for task, ticket in tickets.items()}
    combine = {"union": Ticket.union, "intersection": Ticket.intersection}[trial.kind]
    return dict.fromkeys(tickets, functools.reduce(combine, tickets.values()))


def random_ticket(ticket: Ticket, task: str, seed: int) -> Ticket:
    """Draws a ticket that prunes as many heads and FFNs (or neurons) as another.

    Args:
        ticket: the ticket to match. Each layer keeps at least one head if each layer of this ticket does.
        task: name of the task; different tasks draw independently.
        seed: seed of the draw.
    """
    own = int.from_bytes(hashlib.sha256(f"{task} {seed}".encode()).digest()[:4], "big")
    neurons = ticket.neuron_mask
    removed = ticket.ffns_pruned if neurons is None else int((~neurons).sum())
    return prune(
        Importance(ticket.num_layers, ticket.num_heads, neurons=None if neurons is None else neurons.shape[1]),
        counts=(ticket.heads_pruned, removed),
        kind="random",
        min_heads=min(1, int(ticket.head_mask.sum(1).min())),
        seed=own,
        neurons=neurons is not None,
    )


def digests(tickets: Tickets) -> dict[str, dict[str, str]]:
    """Hashes of tickets, for a run's identity.

    Args:
        tickets: task -> seed -> ticket.
    """

    def digest(ticket: Ticket) -> str:
        masks = (ticket.head_mask, ticket.ffn_mask, ticket.neuron_mask)
        return hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks if mask is not None)).hexdigest()

    return {task: {str(seed): digest(ticket) for seed, ticket in found.items()} for task, found in tickets.items()}

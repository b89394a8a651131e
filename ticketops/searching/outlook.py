"""The preview of a run for `--dry-run`: loads and checks all inputs, trains and writes nothing."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ticketops.models import weight_counts
from ticketops.searching.config import Config
from ticketops.searching.execution import Execution
from ticketops.searching.plan import SearchConfig, Trial
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.sharing import prepare_share
from ticketops.searching.sharing_plan import ShareConfig
from ticketops.searching.store import Store, extended
from ticketops.searching.transfer import keeps_model, prepare_transfer, subset
from ticketops.searching.transfer_plan import TransferConfig
from ticketops.text import count, structures
from ticketops.tickets import Ticket, WeightCounts


@dataclass(frozen=True)
class Outlook:
    """The preview of a run.

    Attributes:
        table: one row for the trials that differ in their seed alone, header first.
        lines: on the data, the number of trials and of optimizer steps, what is kept, and the command.
    """

    table: list[list[str]]
    lines: list[str]


def outlook(config: Config) -> Outlook:
    """Loads and checks a run's inputs and says what it would do.

    Args:
        config: of a search, a share or a transfer.

    Returns:
        The outlook.

    Raises:
        InputError: model, tasks and configuration do not fit each other, or cannot be loaded.
        StoreError: the output folder holds something else.
    """
    kinds: Mapping[type[Config], Callable[[Any], Outlook]] = {
        SearchConfig: _search,
        ShareConfig: _share,
        TransferConfig: _transfer,
    }
    Execution.of(config).check()
    return kinds[type(config)](config)


@dataclass(frozen=True)
class _Kind:
    """Trials that differ in their seed alone.

    Attributes:
        name: of the row.
        rows: of training, of all tasks.
        steps: of the optimizer.
        seeds: how many.
        trial: what they prune; None where that is found on the way, or differs from task to task.
    """

    name: str
    rows: int
    steps: int
    seeds: int
    trial: Trial | None


def _search(config: SearchConfig) -> Outlook:
    setting = Setting.load(extended(config))
    config = setting.config
    Store.check(config.output, setting.identity())
    models = len(config.seeds) * len(_levels(setting)) if config.save_models else 0
    return _outlook(config, setting, _levels(setting), [setting.task.describe()], models)


def _share(config: ShareConfig) -> Outlook:
    ready = prepare_share(config)
    config, settings, loaded = ready.config, ready.settings, ready.tickets
    Store.check(config.output, ready.identity)
    kinds = [] if loaded else [kind for name, setting in settings.items() for kind in _levels(setting, f"{name}: ")]
    trials = ready.plan
    rows = sum(len(setting.splits["train"]) for setting in settings.values())
    steps = sum(_steps(setting, config.joint_epochs) for setting in settings.values())
    arms = dict.fromkeys(trial.kind for trial in trials)
    kinds += [_Kind(f"shared: {arm}", rows, steps, len(config.seeds), None) for arm in arms]
    lines = [setting.task.describe() for setting in settings.values()]
    for name, tickets in loaded.tickets.items() if loaded else ():
        lines += [f"{name}: the ticket of seed {seed} prunes {_pruned(ticket)}" for seed, ticket in tickets.items()]
    first = next(iter(settings.values()))
    return _outlook(config, first, kinds, lines, len(trials) if config.save_models else 0)


def _transfer(config: TransferConfig) -> Outlook:
    ready = prepare_transfer(config)
    Store.check(config.output, ready.identity)
    source, target, seeds = ready.source, ready.target, len(config.seeds)
    kinds = [] if source.searched_before else _levels(source.setting, "source: ")
    models = seeds * len(kinds)
    for trial in ready.plan[: len(ready.plan) // seeds]:
        setting = {"source": source.setting, "target": target}[trial.ladder]
        part = subset(setting, trial.fraction, trial.seed, config.min_steps)
        known = trial.search_trial if trial.ladder == "source" or trial.kind == "full" else None
        name = f"{trial.ladder}, {100 * trial.fraction:g} %: {trial.kind}"
        kinds.append(_Kind(name, len(part.splits["train"]), _steps(part), seeds, known))
        models += seeds * keeps_model(trial, config)
    lines = [f"{role}, {setting.task.describe()}" for role, setting in (("source", source.setting), ("target", target))]
    if source.searched_before:
        level = source.level()
        lines.append(f"the source's super ticket is of sparsity {level.sparsity:g}, from {source.folder}")
    return _outlook(ready.config, source.setting, kinds, lines, models)


def _steps(setting: Setting, epochs: int | None = None) -> int:
    batches = math.ceil(len(setting.splits["train"]) / setting.config.batch_size)
    return (epochs or setting.config.epochs) * math.ceil(batches / setting.config.gradient_accumulation_steps)


def _levels(setting: Setting, prefix: str = "") -> list[_Kind]:
    """A search's trials of one seed."""
    plan, seeds = setting.plan(), len(setting.config.seeds)
    rows, steps = len(setting.splits["train"]), _steps(setting)
    return [_Kind(prefix + trial.kind, rows, steps, seeds, trial) for trial in plan[: len(plan) // seeds]]


def _pruned(ticket: Ticket) -> str:
    neurons = None if ticket.neuron_mask is None else ticket.neurons_pruned
    return structures(ticket.heads_pruned, ticket.ffns_pruned, neurons)


def _left(trial: Trial, counts: WeightCounts) -> list[str]:
    """The shares of the weights, and of the encoder's, that a trial keeps."""
    removed = trial.heads_pruned * counts.head + trial.ffns_pruned * counts.ffn + trial.neurons_pruned * counts.neuron
    return [f"{100 * (1 - removed / whole):.1f}" for whole in (counts.total, counts.encoder)]


def _outlook(
    config: SearchConfig | ShareConfig | TransferConfig,
    setting: Setting,
    kinds: Sequence[_Kind],
    lines: Iterable[str],
    models: int,
) -> Outlook:
    with quiet():
        counts = weight_counts(setting.fresh_model(0))
    unit = "neurons pruned" if config.prune_neurons else "FFNs pruned"
    header = ["trial", "sparsity", "heads pruned", unit, "weights left (%)", "encoder's left (%)"]
    table = [[*header, "rows", "steps", "seeds"]]
    for kind in kinds:
        trial = kind.trial
        known = ["–"] * 5
        if trial is not None:
            pruned = (trial.heads_pruned, trial.neurons_pruned if config.prune_neurons else trial.ffns_pruned)
            known = [f"{trial.sparsity:g}", *map(str, pruned), *_left(trial, counts)]
        table.append([kind.name, *known, f"{kind.rows:,}", f"{kind.steps:,}", str(kind.seeds)])
    trials, steps = sum(kind.seeds for kind in kinds), {kind.steps for kind in kinds}
    total = f"{sum(kind.steps * kind.seeds for kind in kinds):,}"
    most = "at most " if getattr(config, "early_stopping_patience", None) is not None else ""
    amount = (
        f"of {most}{count(steps.pop(), 'step')}, {total} in all"
        if len(steps) == 1
        else f"of {most}{total} steps in all"
    )
    unknown = ["– depends on tickets that are found on the way, or on each task's own"]
    bytes_each = 4 * counts.total
    if getattr(config, "halving", False):
        amount += ", fewer with successive halving"
    kept = f"{count(models, 'model')} kept, {models * bytes_each / 1e6:,.0f} MB" if models else "no model kept"
    return Outlook(
        table,
        [
            *(unknown if any(kind.trial is None for kind in kinds) else ()),
            *lines,
            f"{count(trials, 'trial')} {amount}, batch {config.batch_size}, into {config.output}",
            f"{counts.total:,} weights a model, {bytes_each / 1e6:,.0f} MB; {kept}",
            config.command(),
        ],
    )

"""Results of a search, share or transfer, read from its folder: what `ticketops.search` and the others return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ticketops.reporting import sharing, tables, transfer
from ticketops.reporting.report import headline, warnings
from ticketops.searching.ladder import Rung, compare_rungs, read_ladders
from ticketops.searching.plan import SearchConfig
from ticketops.searching.progress import trials
from ticketops.searching.selection import Level, Selection, compare_arms, select
from ticketops.searching.sharing_plan import ShareConfig, TaskTicket
from ticketops.searching.statistics import Comparison, Spread
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SCORES, TransferConfig
from ticketops.tickets import Ticket


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run has found so far. All of it is read from the run's folder, finished or not.

    Two results are equal if they have the same records, tickets, findings and table, of the same folder.

    Attributes:
        folder: output folder of the run.
        config: configuration of the run.
        records: one record per finished trial, in the order of the plan.
        failures: "id" and "error" of each failed trial; a later run tries them again.
        unfinished: names of the trials that have not run yet.
        findings: the headline of the report, and its warnings.
        table: rows of the report's main table as text, header first.
        report_path: path of `report.md`; None if no report was written yet.
    """

    folder: Path
    config: Any
    records: list[Record]
    failures: list[dict[str, str]]
    unfinished: list[str]
    findings: list[str]
    table: list[list[str]]
    report_path: Path | None


@dataclass(frozen=True, kw_only=True)
class SearchResult(Result):
    """What a search has found.

    Attributes:
        selection: all levels with their scores over seeds, and the super ticket's level.
        tickets: seed -> ticket at the super ticket's level; empty if no winning ticket is finished.
    """

    config: SearchConfig
    selection: Selection = field(compare=False)
    tickets: dict[int, Ticket]

    @property
    def super_level(self) -> Level | None:
        """The level of the super ticket; None if no winning ticket is finished."""
        return self.selection.super_level

    @property
    def super_ticket(self) -> Ticket | None:
        """The ticket at the super level whose seed scores best on the split that selects."""
        level = self.super_level
        return None if level is None else self.tickets[level.best_seed]

    @property
    def gain(self) -> Spread:
        """Super ticket's score minus the full model's over seeds, on the split that reports."""
        return Spread.of(self.selection.gains.values())

    @property
    def comparison(self) -> Comparison | None:
        """What that gain shows, corrected for the number of levels tried; None without a seed that both have."""
        return self.selection.comparison


@dataclass(frozen=True, kw_only=True)
class ShareResult(Result):
    """What a share has found.

    Attributes:
        tickets: task -> seed -> ticket.
        scores: arm -> task -> seed -> score on the split that reports; "/" stands for the average of all tasks.
        comparisons: arm -> comparison of the task average with tickets against that arm, corrected for the number of
            arms.
    """

    config: ShareConfig
    tickets: dict[str, dict[int, Ticket]]
    scores: dict[str, dict[str, dict[int, float]]]
    comparisons: dict[str, Comparison] = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class TransferResult(Result):
    """What a transfer has found.

    Attributes:
        sparsity: sparsity of the source's super ticket; None if it is not known yet.
        ladders: scores of the full model and the super ticket by share of the rows, the target's ladder first.
        comparisons: ladder, "target" or "source" -> fraction of its rows -> super ticket against full model there.
    """

    config: TransferConfig
    sparsity: float | None
    ladders: list[Rung]
    comparisons: dict[str, dict[float, Comparison]] = field(compare=False)


def read(folder: str | Path) -> SearchResult | ShareResult | TransferResult:
    """Reads the results of a search, share or transfer, finished or not, without running or writing anything.

    Args:
        folder: output folder of the run.

    Returns:
        What `ticketops.search`, `share` or `transfer` returns at the end of that run.

    Raises:
        InputError: the folder has no run.
        StoreError: a file of the run is damaged.
    """
    store = Store.read(folder)
    failures, unfinished = [], []
    for name, _, record, error in trials(store):
        if error is not None:
            failures.append({"id": name, "error": error})
        elif record is None:
            unfinished.append(name)
    report = store.folder / "report.md"
    common = {
        "folder": store.folder,
        "config": store.config,
        "records": store.records(),
        "failures": failures,
        "unfinished": unfinished,
        "report_path": report if report.is_file() else None,
    }
    kinds: Mapping[str, Callable[[Store, dict[str, Any]], Any]] = {
        "search": _search,
        "share": _share,
        "transfer": _transfer,
    }
    found: SearchResult | ShareResult | TransferResult = kinds[store.kind](store, common)
    return found


def _search(store: Store, common: dict[str, Any]) -> SearchResult:
    records = common["records"]
    selection = select(records, store.config.seeds)
    level = selection.super_level
    metric = records[0]["metric"] if records else ""
    return SearchResult(
        **common,
        findings=[headline(selection, metric), *warnings(selection, metric)],
        table=tables.level_rows(selection),
        selection=selection,
        tickets={} if level is None else store.tickets(level.kind, level.sparsity),
    )


def _share(store: Store, common: dict[str, Any]) -> ShareResult:
    records = common["records"]
    found: dict[str, dict[int, Ticket]] = {}
    for task in store.description["notes"]["tasks"]:
        by_seed = {seed: store.ticket(TaskTicket(task, seed)) for seed in store.config.seeds}
        found[task] = {seed: ticket for seed, ticket in by_seed.items() if ticket is not None}
    return ShareResult(
        **common,
        findings=[sharing.headline(records), *sharing.warnings(records)],
        table=sharing.overview(store),
        tickets=found,
        scores=sharing.scores(store),
        comparisons=compare_arms(records),
    )


def _transfer(store: Store, common: dict[str, Any]) -> TransferResult:
    rungs = read_ladders(store)
    return TransferResult(
        **common,
        findings=transfer.headlines(store),
        table=transfer.overview(store),
        sparsity=(store.facts(SCORES) or {}).get("sparsity"),
        ladders=rungs,
        comparisons={ladder: compare_rungs(store, rungs, ladder) for ladder in ("target", "source")},
    )

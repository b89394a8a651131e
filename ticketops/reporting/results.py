"""Results of a search, share or transfer, read from its folder: what `ticketops.search` and the others return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ticketops.errors import InputError
from ticketops.reporting import notebook, plots, search, sharing, tables, transfer
from ticketops.reporting.parts import drawn
from ticketops.searching.ladder import Rung, compare_rungs, read_ladders
from ticketops.searching.plan import SearchConfig
from ticketops.searching.progress import trials
from ticketops.searching.selection import Level, Selection, compare_arms, read_selection
from ticketops.searching.sharing_plan import ShareConfig, TaskTicket
from ticketops.searching.statistics import Comparison, Spread
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SCORES, TransferConfig
from ticketops.text import count, printable

if TYPE_CHECKING:
    import pandas

    from ticketops.tickets import Ticket


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What a run has found so far. All of it is read from the run's folder, finished or not.

    Two results are equal if they have the same records, tickets, findings and table, of the same folder.

    In a notebook it shows itself as headline, table and figure.

    Attributes:
        title: what was run, as the report's title says it.
        folder: output folder of the run.
        config: configuration of the run.
        records: one record per finished trial, in the order of the plan.
        failures: "id" and "error" of each failed trial; a later run tries them again.
        finished: number of finished trials, those of searches inside a share or transfer included.
        unfinished: names of the trials that have not run yet.
        findings: the headline of the report, and its warnings.
        table: rows of the report's main table as text, header first.
        report_path: path of `report.md`; None if no report was written yet.
    """

    title: str
    folder: Path
    config: Any
    records: list[Record]
    failures: list[dict[str, str]]
    finished: int
    unfinished: list[str]
    findings: list[str]
    table: list[list[str]]
    report_path: Path | None

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the trials as a table with the rows and columns of `results.csv`.

        A search and a transfer have a row per finished trial, a share a row per finished trial and task.
        """
        import pandas

        header, *rows = self._rows()
        return pandas.DataFrame(rows, columns=header)

    def plot(self) -> Figure:
        """Draws the main figure of the report.

        Returns:
            A figure of matplotlib, to be shown, changed or saved.

        Raises:
            InputError: no trial is finished yet.
        """
        if not self.records:
            raise InputError(f"no trial of {self.folder} is finished yet, so there is nothing to plot: run it first")
        return self._plot()

    def _rows(self) -> list[list[Any]]:
        raise NotImplementedError

    def _plot(self) -> Figure:
        raise NotImplementedError

    def _state(self) -> str:
        """How many trials are finished, failed and left."""
        others = {"failed": len(self.failures), "not run yet": len(self.unfinished)}
        parts = [f"{number} {what}" for what, number in others.items() if number]
        return ", ".join([f"{count(self.finished, 'trial')} finished", *parts])

    def _where(self) -> str:
        return f"Folder: {self.folder}" if self.report_path is None else f"Report: {self.report_path}"

    def __repr__(self) -> str:
        lines = [f"<{type(self).__name__}: {self.title}", self._state(), *self.findings, self._where()]
        return "\n  ".join(map(printable, lines)) + ">"

    def _repr_html_(self) -> str:
        failed = [f"{failure['id']} failed: {failure['error']}" for failure in self.failures[:8]]
        lines = [f"{self._state()}.", *self.findings, *failed, self._where()]
        return notebook.page(self.title, lines, self.table, self.plot() if self.records else None)


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult(Result):
    """What a search has found.

    Attributes:
        selection: all levels with their scores over seeds, and the super ticket's level.
        tickets: seed -> ticket at the super ticket's level; empty if no winning ticket is finished.
    """

    config: SearchConfig
    selection: Selection = field(compare=False)
    tickets: "dict[int, Ticket]"

    @property
    def super_level(self) -> Level | None:
        """The level of the super ticket; None if no winning ticket is finished."""
        return self.selection.super_level

    @property
    def super_ticket(self) -> "Ticket | None":
        """The ticket at the super level whose seed scores best on the split that selects."""
        level = self.super_level
        return None if level is None else self.tickets[level.best_seed]

    @property
    def gain(self) -> Spread:
        """What the choice of the super ticket gains over the full model, over seeds: `Selection.gains`."""
        return Spread.of(self.selection.gains.values())

    @property
    def comparison(self) -> Comparison | None:
        """What that gain shows, with its interval; None without a seed that both have."""
        return self.selection.comparison

    def _rows(self) -> list[list[Any]]:
        return tables.trial_rows(self.records)

    def _plot(self) -> Figure:
        return drawn(plots.phase_transition, self.selection, self.records[0]["metric"], self.title)


@dataclass(frozen=True, kw_only=True, repr=False)
class ShareResult(Result):
    """What a share has found.

    Attributes:
        tickets: task -> seed -> ticket.
        scores: arm -> task -> seed -> score on the split that reports; "/" stands for the average of all tasks.
        comparisons: arm -> comparison of the task average with tickets against that arm, corrected for the number of
            arms.
    """

    config: ShareConfig
    tickets: "dict[str, dict[int, Ticket]]"
    scores: dict[str, dict[str, dict[int, float]]]
    comparisons: dict[str, Comparison] = field(compare=False)

    def _rows(self) -> list[list[Any]]:
        return sharing.trial_rows(self.records)

    def _plot(self) -> Figure:
        return drawn(sharing.plot, self.scores, self.title)


@dataclass(frozen=True, kw_only=True, repr=False)
class TransferResult(Result):
    """What a transfer has found.

    Attributes:
        sparsity: sparsity of the source's super ticket; None if it is not known yet.
        ladders: scores of the full model and the super ticket by share of the rows, the target's ladder first.
        comparisons: ladder, "target" or "source" -> fraction of its rows -> super ticket against full model there.
        names: "target" or "source" -> name of that task.
    """

    config: TransferConfig
    sparsity: float | None
    ladders: list[Rung]
    comparisons: dict[str, dict[float, Comparison]] = field(compare=False)
    names: dict[str, str]

    def _rows(self) -> list[list[Any]]:
        return transfer.trial_rows(self.records)

    def _plot(self) -> Figure:
        return drawn(transfer.plot, self.ladders, self.names, self.title)


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
    return read_store(Store.read(folder))


def read_store(store: Store) -> SearchResult | ShareResult | TransferResult:
    """Reads the results of a run as `read` does.

    Args:
        store: of the run.

    Raises:
        StoreError: a file of the run is damaged.
    """
    failures, unfinished, finished, records = [], [], 0, []
    for name, trial, record, error in trials(store):
        if record is not None:
            finished += 1
            # Those of searches inside the run have longer names.
            records += [record] if name == trial.id else []
        elif error is not None:
            failures.append({"id": name, "error": error})
        else:
            unfinished.append(name)
    report = store.folder / "report.md"
    common = {
        "folder": store.folder,
        "config": store.config,
        "records": records,
        "failures": failures,
        "finished": finished,
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
    selection = read_selection(store, records)
    level = selection.super_level
    metric = records[0]["metric"] if records else ""
    return SearchResult(
        **common,
        title=search.heading(store.config),
        findings=[search.headline(selection, metric), *search.warnings(selection, metric)],
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
        title=sharing.heading(store),
        findings=[sharing.headline(store, records), *sharing.warnings(records)],
        table=sharing.overview(store),
        tickets=found,
        scores=sharing.scores(store),
        comparisons=compare_arms(store, records),
    )


def _transfer(store: Store, common: dict[str, Any]) -> TransferResult:
    rungs = read_ladders(store)
    return TransferResult(
        **common,
        title=transfer.heading(store),
        names=transfer.names(store),
        findings=transfer.headlines(store),
        table=transfer.overview(store),
        sparsity=(store.facts(SCORES) or {}).get("sparsity"),
        ladders=rungs,
        comparisons={ladder: compare_rungs(store, rungs, ladder) for ladder in ("target", "source")},
    )

"""The report of a run: read from its folder, written beside its records."""

from dataclasses import replace
from pathlib import Path

from ticketops.files import write_atomically
from ticketops.reporting import search, sharing, transfer
from ticketops.reporting.page import Figures, html
from ticketops.reporting.results import SearchResult, ShareResult, TransferResult, read_store
from ticketops.searching.store import Store


def report(folder: str | Path) -> Path:
    """Writes the report of a search, a share or a transfer, finished or not.

    `report.md` and its figures are for reading anywhere; `report.html` is the same as one file to explore in a browser;
    `results.csv` has one row per trial.

    Args:
        folder: its output folder.

    Returns:
        The path of `report.md`.

    Raises:
        InputError: there is no such run in the folder.
        StoreError: one of its files is damaged, or the folder cannot be written.
    """
    return write_report(folder)[1]


def write_report(folder: str | Path) -> tuple[SearchResult | ShareResult | TransferResult, Path]:
    """Writes the report as `report` does.

    Args:
        folder: output folder of the run.

    Returns:
        What `read` returns, and the path of `report.md`.

    Raises:
        InputError, StoreError: as `report` does.
    """
    store = Store.read(folder)
    found = read_store(store)
    figures: Figures = {}
    if isinstance(found, SearchResult):
        text = search.lines(store, found.records, found.selection, found.tickets, figures)
    else:
        lines = sharing.lines if isinstance(found, ShareResult) else transfer.lines
        text = lines(store, found.records, figures)
    path = store.folder / "report.md"
    write_atomically(path, "\n".join(text) + "\n")
    results = (store.folder / "results.csv").read_text(encoding="utf-8")
    write_atomically(store.folder / "report.html", html(text, figures, results))
    return replace(found, report_path=path), path

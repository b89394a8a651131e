"""Results as a user reads them from a folder, from stores that no training has filled."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest

import ticketops
from ticketops.errors import InputError, StoreError
from ticketops.searching.statistics import Spread, compare
from ticketops.tickets import prune

from .made_up import importance, make_share, make_store, make_transfer


def test_a_search_is_read_from_its_folder(tmp_path: Path):
    store = make_store(tmp_path / "run", leave_out=("losing-0.5-seed-2", "losing-0.25-seed-2"))
    store.write_failure(store.plan[-1], "too hot")
    found = ticketops.read(store.folder)
    assert isinstance(found, ticketops.SearchResult)
    assert (found.folder, found.report_path, found.config) == (store.folder, None, store.config)
    assert found.records == store.records()
    assert found.failures == [{"id": "losing-0.5-seed-2", "error": "too hot"}]
    assert found.unfinished == ["losing-0.25-seed-2"]
    assert found.super_level is not None
    assert (found.super_level.sparsity, found.super_level.best_seed) == (0.25, 2)
    assert found.super_ticket == found.tickets[2] == store.tickets("winning", 0.25)[2]
    assert found.gain.mean == pytest.approx(0.02)
    assert found.comparison is not None
    assert found.comparison.outcome == "better"
    assert found.findings[0].startswith("The super ticket beats the full model")
    path = ticketops.report(store.folder)
    assert ticketops.read(store.folder).report_path == path
    assert found.table[2][:2] == ["winning ★", "0.25"]


def test_a_share_and_a_transfer_are_read_from_their_folders(tmp_path: Path):
    store = make_share(tmp_path / "share")
    shared = ticketops.read(store.folder)
    assert isinstance(shared, ticketops.ShareResult)
    assert {task: set(by_seed) for task, by_seed in shared.tickets.items()} == {"rte": {0, 1, 2}, "stsb": {0, 1, 2}}
    assert shared.comparisons["plain"].outcome == "better"
    assert shared.scores["tickets"]["rte"][1] == pytest.approx(0.83)
    assert shared.unfinished[0].startswith("rte ")
    moved = ticketops.read(make_transfer(tmp_path / "transfer").folder)
    assert isinstance(moved, ticketops.TransferResult)
    assert moved.sparsity == 0.25
    assert moved.comparisons["target"][0.1].difference.mean == pytest.approx(0.02)
    assert {rung.ladder for rung in moved.ladders} == {"target", "source"}


def test_an_unfinished_run_and_a_damaged_one(tmp_path: Path):
    everything = tuple(trial.id for trial in make_store(tmp_path / "whole").plan)
    found = ticketops.read(make_store(tmp_path / "run", leave_out=everything).folder)
    assert (found.records, found.unfinished) == ([], list(everything))
    assert found.super_ticket is None
    assert found.findings[0].startswith("No super ticket yet")
    path = tmp_path / "whole" / "trials" / f"{everything[0]}.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(StoreError, match="delete it"):
        ticketops.read(tmp_path / "whole")
    with pytest.raises(InputError, match="no ticketops folder"):
        ticketops.read(tmp_path)


class Checked(HTMLParser):
    """Reads HTML and refuses what is not closed. `text` is what a reader sees, `images` the sources of the images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.images = "", []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        else:
            assert tag != "script"
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.images.append(dict(attributes)["src"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_results_are_short_in_a_terminal_and_a_page_in_a_notebook(tmp_path: Path):
    name = "<script>&\x1b[2J"
    search = make_store(tmp_path / "search", model=name, leave_out=("losing-0.5-seed-2",))
    others = make_share(tmp_path / "share"), make_transfer(tmp_path / "transfer")
    for store, star in ((search, True), *((other, False) for other in others)):
        found = ticketops.read(store.folder)
        text = repr(found)
        assert len(text) < 2500
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert found.findings[0][:40] in text
        assert str(store.folder) in text
        page = Checked(found._repr_html_())
        assert found.findings[0] in page.text
        assert f"Folder: {store.folder}" in page.text
        assert ("★" in page.text) == star
        (image,) = page.images
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        assert "<script>" not in found._repr_html_()
    found = ticketops.read(search.folder)
    assert "20 trials finished, 1 not run yet" in repr(found)
    assert (search.folder / "report.md").exists() is False


def test_tables_and_figures_are_those_of_the_report(tmp_path: Path):
    stores = (make_store(tmp_path / "search"), make_share(tmp_path / "share"), make_transfer(tmp_path / "transfer"))
    for store, titles in zip(stores, (1, 1, 2), strict=True):
        path, found = ticketops.report(store.folder), ticketops.read(store.folder)
        table = found.to_pandas()
        written = pandas.read_csv(path.with_name("results.csv"))
        assert list(table.columns) == list(written.columns)
        assert table[["id", "score"]].equals(written[["id", "score"]])
        figure = found.plot()
        assert len(figure.axes) >= titles
        assert figure._repr_png_().startswith(b"\x89PNG")
    empty = make_store(tmp_path / "empty", leave_out=tuple(trial.id for trial in stores[0].plan))
    with pytest.raises(InputError, match="is finished yet"):
        ticketops.read(empty.folder).plot()
    assert Checked(ticketops.read(empty.folder)._repr_html_()).images == []


def test_values_say_their_unit():
    spread = Spread.of([0.01, 0.03])
    assert repr(spread) == "<Spread: 2.0 ± 1.4 points (x 100) over 2 seeds>"
    (found,) = compare({"one": [0.02, 0.021, 0.02]}, 0.001).values()
    assert re.fullmatch(
        r"<Comparison: better, \+2\.0 ± 0\.1 points \(x 100\) over 3 seeds, 95 % interval \+1\.\d to \+2\.\d "
        "on these rows, corrected for 1 comparison>",
        repr(found),
    )


def test_a_selection_is_a_table(tmp_path: Path):
    found = ticketops.read(make_store(tmp_path / "run").folder)
    assert isinstance(found, ticketops.SearchResult)
    lines = repr(found.selection).splitlines()
    assert lines[0] == "<Selection: 7 levels, super ticket at 0.25, scores x 100 on validation"
    assert lines[2] == "  winning 0.25    83.0 ± 1.0 ★"
    assert "3 heads and 0 FFNs pruned, 97.0 % of the weights left, 83.0 ± 1.0 points" in repr(found.super_level)


def test_tickets_and_importance_are_grids_in_a_notebook():
    scores = importance(0)
    ticket = prune(scores, counts=(3, 1)).described({"task": "<b>x", "kind": "winning"})
    page = Checked(ticket._repr_html_())
    assert "Ticket: 3 layers x 4 heads, 3 heads and 1 FFN pruned" in page.text
    assert "task <b>x" in page.text
    html = ticket._repr_html_()
    assert html.count("rgb(236,236,236)") == 4
    assert html.count("rgb(0,114,178)") == 12 - 3 + 3 - 1
    assert Checked(scores._repr_html_()).text.startswith("Importance: 3 layers x 4 heads")
    assert "rgb(0,114,178)" in scores._repr_html_()
    assert Checked(ticketops.Importance(3, 4)._repr_html_()).text.startswith("<Importance: ")

"""report.html: what it says, that it is valid and closed in itself, and, where there is a Chromium, how it behaves."""

import base64
import csv
import hashlib
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_text import HOSTILE

from ticketops.reporting import report
from ticketops.searching import Store
from ticketops.text import printable

from .made_up import make_share, make_store, make_transfer

VOID = {"meta", "br", "hr", "img", "input", "link", "source"}
#: Attributes that may name something to load.
LOADING = {"src", "href", "xlink:href", "action", "formaction", "data", "poster", "srcset", "background", "ping"}


class Page(HTMLParser):
    """A page that is well formed: its elements with their attributes, its text, and the rows of its tables."""

    def __init__(self, folder: Path):
        super().__init__(convert_charrefs=True)
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.script = ""
        #: Label of the box around each table -> its rows of (text, number to sort by).
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self._label = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if found.get("role") == "region":
            self._label = str(found["aria-label"])
        if tag == "table":
            self.tables[self._label] = []
        if "table" in self.open and tag == "tr":
            self.tables[self._label].append([])
        if "table" in self.open and tag in ("td", "th"):
            self.tables[self._label][-1].append(("", found.get("data-value")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)
        if "table" in self.open and {"td", "th"} & set(self.open):
            text, value = self.tables[self._label][-1][-1]
            self.tables[self._label][-1][-1] = (text + data, value)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def check_closed(self) -> None:
        """Checks that the page loads nothing, runs its own script alone, and has no id twice."""
        counts = Counter(tag for tag, _ in self.elements)
        assert (counts["script"], counts["style"], counts["html"], counts["main"], counts["h1"]) == (1, 1, 1, 1, 1)
        assert not {"link", "iframe", "object", "embed", "base", "form", "img", "image", "foreignobject"} & set(counts)
        ids = Counter(found["id"] for _, found in self.elements if "id" in found)
        assert max(ids.values()) == 1
        for _, found in self.elements:
            assert not any(name.startswith("on") for name in found)
            for name in LOADING & set(found):
                assert str(found[name]).startswith("#")
                assert str(found[name])[1:] in ids
            for url in re.findall(r"url\((.*?)\)", " ".join(str(value) for value in found.values())):
                assert url.startswith("#")
        style = self.source.partition("<style>")[2].partition("</style>")[0]
        assert not re.search(r"url\(|@import|https?:", style + self.script)
        digest = base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()
        policy = next(str(found["content"]) for _, found in self.elements if found.get("http-equiv"))
        wanted = {"default-src 'none'", f"script-src 'sha256-{digest}'", "style-src 'unsafe-inline'"}
        assert set(policy.split("; ")) == wanted | {"base-uri 'none'", "form-action 'none'"}


@pytest.fixture
def search(tmp_path: Path) -> Store:
    return make_store(tmp_path / "run", report_fraction=0.5, leave_out=("losing-0.5-seed-2",))


def test_the_page_says_what_the_report_says(search: Store):
    markdown = report(search.folder).read_text()
    page = Page(search.folder)
    page.check_closed()
    for line in markdown.splitlines():
        # Lines of prose without markup or escapes, the headline and the warnings among them.
        if re.fullmatch(r"(> \*\*\w+:\*\* )?[^|`#*\\<&!]{40,}", line):
            assert re.sub(r"^> \*\*(\w+:)\*\*", r"\1", " ".join(line.split())) in page.text
    assert "The super ticket beats the full model" in page.text
    assert "Unfinished: 1 of 21 trials are missing (losing-0.5-seed-2)" in page.text
    assert search.config.command() in page.text
    levels = next(rows for label, rows in page.tables.items() if label.startswith("Table 1"))
    assert [text for text, _ in levels[2]][:4] == ["winning ★", "0.25", "3", "0"]


def test_the_table_of_trials_has_every_result(search: Store):
    report(search.folder)
    head, *body = Page(search.folder).tables["All trials"]
    with open(search.folder / "results.csv", newline="", encoding="utf-8") as file:
        results = list(csv.DictReader(file))
    assert len(body) == len(results) == 20
    names = [text.replace(" ", "_") for text, _ in head]
    for row, result in zip(body, results, strict=True):
        # What is the same in all trials is said above the table.
        assert {name: value or text for name, (text, value) in zip(names, row, strict=True)}.items() <= result.items()
    assert {"id", "kind", "sparsity", "seed", "score", "report_score", "weights_remaining"} <= set(names)
    assert "metric accuracy;" in Page(search.folder).text


def test_every_seed_is_a_mark_that_says_its_score(search: Store, real_figures: None):
    report(search.folder)
    page = Page(search.folder)
    page.check_closed()
    tips = Counter(str(found["data-tip"]) for tag, found in page.elements if found.get("data-tip") and tag != "td")
    for record in search.records():
        name = "full model" if record["kind"] == "full" else f"{record['kind']}, sparsity {record['sparsity']:g}"
        # One in the drawing for wide pages, one in that for phones.
        assert tips[f"{name}, seed {record['seed']}: accuracy {100 * record['report_score']:.2f}"] == 2
    assert sum("95 % interval" in tip for tip in tips) == 2 * 2
    cells = [str(found["data-tip"]) for tag, found in page.elements if tag == "td" and "data-tip" in found]
    assert len([cell for cell in cells if cell.startswith("layer")]) == 2 * 3 * (4 + 1)
    labels = [found for tag, found in page.elements if tag == "svg"]
    assert all(found["role"] == "img" and found["aria-label"] for found in labels)
    # Behind the figure stands the same as a table.
    data = next(rows for label, rows in page.tables.items() if label.startswith("Data of the figure"))
    assert len(data) == 1 + 7


def test_pages_of_shares_and_transfers_are_closed_in_themselves(tmp_path: Path, real_figures: None):
    for folder in (make_share(tmp_path / "share").folder, make_transfer(tmp_path / "transfer").folder):
        report(folder)
        page = Page(folder)
        page.check_closed()
        assert [tag for tag, found in page.elements if "data-tip" in found]
    assert "Transfer of None" not in page.text


# No run has a name that is no text: its path is refused.
@pytest.mark.parametrize("name", [*(name for name in HOSTILE if "\udcff" not in name), '"><img src=x onerror=a>$x$'])
def test_names_from_files_stay_text_in_the_page(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    store = make_store(tmp_path / "run", model=name, task=name, notes={"validation": name}, leave_out=("full-seed-1",))
    for trial in store.plan[:3]:
        record = store.record(trial)
        assert record is not None
        store.write_record(trial, {**record, "metric": name, "scores": {"validation": {name: 0.5}}})
    report(store.folder)
    page = Page(store.folder)
    page.check_closed()
    assert " ".join(printable(name).split()) in page.text
    assert not re.search("[\x1b\u202e]", page.source)


def test_a_hostile_name_stays_text_in_figures(tmp_path: Path, real_figures: None):
    name = '"><script>alert(1)</script> $\\frac{a}$ \u202e\x1b]]>'
    report(make_share(tmp_path / "run", metrics={name: "accuracy", "b": name}, seeds=1).folder)
    page = Page(tmp_path / "run")
    page.check_closed()
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\x1b\u202e]", page.source)


@pytest.mark.parametrize("make", [make_store, make_share])
def test_a_run_without_results_has_a_page(make: Any, tmp_path: Path):
    everything = tuple(trial.id for trial in make(tmp_path / "whole").plan)
    report(make(tmp_path / "run", leave_out=everything).folder)
    page = Page(tmp_path / "run")
    page.check_closed()
    assert f"{len(everything)} of {len(everything)} trials are missing" in page.text
    assert "All trials" not in page.text


@pytest.mark.long
def test_the_page_in_a_browser(tmp_path: Path, real_figures: None):
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium = next(filter(None, programs), None)
    if chromium is None:
        pytest.skip("there is no Chromium: install Debian's chromium or Google Chrome")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, of ticketops[dev], is not installed")
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    runs = [
        make_store(tmp_path / "search", seeds=4, shape=(6, 12)), make_store(tmp_path / "one", seeds=1),
        make_share(tmp_path / "share"), make_transfer(tmp_path / "transfer"),
    ]  # fmt: skip
    with sync_api.sync_playwright() as play:
        # A container's root needs --no-sandbox.
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for run in runs:
            address = report(run.folder).with_suffix(".html").as_uri()
            for width, scheme in ((360, "light"), (1280, "dark")):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                said: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, said=said: said.append(request.url))
                page.goto(address)
                page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
                assert page.evaluate("document.documentElement.scrollWidth") == width
                drawn = page.locator("svg.plot:visible")
                assert drawn.count() == 1
                # What cannot be pointed at is read with the keys.
                drawn.focus()
                page.keyboard.press("ArrowRight")
                assert page.locator("#tip").inner_text() == page.locator(".at").get_attribute("data-tip")
                page.keyboard.press("Escape")
                assert page.locator("#tip").is_hidden()
                check_sorting(page)
                # The page itself is the one request.
                assert said == [address]
                page.close()
                # The page's policy lets no other script in, axe neither.
                page = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
                ).new_page()
                page.goto(address)
                page.add_script_tag(content=script)
                found = page.evaluate("axe.run()")
                assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
                assert len(found["passes"]) > 20
                page.close()
        browser.close()


def check_sorting(page: Any) -> None:
    """Sorts the trials by their score with the keyboard, in both directions, and filters them."""
    table = page.locator("#trials-table")
    header = table.locator("th", has=page.get_by_role("button", name="score", exact=True))
    header.get_by_role("button").focus()
    place = header.evaluate("(cell) => cell.cellIndex")
    for order in ("ascending", "descending"):
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == order
        cells = table.locator(f"tbody tr td:nth-child({place + 1})").all_inner_texts()
        numbers = [float(cell) for cell in cells]
        assert numbers == sorted(numbers, reverse=order == "descending")
    assert table.locator("[aria-sort]").count() == 1
    page.get_by_label("Filter the trials").fill("seed-0")
    rows = table.locator("tbody tr:visible").all_inner_texts()
    assert rows
    assert all("seed-0" in row for row in rows)
    assert page.locator("output").inner_text().startswith(f"{len(rows)} of ")

"""Names that would be markup, links, formulas or escape codes, in every medium."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ticketops.reporting.tables import csv_text
from ticketops.text import cell, code, count, fenced, markdown, printable, structures

HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "<javascript:alert(1)>",
    "![x](http://example.org/a.png)",
    "a | b",
    "line\nbreak",
    "\x1b]8;;http://example.org\x07here\x1b]8;;\x07",
    "\x1b[2J",
    "\u202egnp.exe",
    "`code` ```",
    "lone \udcff surrogate",
    "=HYPERLINK(A1)",
]


def test_counted_nouns():
    assert [count(number, "FFN") for number in (0, 1, 2, 1234)] == ["0 FFNs", "1 FFN", "2 FFNs", "1,234 FFNs"]
    assert (structures(21, 1), structures(1, 2, 30)) == ("21 heads and 1 FFN", "1 head, 2 FFNs and 30 neurons")
    assert count(2, "row of data", "rows of data") == "2 rows of data"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_plain_text_everywhere(name: str):
    for medium in (printable, markdown, code, fenced, cell):
        text = medium(name)
        text.encode()
        assert "\x1b" not in text
        assert "\u202e" not in text
    page = markdown(name)
    assert "<" not in page
    assert "\n" not in page
    assert "](" not in page.replace("\\]", "")
    assert "://" not in page
    assert not page.replace("\\|", "").count("|")
    assert "\n" not in code(name)


@given(st.text())
def test_a_block_of_code_ends_where_it_should(text: str):
    first, *lines, last = fenced(text, "sh").split("\n")
    assert first == f"{last}sh"
    assert not any(line.startswith(last) for line in lines)


@given(st.text())
def test_printable_is_one_line_that_says_what_was_there(text: str):
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("value", ["=1+1", "+1;x", "-x", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_are_text_in_a_spreadsheet(value: str):
    ((found, number, negative),) = csv.reader(io.StringIO(csv_text([[value, -0.5, "-0.5"]])))
    assert found[0] == "'" or found.startswith("\\")
    assert (number, negative) == ("-0.5", "-0.5")
    assert cell("task-name") == "task-name"


def test_ordinary_names_stay_readable():
    assert markdown("sst2_products, SST-2 (dev.tsv)") == "sst2_products, SST-2 (dev.tsv)"

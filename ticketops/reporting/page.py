"""The report as one HTML file: the text of report.md, with its figures and tables to explore.

Its figures are matplotlib's, as SVG inside the page, and tables; a script of our own sorts, filters and shows what a
point is. The bundles of plotting libraries for browsers are 0.9 MB (Vega), 1.3 MB (Bokeh) and 4.8 MB (Plotly), several
times the page, and none of them gives tables, keyboard access and colours of the reader's scheme by itself.
"""

import base64
import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from ticketops.text import count, printable

#: Heading of report.md before which the table of all trials stands.
_LAST_PART = "How to reproduce"


#: Trials in the page's table; browsers are slow with more rows than this, and results.csv has them all.
_MOST_TRIALS = 2_000

#: File name of a figure in report.md -> a function that draws what the page has in its place.
Figures = dict[str, Callable[[], Markup]]


def html(lines: Sequence[str], figures: Figures, results: str) -> str:
    """Writes a report as a page that needs no other file and no network.

    Args:
        lines: the lines of report.md.
        figures: what the page has in the place of report.md's figures.
        results: the text of results.csv.

    Returns:
        The page.
    """
    assets = resources.files("ticketops.reporting") / "assets"
    style, script = ((assets / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parser = _parser(figures)
    tokens = parser.parse("\n".join(lines))
    contents = _anchored(tokens)
    at = next((place for place, token in enumerate(tokens) if token.meta.get("title") == _LAST_PART), len(tokens))
    trials = _trials(results)
    if trials:
        contents.insert(len(contents) - (at < len(tokens)), ("trials", "All trials"))
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            title=next(
                (_plain(tokens[place + 1]) for place, token in enumerate(tokens) if token.tag == "h1"), "Report"
            ),
            style=Markup(style),
            script=Markup(script),
            script_hash=digest,
            contents=contents,
            before=Markup(parser.renderer.render(tokens[:at], parser.options, {})),
            after=Markup(parser.renderer.render(tokens[at:], parser.options, {})),
            trials=trials,
        )
    )


def fragment(template: str, **values: Any) -> Markup:
    """Renders a part of the page from a template that escapes all values.

    Args:
        template: name of a macro in parts.html.jinja.
        values: its arguments.
    """
    module = _environment().get_template("parts.html.jinja").module
    return Markup(getattr(module, template)(**values))


def table(rows: Sequence[Sequence[Any]], label: str) -> Markup:
    """Formats rows of cells as an HTML table that is sorted by its headers, in a box that scrolls.

    Args:
        rows: header first.
        label: name of the table.
    """
    return fragment("table", head=rows[0], body=rows[1:], label=label)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ticketops.reporting", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals["count"] = count
    return environment


def _visible(value: Any) -> Any:
    """Makes control characters and such that reorder text visible, in every value of a template."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _trials(results: str) -> Mapping[str, Any] | None:
    """The table of trials, of the first `_MOST_TRIALS`: what is the same in all is said once."""
    head, *body = csv.reader(io.StringIO(results))
    if not body:
        return None
    same = [place for place in range(len(head)) if len(body) > 1 and len({row[place] for row in body}) == 1]
    kept = [place for place in range(len(head)) if place not in same]
    return {
        "head": [head[place].replace("_", " ") for place in kept],
        "body": [[_cell(row[place]) for place in kept] for row in body[:_MOST_TRIALS]],
        "left_out": max(len(body) - _MOST_TRIALS, 0),
        "same": [(head[place].replace("_", " "), body[0][place]) for place in same if body[0][place]],
    }


def _cell(text: str) -> tuple[str, str, bool]:
    """A cell, the number that it is sorted by, which is empty where it equals the cell, and True for words."""
    try:
        number = float(text)
    except ValueError:
        return text, "", bool(text)
    short = f"{number:.4f}".rstrip("0").rstrip(".") if abs(number) < 1e6 else f"{number:.4g}"
    return short, "" if short == text else text, False


def _parser(figures: Figures) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])
    number = 0

    def name(place: int, tokens: Sequence[Token]) -> str:
        nonlocal number
        number += 1
        heading = next((t.meta["title"] for t in reversed(tokens[:place]) if "title" in t.meta), "")
        return f"{'Code' if tokens[place].type == 'fence' else 'Table'} {number}" + (f", {heading}" if heading else "")

    def image(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        alternative = renderer.renderInlineAsText(tokens[at].children, options, env)
        return figures.get(str(tokens[at].attrGet("src")), partial(escape, alternative))()

    def opened(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name(at, tokens))}"><table>'

    def closed(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        return "</table></div>"

    def header(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        # A column that labels its rows may have no name.
        return '<th scope="col">' if tokens[at + 1].content else "<td>"

    def header_end(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        return "</th>" if tokens[at - 1].content else "</td>"

    def fence(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        label = escape(name(at, tokens))
        content = escape(tokens[at].content)
        return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><pre>{content}</pre></div>'

    def lone(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        # A figure is no part of a paragraph.
        inner = tokens[at + 1] if tokens[at].nesting > 0 else tokens[at - 1]
        if [child.type for child in inner.children or ()] == ["image"]:
            return ""
        return renderer.renderToken(tokens, at, options, env)

    rules = {
        "image": image, "table_open": opened, "table_close": closed, "th_open": header, "th_close": header_end,
        "fence": fence, "paragraph_open": lone, "paragraph_close": lone,
    }  # fmt: skip
    for rule, function in rules.items():
        parser.add_render_rule(rule, function)
    return parser


def _anchored(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Gives headings an id and marks the first paragraph; returns (id, title) of each heading of the second level."""
    found: list[tuple[str, str]] = []
    for place, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            title = _plain(tokens[place + 1])
            found.append((f"part-{len(found) + 1}", title))
            token.attrSet("id", found[-1][0])
            token.meta["title"] = title
    lead = next((token for token in tokens if token.type == "paragraph_open" and token.level == 0), None)
    if lead is not None:
        lead.attrSet("class", "lead")
    return found


def _plain(token: Token) -> str:
    return "".join(_texts(token.children or ()))


def _texts(children: Iterable[Token]) -> Iterable[str]:
    return (child.content for child in children if child.type in ("text", "code_inline", "text_special"))

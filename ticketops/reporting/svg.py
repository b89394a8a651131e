"""Figures as SVG inside a page: coloured by the page's style sheet, with a text for every point."""

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

_COLOUR = re.compile("#([0-9a-f]{6})")


def inline(figure: Figure, name: str, label: str, tips: Mapping[str, Sequence[str]]) -> Markup:
    """Writes a figure as an SVG element of an HTML page.

    Colours become variables of the style sheet, `--c-0072b2` for lines and areas and `--t-0072b2` for text, which fall
    back to the drawn colour. Groups keep their names in `data-part`.

    Args:
        figure: the figure.
        name: prefix of all ids, unique in the page.
        label: what the figure shows, for readers who do not see it.
        tips: group id of a collection or of a line's markers -> text of each of its points, in the order of drawing.

    Returns:
        The element, which starts no script and loads nothing.
    """
    file = io.BytesIO()
    # Text stays text, and equal figures are equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        # HTML knows SVG's elements without a namespace.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet has its one rule; metadata is for files.
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        if element.get("id") in tips:
            for point, tip in zip(_points(element), tips[element.attrib["id"]], strict=True):
                point.set("data-tip", tip)
        if "-" in element.get("id", ""):
            element.set("data-part", element.attrib["id"])
        _restyle(element, name)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class": "plot"}
    # As large as text beside it, not as wide as the page.
    root.set("style", f"max-width:{1.15 * float(width):.0f}pt")
    if tips:
        root.set("tabindex", "0")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _points(group: ElementTree.Element) -> list[ElementTree.Element]:
    """The markers of a group; matplotlib writes a few as paths of their own."""
    uses = list(group.iter("use"))
    defined = {path for defs in group.iter("defs") for path in defs.iter("path")}
    return uses or [path for path in group.iter("path") if path not in defined]


def _restyle(element: ElementTree.Element, name: str) -> None:
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == "href":
            element.set(key, f"#{name}-{value.removeprefix('#')}")
        elif key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{name}-"))
        elif key == "style":
            kind = "t" if element.tag == "text" else "c"
            element.set(key, _COLOUR.sub(rf"var(--{kind}-\1,#\1)", value))

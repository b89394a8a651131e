"""Results as HTML for notebooks."""

import base64
from collections.abc import Sequence

from matplotlib.figure import Figure

from ticketops.reporting.parts import png
from ticketops.text import html


def page(title: str, lines: Sequence[str], rows: Sequence[Sequence[str]], drawing: Figure | None) -> str:
    """Returns a result as HTML.

    Args:
        title: heading.
        lines: paragraphs, as plain text.
        rows: table of cells as plain text, header first; rows whose first cell has a star are bold.
        drawing: figure, which is inlined as a PNG; None for none.
    """
    head, *body = rows
    cells = "".join(f"<th>{html(cell)}</th>" for cell in head)
    table = [f"<thead><tr>{cells}</tr></thead><tbody>"]
    for row in body:
        style = ' style="font-weight:bold"' if "★" in row[0] else ""
        table.append(f"<tr{style}>" + "".join(f"<td>{html(cell)}</td>" for cell in row) + "</tr>")
    image = ""
    if drawing is not None:
        content = base64.b64encode(png(drawing, dpi=80)).decode()
        image = f'<img alt="{html(title)}" src="data:image/png;base64,{content}"/>'
    paragraphs = "".join(f"<p>{html(line)}</p>" for line in lines)
    return f"<div><h4>{html(title)}</h4>{paragraphs}<table>{''.join(table)}</tbody></table>{image}</div>"

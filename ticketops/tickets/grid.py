"""Draws one number per head and FFN as a small HTML table, for notebooks."""

from collections.abc import Sequence

from ticketops.text import html

_CELL = "width:1em;height:1em;padding:0;border:1px solid #fff;text-align:center"


def grid(heads: Sequence[Sequence[float]], ffns: Sequence[float], title: str, notes: Sequence[str] = ()) -> str:
    """Returns HTML with a row per layer, a cell per head and a cell for the FFN; a darker cell is a larger number.

    Args:
        heads: [layers][heads], numbers in [0, 1].
        ffns: [layers], numbers in [0, 1].
        title: one line above the table.
        notes: lines below the table.
    """
    rows = ["<tr><th>layer</th>" + f'<th colspan="{len(heads[0])}">heads</th><th></th><th>FFN</th></tr>']
    for layer, (of_heads, of_ffn) in enumerate(zip(heads, ffns, strict=True)):
        cells = "".join(_cell(f"layer {layer}, head {head}", value) for head, value in enumerate(of_heads))
        rows.append(f"<tr><th>{layer}</th>{cells}<td></td>{_cell(f'layer {layer}, FFN', of_ffn)}</tr>")
    below = "".join(f"<div>{html(note)}</div>" for note in notes)
    return (
        f'<div><div><b>{html(title)}</b></div><table style="border-collapse:collapse">{"".join(rows)}</table>'
        f"{below}</div>"
    )


def _cell(name: str, value: float) -> str:
    value = min(max(value, 0.0), 1.0)
    # From light grey to the blue of the reports' figures.
    colour = ",".join(str(round(236 + value * (end - 236))) for end in (0, 114, 178))
    return f'<td title="{html(name)}: {value:.2f}" style="{_CELL};background:rgb({colour})"></td>'

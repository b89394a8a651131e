"""The report's figures, drawn without a display and in colours that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ticketops.searching.selection import Level, Selection, Spread
from ticketops.tickets import Importance, Ticket

# Okabe and Ito's palette; markers differ too, for print in black and white.
_STYLES: Mapping[str, tuple[str, str]] = {
    "winning": ("#0072B2", "o"),
    "random": ("#E69F00", "s"),
    "losing": ("#CC79A7", "v"),
}
_FULL = "#404040"
_KEPT = LinearSegmentedColormap.from_list("kept", ["#ECECEC", "#0072B2"])


def phase_transition(selection: Selection, metric: str, split: str, file: IO[bytes]) -> None:
    """Draws the metric against the weights remaining: mean and standard deviation over seeds, one line a kind.

    Args:
        selection: the levels.
        metric: its name.
        split: "validation" or "report": which scores to draw.
        file: where to write the PNG.
    """

    def spread(level: Level) -> Spread:
        return level.report_spread if split == "report" else level.spread

    figure, axes = _figure(7.0, 4.3)
    if selection.full is not None:
        whole = spread(selection.full)
        axes.axhline(100 * whole.mean, color=_FULL, linestyle="--", linewidth=1.2, label="full model", zorder=1)
        if whole.std:
            edges = (100 * (whole.mean - whole.std), 100 * (whole.mean + whole.std))
            axes.axhspan(*edges, color=_FULL, alpha=0.10, linewidth=0, zorder=0)
    for kind, (colour, marker) in _STYLES.items():
        levels = [level for level in selection.levels if level.kind == kind]
        if levels:
            spreads = [spread(level) for level in levels]
            axes.errorbar(
                [100 * level.weights_remaining for level in levels],
                [100 * one.mean for one in spreads],
                yerr=[100 * (one.std or 0.0) for one in spreads],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.6,
                elinewidth=1.0,
                capsize=3,
                label=f"{kind} tickets",
                zorder=2,
            )
    best = selection.super_level
    if best is not None:
        point = (100 * best.weights_remaining, 100 * spread(best).mean)
        ring = {"facecolors": "none", "edgecolors": "#009E73", "linewidths": 2.0}
        axes.scatter(*point, s=190, label="super ticket", zorder=3, **ring)
    seeds = max((len(level.scores) for level in selection.levels), default=0)
    axes.set_xlabel("weights remaining, embeddings included (%)")
    axes.set_ylabel(f"{metric} on {split} (x 100)")
    axes.set_title(f"Mean over {seeds} seeds, bars and band: one standard deviation" if seeds > 1 else "One seed")
    # Sparser to the right, as training goes from the full model on.
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(file, format="png", dpi=150)


def importance_map(importances: Sequence[Importance], tickets: Sequence[Ticket], title: str, file: IO[bytes]) -> None:
    """Draws how important each head and FFN is and, beside it, what the super ticket keeps.

    Args:
        importances: one a seed; their normalised scores are averaged.
        tickets: the super ticket's, one a seed; none draws the importance alone.
        title: what the tickets are.
        file: where to write the PNG.
    """
    heads = np.mean([importance.normalized_head().numpy() for importance in importances], axis=0)
    ffns = np.mean(
        [(importance.ffn / importance.ffn.norm().clamp_min(1e-30)).numpy() for importance in importances], axis=0
    )
    layers, width = heads.shape
    scale = min(0.32, 7.0 / max(layers, width))
    panels = 2 if tickets else 1
    figure, axes = _figure(
        panels * (scale * (width + 2) + 1.9), scale * layers + 1.7, 2 * panels, [width, 1.0] * panels
    )
    _grid(axes[0], heads, "head", "viridis", "Importance of heads\n(each layer's l2 norm is 1)", figure)
    _grid(axes[1], ffns[:, None], "FFN", "viridis", "of FFNs\n(l2 norm 1)", figure)
    if tickets:
        kept_heads = np.mean([ticket.head_mask.numpy() for ticket in tickets], axis=0)
        kept_ffns = np.mean([ticket.ffn_mask.numpy() for ticket in tickets], axis=0)
        share = "" if len(tickets) == 1 else f"\n(share of {len(tickets)} seeds that keep it)"
        _grid(axes[2], kept_heads, "head", _KEPT, f"{title}{share}", None)
        _grid(axes[3], kept_ffns[:, None], "FFN", _KEPT, "", figure if len(tickets) > 1 else None)
    figure.savefig(file, format="png", dpi=150)


def _figure(
    width: float, height: float, columns: int = 1, ratios: Sequence[float] | None = None
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, width_ratios=ratios)


def _grid(axes: Axes, values: np.ndarray, what: str, colours: str | Colormap, title: str, bar: Figure | None) -> None:
    shares = isinstance(colours, Colormap)
    image = axes.imshow(
        values,
        cmap=colours,
        vmin=0.0,
        vmax=1.0 if shares else max(float(values.max()), 1e-12),
        aspect="equal",
        interpolation="nearest",
    )
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("layer" if what == "head" else "")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    if what == "head":
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    else:
        axes.set_xticks([0], ["FFN"])
        axes.tick_params(labelleft=False)
    rows, columns = values.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if bar is not None:
        bar.colorbar(image, ax=axes, fraction=0.08, pad=0.03)

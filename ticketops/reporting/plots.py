"""Figures of a report. Drawing needs no display; the colours are distinguishable for colour-blind readers."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ticketops.searching.selection import Level, Selection
from ticketops.searching.statistics import Spread
from ticketops.tickets import Importance, Ticket

# Okabe and Ito's palette. Markers differ too, for black-and-white print.
_STYLES: Mapping[str, tuple[str, str]] = {
    "winning": ("#0072B2", "o"),
    "random": ("#E69F00", "s"),
    "losing": ("#CC79A7", "v"),
}
FULL, SUPER = "#404040", "#009E73"
KEPT = LinearSegmentedColormap.from_list("kept", ["#ECECEC", "#0072B2"])


def phase_transition(selection: Selection, metric: str) -> Figure:
    """Plots the metric over the weights remaining: mean and standard deviation over seeds, one line per kind of ticket.

    Args:
        selection: levels and scores of a search.
        metric: name of the metric.

    Returns:
        The figure.
    """

    def spread(level: Level) -> Spread:
        return Spread.of(selection.scores(level).values())

    figure = new_figure(7.0, 4.3)
    axes = figure.subplots()
    if selection.full is not None:
        whole = spread(selection.full)
        axes.axhline(100 * whole.mean, color=FULL, linestyle="--", linewidth=1.2, label="full model", zorder=1)
        if whole.std:
            edges = (100 * (whole.mean - whole.std), 100 * (whole.mean + whole.std))
            axes.axhspan(*edges, color=FULL, alpha=0.10, linewidth=0, zorder=0)
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
        axes.plot(*point, "o", markersize=14, fillstyle="none", color=SUPER, markeredgewidth=2, label="super ticket")
    seeds = max((len(level.scores) for level in selection.levels), default=0)
    axes.set_xlabel("weights remaining, embeddings included (%)")
    axes.set_ylabel(f"{metric} on {selection.split} (x 100)")
    axes.set_title(
        f"Mean over {seeds} seeds, bars and band: one standard deviation" if seeds > 1 else "One seed", fontsize=10
    )
    # Sparsity grows to the right.
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def importance_map(importances: Sequence[Importance], tickets: Sequence[Ticket], name: str) -> Figure:
    """Draws the importance of each head and FFN, and the share of seeds in which the super ticket keeps it.

    Args:
        importances: importance of each seed; the normalised scores are averaged.
        tickets: super ticket of each seed; if empty, only the importance is drawn.
        name: name of the tickets in the title.

    Returns:
        The figure.
    """
    heads = np.mean([importance.normalized_head().numpy() for importance in importances], axis=0)
    ffns = np.mean([(one.ffn / one.ffn.norm().clamp_min(1e-30)).numpy() for one in importances], axis=0)
    layers, width = heads.shape
    panels = 2 if tickets else 1
    cell = min(0.32, 7.0 / max(layers, width))
    figure = new_figure(panels * (cell * (width + 2) + 1.9), cell * layers + 1.7)
    first, *second = figure.subplots(1, panels, squeeze=False)[0]
    image = _structures(first, heads, ffns, "viridis", None)
    first.set_title("Importance", fontsize=10)
    _colour_bar(first, image, "normalised score")
    for axes in second:
        kept_heads = np.mean([ticket.head_mask.numpy() for ticket in tickets], axis=0)
        kept_ffns = np.mean([ticket.ffn_shares.numpy() for ticket in tickets], axis=0)
        image = _structures(axes, kept_heads, kept_ffns, KEPT, 1.0)
        axes.set_title(f"Kept by {name}", fontsize=10)
        if len(tickets) > 1:
            _colour_bar(axes, image, f"share of {len(tickets)} seeds")
        else:
            _colour_bar(axes, image, "").set_ticks([0.0, 1.0], labels=["pruned", "kept"])
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure that needs no display.

    Args:
        width, height: size in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _structures(
    axes: Axes, heads: np.ndarray, ffns: np.ndarray, colours: str | Colormap, top: float | None
) -> AxesImage:
    """Draws one cell per structure: a row per layer, a column per head and, after a gap, a column of FFNs."""
    layers, width = heads.shape
    cells = np.full((layers, width + 2), np.nan)
    cells[:, :width], cells[:, -1] = heads, ffns
    top = max(float(np.nanmax(cells)), 1e-12) if top is None else top
    image = axes.imshow(cells, cmap=colours, vmin=0.0, vmax=top, interpolation="nearest")
    step = 1 + (width - 1) // 12
    ticks = list(range(0, width, step))
    axes.set_xticks([*ticks, width + 1], [*map(str, ticks), "FFN"])
    axes.set_yticks(range(0, layers, 1 + (layers - 1) // 12))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(np.arange(width + 3) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return image


def _colour_bar(axes: Axes, image: AxesImage, label: str) -> Colorbar:
    """Adds a colour bar as tall as the cells. (Constrained layout would make it as tall as the figure.)"""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes were made by a figure"
    bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0.0, 0.035, 1.0)))
    bar.set_label(label)
    return bar

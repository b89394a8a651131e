"""Figures of a search. Drawing needs no display; the colours are distinguishable for colour-blind readers."""

import io
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ticketops.searching.selection import Level, Selection
from ticketops.searching.statistics import Spread
from ticketops.text import count, printable

if TYPE_CHECKING:
    from ticketops.tickets import Importance, Ticket

# Okabe and Ito's palette. Markers differ too, for black-and-white print.
_STYLES: Mapping[str, tuple[str, str]] = {
    "winning": ("#0072B2", "o"),
    "random": ("#E69F00", "s"),
    "losing": ("#CC79A7", "v"),
}
FULL, SUPER, CONSTANT = "#404040", "#009E73", "#8C8C8C"
KEPT = LinearSegmentedColormap.from_list("kept", ["#ECECEC", "#0072B2"])
#: Up to this number of seeds, each is drawn as a point; with more, their mean and standard deviation.
FEW_SEEDS = 3
#: With more seeds than this the points of single seeds are a cloud that hides the bands, and thousands of marks.
MOST_SEEDS = 50
#: Least height of a score axis: multiples of the standard deviation over seeds and of the sampling error.
_DEVIATIONS, _SAMPLING_ERRORS = 8.0, 6.0
#: Least height of a score axis where neither is known.
_LEAST_RANGE = 0.05


def phase_transition(
    selection: Selection, metric: str, title: str = "", size: tuple[float, float] = (7.6, 4.6)
) -> Figure:
    """Plots the metric over the weights remaining, one line per kind of ticket, through the means over seeds.

    Up to `FEW_SEEDS` seeds are drawn as points, more as a band of one standard deviation. Where intervals are known, a
    second panel has the difference of the winning tickets from the full model with its 95 % interval. The score axis
    is so high that differences as large as the noise look small (`least_range`).

    Args:
        selection: levels and scores of a search.
        metric: name of the metric.
        title: what was searched, for the title.
        size: width and height in inches.

    Returns:
        The figure. For a page, the drawn seeds have the group id "KIND-seeds", in the order of `selection.levels` and
        of their scores, the means "KIND-means", and the differences "differences", in the order of
        `selection.comparisons`.
    """
    judged = {
        level: one for level, one in selection.comparisons.items() if one.low is not None and one.high is not None
    }
    figure = new_figure(*size)
    ratios = [3, 1.15] if judged else [1]
    axes, *below = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    noise = least_range(
        [] if selection.full is None else list(selection.scores(selection.full).values()),
        selection.rows.get(selection.split, 0),
    )
    limits = limits_of([score for level in selection.levels for score in selection.scores(level).values()], noise)
    axes.set_ylim(100 * limits[0], 100 * limits[1])
    seeds = max((len(selection.scores(level)) for level in selection.levels), default=0)
    # Label -> height and colour.
    ends: dict[str, tuple[float, str]] = {}
    if selection.full is not None:
        whole = Spread.of(selection.scores(selection.full).values())
        axes.axhline(100 * whole.mean, color=FULL, linestyle="--", linewidth=1.2, zorder=1)
        ends["full model"] = (whole.mean, FULL)
        if seeds > FEW_SEEDS and whole.std:
            edges = (100 * (whole.mean - whole.std), 100 * (whole.mean + whole.std))
            axes.axhspan(*edges, color=FULL, alpha=0.10, linewidth=0, zorder=0)
        _seeds(axes, selection, [selection.full], "full", FULL, "D", seeds)
    constant = selection.constants.get(selection.split)
    if constant is not None and limits[0] < constant < limits[1]:
        axes.axhline(100 * constant, color=CONSTANT, linestyle=":", linewidth=1.2, zorder=1)
        ends["one constant answer"] = (constant, CONSTANT)
    for kind, (colour, marker) in _STYLES.items():
        levels = [level for level in selection.levels if level.kind == kind and selection.scores(level)]
        if not levels:
            continue
        spreads = [Spread.of(selection.scores(level).values()) for level in levels]
        weights = [100 * level.weights_remaining for level in levels]
        means = np.array([100 * spread.mean for spread in spreads])
        (line,) = axes.plot(weights, means, color=colour, linewidth=1.6, zorder=2)
        line.set_gid(f"{kind}-line")
        if seeds > FEW_SEEDS:
            reach = np.array([100 * (spread.std or 0.0) for spread in spreads])
            band = axes.fill_between(weights, means - reach, means + reach, color=colour, alpha=0.15, linewidth=0)
            band.set_gid(f"{kind}-band")
        _seeds(axes, selection, levels, kind, colour, marker, seeds)
        points = axes.scatter(weights, means, s=34 if seeds > FEW_SEEDS else 14, color=colour, marker=marker, zorder=3)
        points.set_gid(f"{kind}-means")
        ends[f"{kind} tickets"] = (spreads[-1].mean, colour)
    best = selection.super_level
    if best is not None and selection.scores(best):
        at = 100 * best.weights_remaining
        axes.axvline(at, color=SUPER, linestyle=":", linewidth=1.2, zorder=0)
        height = 100 * Spread.of(selection.scores(best).values()).mean
        axes.plot(at, height, "o", markersize=13, fillstyle="none", color=SUPER, markeredgewidth=2)
        axes.annotate(
            f"super ticket ({best.sparsity:g})", (at, 1.0), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="bottom", fontsize=9, color=SUPER,
        )  # fmt: skip
    axes.set_ylabel(f"{printable(metric)} on {selection.split} (x 100)")
    axes.grid(alpha=0.25)
    if below:
        _differences(below[0], selection, noise)
    last = below[0] if below else axes
    last.set_xlabel("weights remaining, embeddings included (%)")
    # Sparsity grows to the right.
    axes.invert_xaxis()
    label_ends(axes, {label: (100 * height, colour) for label, (height, colour) in ends.items()})
    note = seeds_note(seeds, "bands")
    entitle(figure, title, f"{note}; below: 95 % intervals" if below else note)
    return figure


def _seeds(
    axes: Axes, selection: Selection, levels: Sequence[Level], kind: str, colour: str, marker: str, seeds: int
) -> None:
    """Draws the score of each seed, unless there are too many: faint beside a band, clear without one."""
    if seeds > MOST_SEEDS:
        return
    pairs = [
        (100 * level.weights_remaining, 100 * score) for level in levels for score in selection.scores(level).values()
    ]
    places, heights = np.array(pairs).reshape(-1, 2).T
    few = seeds <= FEW_SEEDS
    points = axes.scatter(
        places, heights, s=26 if few else 9, marker=marker, zorder=2.5,
        facecolor="none" if few and seeds > 1 else colour, edgecolor=colour, linewidth=1.1 if few else 0.0,
        alpha=1.0 if few else 0.45,
    )  # fmt: skip
    points.set_gid(f"{kind}-seeds")


def _differences(axes: Axes, selection: Selection, noise: float) -> None:
    """Draws the winning tickets' differences from the full model, with their intervals."""
    colour, marker = _STYLES["winning"]
    weights = {level.sparsity: level.weights_remaining for level in selection.levels if level.kind == "winning"}
    found = {level: one for level, one in selection.comparisons.items() if one.difference.count}
    axes.axhline(0.0, color=FULL, linestyle="--", linewidth=1.2, zorder=1)
    for level, one in found.items():
        if one.low is not None and one.high is not None:
            at = 100 * weights[level]
            axes.plot([at, at], [100 * one.low, 100 * one.high], color=colour, linewidth=1.6, zorder=2)
    means = [100 * one.difference.mean for one in found.values()]
    points = axes.scatter([100 * weights[level] for level in found], means, s=26, color=colour, marker=marker, zorder=3)
    points.set_gid("differences")
    ends = [end for one in found.values() for end in (one.low, one.high, one.difference.mean) if end is not None]
    low, high = limits_of([0.0, *ends], noise)
    axes.set_ylim(100 * low, 100 * high)
    axes.set_ylabel("winning - full\n(points)")
    axes.grid(alpha=0.25)


def least_range(of_full: Sequence[float], rows: int) -> float:
    """Returns the least range of an axis of scores on which noise does not look like a transition.

    Args:
        of_full: the full model's scores, one per seed.
        rows: number of rows that were scored; 0 if unknown.

    Returns:
        8 standard deviations of the full model over seeds, or 6 sampling errors of a proportion on that many rows if
        that is more; 0.05 where neither is known.
    """
    noise = 0.0
    if of_full:
        spread = Spread.of(of_full)
        noise = _DEVIATIONS * (spread.std or 0.0)
        if rows and 0.0 < spread.mean < 1.0:
            noise = max(noise, _SAMPLING_ERRORS * math.sqrt(spread.mean * (1 - spread.mean) / rows))
    return noise or _LEAST_RANGE


def limits_of(values: Collection[float], least: float) -> tuple[float, float]:
    """Returns the limits of an axis.

    Args:
        values: all that are drawn.
        least: the least range, as `least_range` gives it.

    Returns:
        Lowest and highest value.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    height, middle = max(1.12 * (high - low), least), (low + high) / 2
    return middle - height / 2, middle + height / 2


def seeds_note(seeds: int, many: str) -> str:
    """Says in a figure's subtitle how its seeds are drawn.

    Args:
        seeds: the largest number of seeds of a point.
        many: what shows the spread of more than `FEW_SEEDS`, such as "bars".
    """
    if seeds <= 1:
        return "One seed: no spread is known"
    how = "points: single seeds" if seeds <= FEW_SEEDS else f"{many}: one standard deviation"
    return f"Means over {count(seeds, 'seed')}, {how}"


def entitle(figure: Figure, title: str, note: str) -> None:
    """Writes title and note above a figure; long names are wrapped, and cut after three lines.

    Args:
        figure: the figure.
        title: what is shown, with the model's name; may be empty.
        note: how it is drawn.
    """
    width = max(int(figure.get_figwidth() * 11.5), 24)
    notes = textwrap.wrap(note, int(1.15 * width))
    lines = textwrap.wrap(printable(title), width, max_lines=3, placeholder=" ...")
    figure.suptitle("\n".join([*lines, *notes]), fontsize=10, linespacing=1.3)


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Labels lines on the right of the axes, beside their ends; labels that would collide are moved apart.

    Args:
        axes: axes whose limits and size are final.
        ends: label -> height of the line's end in the data's unit, colour.
    """
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes were made by a figure"
    # Layout takes about a quarter of the height for titles and axis labels.
    points = 72 * figure.get_figheight() * axes.get_position().height * 0.9
    step = 12.5 / points
    wanted = sorted((min(max((height - low) / (high - low), 0.0), 1.0), label) for label, (height, _) in ends.items())
    heights: list[float] = []
    for height, _ in wanted:
        heights.append(max(height, heights[-1] + step) if heights else height)
    # What was pushed above the top is pushed down again.
    top = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], top)
        top = heights[place] - step
    for (height, label), shown in zip(wanted, heights, strict=True):
        axes.annotate(
            label, (1.0, height), (1.03, shown), xycoords="axes fraction", textcoords="axes fraction",
            color=ends[label][1], fontsize=9, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ends[label][1], "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def importance_map(
    importances: "Sequence[Importance]", tickets: "Sequence[Ticket]", name: str, title: str = ""
) -> Figure:
    """Draws the importance of each head and FFN, and the share of seeds in which the super ticket keeps it.

    Args:
        importances: importance of each seed; the normalised scores are averaged.
        tickets: super ticket of each seed; if empty, only the importance is drawn.
        name: name of the tickets in the title.
        title: what was searched, for the title.

    Returns:
        The figure: heads and FFNs have a colour scale each, for they are normalised differently.
    """
    heads, ffns = mean_importance(importances)
    layers, width = heads.shape
    cell = min(0.42, 5.6 / max(layers, width))
    widths = [max(cell * width, 1.1), cell, *([max(cell * (width + 2), 1.3)] if tickets else [])]
    # Beside each panel stand its colour bar, the bar's label and ticks, and the next panel's labels.
    figure = new_figure(max(sum(widths) + 1.55 * len(widths), 5.0), max(cell * layers, 1.4) + 1.5)
    first, second, *rest = figure.subplots(1, len(widths), width_ratios=widths)
    for axes, values, what in ((first, heads, "Importance, heads"), (second, ffns[:, None], "FFNs")):
        image = _cells(axes, values, "viridis", max(float(values.max()), 1e-12))
        axes.set_title(what, fontsize=10)
        colour_bar(axes, image, "normalised score")
    _label_heads(first, width)
    second.set_xticks([0], ["FFN"])
    for axes in rest:
        kept_heads, kept_ffns = mean_kept(tickets)
        cells = np.full((layers, width + 2), np.nan)
        cells[:, :width], cells[:, -1] = kept_heads, kept_ffns
        image = _cells(axes, cells, KEPT, 1.0)
        _label_heads(axes, width)
        axes.set_xticks([*axes.get_xticks(), width + 1], [*(text.get_text() for text in axes.get_xticklabels()), "FFN"])
        axes.set_title("\n".join(textwrap.wrap(f"Kept by {printable(name)}", 26)), fontsize=10)
        if len(tickets) > 1:
            colour_bar(axes, image, f"share of {len(tickets)} seeds")
        else:
            colour_bar(axes, image, "").set_ticks([0.0, 1.0], labels=["pruned", "kept"])
    entitle(figure, title, f"Importance: mean over {count(len(importances), 'seed')}")
    return figure


def mean_importance(importances: "Sequence[Importance]") -> tuple[np.ndarray, np.ndarray]:
    """Averages the normalised importance over seeds.

    Args:
        importances: importance of each seed.

    Returns:
        Of heads, [layers, heads], each layer divided by its l2 norm; of FFNs, [layers], divided by that of all.
    """
    heads = np.mean([importance.normalized_head().numpy() for importance in importances], axis=0)
    ffns = np.mean([(one.ffn / one.ffn.norm().clamp_min(1e-30)).numpy() for one in importances], axis=0)
    return heads, ffns


def mean_kept(tickets: "Sequence[Ticket]") -> tuple[np.ndarray, np.ndarray]:
    """Averages what tickets keep.

    Args:
        tickets: one per seed.

    Returns:
        Shares of the tickets that keep each head, [layers, heads], and the kept share of each FFN, [layers].
    """
    heads = np.mean([ticket.head_mask.float().numpy() for ticket in tickets], axis=0)
    return heads, np.mean([ticket.ffn_shares.float().numpy() for ticket in tickets], axis=0)


class NotebookFigure(Figure):
    """A figure that notebooks show although pyplot, which would make them do so, is not imported."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", bbox_inches="tight")
        return image.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure that needs no display.

    Args:
        width, height: size in inches.
    """
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _cells(axes: Axes, cells: np.ndarray, colours: str | Colormap, top: float) -> AxesImage:
    """Draws one cell per structure, a row per layer."""
    layers, width = cells.shape
    image = axes.imshow(cells, cmap=colours, vmin=0.0, vmax=top, interpolation="nearest", aspect="auto")
    axes.set_yticks(range(0, layers, 1 + (layers - 1) // 12))
    axes.set_ylabel("layer")
    axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    return image


def _label_heads(axes: Axes, width: int) -> None:
    ticks = list(range(0, width, 1 + (width - 1) // 8))
    axes.set_xticks(ticks, [*map(str, ticks)])
    axes.set_xlabel("head")


def colour_bar(axes: Axes, image: AxesImage, label: str) -> Colorbar:
    """Adds a colour bar as tall as the cells. (Constrained layout would make it as tall as the figure.)

    Args:
        axes: axes of the cells.
        image: the cells.
        label: what the colours mean; may be empty.

    Returns:
        The colour bar.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes were made by a figure"
    # As wide in inches beside one column as beside sixteen.
    width = 0.12 / (figure.get_figwidth() * axes.get_position().width)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.0 + 0.8 * width, 0.0, width, 1.0)))
    bar.set_label(label)
    return bar

"""Figures of several tasks: scores of arms, overlaps and layer profiles of tickets, scores by number of training
rows."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from ticketops.reporting.plots import (
    CONSTANT,
    FEW_SEEDS,
    FULL,
    KEPT,
    SUPER,
    colour_bar,
    entitle,
    label_ends,
    least_range,
    limits_of,
    new_figure,
    seeds_note,
)
from ticketops.searching.statistics import Spread
from ticketops.text import count, printable

if TYPE_CHECKING:
    from ticketops.tickets import Ticket

# Okabe and Ito's palette. Markers differ too, for black-and-white print.
_STYLES = [
    ("#404040", "D"),
    ("#999999", "d"),
    ("#009E73", "o"),
    ("#E69F00", "s"),
    ("#0072B2", "^"),
    ("#CC79A7", "v"),
    ("#56B4E9", "P"),
]

#: Differences from chance: the kept tickets' blue for more, orange for less.
EXCESS = LinearSegmentedColormap.from_list("excess", ["#D55E00", "#F4F4F4", "#0072B2"])


def arms(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    titles: Mapping[str, str],
    relative: bool,
    title: str = "",
    narrow: bool = False,
) -> Figure:
    """Draws each arm's scores by task, or their differences from multi-task training without tickets.

    Args:
        scores: arm -> task -> score of each seed.
        titles: task -> its label; other tasks are labelled with their name.
        relative: True if `scores` are differences.
        title: what was trained, for the title.
        narrow: True for the screen of a phone: tasks are labelled vertically.

    Returns:
        The figure. For a page, the groups have ids: "armN-means", and "armN-seeds" for few seeds, where N counts
        the arms from 0.
    """
    tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    figure = new_figure(*(4.3, 5.4) if narrow else (2.6 + 1.3 * max(len(tasks), 3), 4.6))
    axes = figure.subplots()
    if relative:
        axes.axhline(0.0, color=FULL, linestyle="--", linewidth=1.2, label="shared, no tickets", zorder=1)
    seeds = max((len(values) for by_task in scores.values() for values in by_task.values()), default=0)
    width = 0.8 / max(len(scores), 1)
    for place, (arm, by_task) in enumerate(scores.items()):
        colour, marker = _STYLES[place % len(_STYLES)]
        scored = [task for task in tasks if task in by_task]
        at = [tasks.index(task) + (place + 0.5) * width - 0.4 for task in scored]
        spreads = [Spread.of(by_task[task]) for task in scored]
        _means(axes, at, spreads, colour, marker, arm, seeds, f"arm{place}")
        _single(axes, at, [by_task[task] for task in scored], colour, marker, seeds, f"arm{place}")
    names = ["\n".join(textwrap.wrap(printable(titles.get(task, task)), 16)) for task in tasks]
    axes.set_xticks(range(len(tasks)), names, rotation=90 if narrow else 0)
    for edge in np.arange(len(tasks) - 1) + 0.5:
        axes.axvline(edge, color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, max(len(tasks), 1) - 0.5)
    axes.set_ylabel("points against no tickets" if relative else "score (x 100)")
    axes.grid(axis="y", alpha=0.25)
    note = seeds_note(seeds, "bars")
    entitle(figure, title, note + (" of the difference by seed" if relative and seeds > FEW_SEEDS else ""))
    # Points are no lines with ends to label. Below the axes, long names of arms do not narrow the plot.
    figure.legend(loc="outside lower center", ncols=1 if narrow else 2, frameon=False, fontsize=9)
    return figure


def _means(
    axes: Axes,
    at: Sequence[float],
    spreads: Sequence[Spread],
    colour: str,
    marker: str,
    label: str,
    seeds: int,
    group: str,
) -> None:
    """Draws means; beside more than `FEW_SEEDS` seeds with bars of one standard deviation, else as short strokes."""
    means = [100 * spread.mean for spread in spreads]
    if seeds <= FEW_SEEDS:
        style = {"marker": "_", "markersize": 13, "markeredgewidth": 1.8} if seeds > 1 else {}
        (line,) = axes.plot(at, means, color=colour, linestyle="none", zorder=2, **style)  # type: ignore[arg-type]
        line.set_gid(f"{group}-means" if seeds > 1 else None)
        # The legend shows what single seeds look like.
        axes.plot([], [], color=colour, marker=marker, markersize=6, linestyle="none", label=label)
        return
    bars = axes.errorbar(
        at,
        means,
        yerr=[100 * (spread.std or 0.0) for spread in spreads],
        color=colour,
        marker=marker,
        markersize=7,
        linestyle="none",
        elinewidth=1.2,
        capsize=3,
        label=label,
        zorder=2,
    )
    bars.lines[0].set_gid(f"{group}-means")


def _single(
    axes: Axes,
    at: Sequence[float],
    values: Sequence[Sequence[float]],
    colour: str,
    marker: str,
    seeds: int,
    group: str,
) -> None:
    """Draws the score of each seed, where they are few."""
    if seeds <= FEW_SEEDS:
        pairs = [(place, 100 * value) for place, some in zip(at, values, strict=True) for value in some]
        places, heights = np.array(pairs).reshape(-1, 2).T
        face = "none" if seeds > 1 else colour
        points = axes.scatter(
            places, heights, s=32, marker=marker, linewidth=1.2, zorder=3, facecolor=face, edgecolor=colour
        )
        points.set_gid(f"{group}-seeds")


def overlaps(tasks: Sequence[str], overlap: np.ndarray, chance: np.ndarray, title: str = "") -> Figure:
    """Draws the overlap of the tasks' tickets, and its difference from that of random tickets.

    Args:
        tasks: names of the tasks.
        overlap: [tasks, tasks], mean Jaccard overlap; on the diagonal between seeds; NaN if there is no pair.
        chance: [tasks, tasks], the same for random tickets of the same sizes.
        title: what was trained, for the title.

    Returns:
        The figure.
    """
    side = 0.75 * len(tasks) + 1.4
    figure = new_figure(max(2 * side + 2.4, 6.5), side + 1.6)
    first, second = figure.subplots(1, 2)
    names = ["\n".join(textwrap.wrap(printable(task), 20, max_lines=2, placeholder=" ...")) for task in tasks]
    _matrix(first, names, 100 * overlap, "Overlap of tickets (Jaccard, %)", (0.0, 100.0), KEPT, "{:.0f}")
    excess = 100 * (overlap - chance)
    reach = max(float(np.nanmax(np.abs(excess))) if np.isfinite(excess).any() else 0.0, 1.0)
    _matrix(second, names, excess, "More than by chance (points)", (-reach, reach), EXCESS, "{:+.1f}")
    entitle(figure, title, "Means over pairs of tickets; on the diagonal, of two seeds of one task")
    return figure


def _matrix(
    axes: Axes,
    tasks: Sequence[str],
    values: np.ndarray,
    title: str,
    limits: tuple[float, float],
    colours: Colormap,
    form: str,
) -> None:
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1])
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(j, i, form.format(value), ha="center", va="center", color="white" if dark else "black")
        else:
            axes.text(j, i, "–", ha="center", va="center", color="#888888")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    colour_bar(axes, image, "")


def profiles(tickets: "Mapping[str, Mapping[int, Ticket]]", title: str = "") -> Figure:
    """Draws the share of heads and of the FFN that the tasks' tickets keep in each layer, averaged over seeds.

    Args:
        tickets: task -> seed -> ticket.
        title: what was trained, for the title.

    Returns:
        The figure.
    """
    by_task = {task: list(by_seed.values()) for task, by_seed in tickets.items() if by_seed}
    heads = np.array([np.mean([t.head_mask.float().mean(1).numpy() for t in own], axis=0) for own in by_task.values()])
    ffns = np.array([np.mean([t.ffn_shares.float().numpy() for t in own], axis=0) for own in by_task.values()])
    layers = heads.shape[1]
    figure = new_figure(2 * (0.42 * layers + 1.5) + 0.8, 0.45 * len(by_task) + 2.2)
    panels = figure.subplots(1, 2)
    for axes, values, what in zip(panels, (heads, ffns), ("Heads kept", "FFN kept"), strict=True):
        image = axes.imshow(values, cmap=KEPT, vmin=0.0, vmax=1.0, aspect="auto")
        for (i, j), value in np.ndenumerate(values) if layers <= 16 else ():
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(0, layers, 1 + (layers - 1) // 12))
        axes.set_yticks(range(len(by_task)), ["\n".join(textwrap.wrap(printable(task), 24)) for task in by_task])
        axes.set_xlabel("layer")
        axes.set_title(f"{what} (%)", fontsize=10)
        axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(by_task) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.02)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "50", "100"])
    seeds = max(map(len, by_task.values()))
    entitle(figure, title, f"Means over {count(seeds, 'seed')}" if seeds > 1 else "One seed")
    return figure


@dataclass(frozen=True)
class Panel:
    """One ladder of a transfer, as it is drawn.

    Attributes:
        metric: name of the metric and its split.
        full, super: training rows -> score of each seed.
        constant: score of a constant answer.
        scored: number of rows of the split; 0 if unknown.
    """

    metric: str
    full: Mapping[int, Sequence[float]]
    super: Mapping[int, Sequence[float]]
    constant: float
    scored: int


def ladders(panels: Mapping[str, Panel], title: str = "", narrow: bool = False) -> Figure:
    """Plots the scores of full model and super ticket over the number of training rows.

    Args:
        panels: title -> what is drawn.
        title: what was trained, for the title.
        narrow: True for the screen of a phone: the panels stand below each other.

    Returns:
        The figure. For a page, the groups have ids: "ladderN-MODEL-means", and "ladderN-MODEL-seeds" for few seeds,
        where N counts the panels from 0.
    """
    rows, columns = (len(panels), 1) if narrow else (1, len(panels))
    figure = new_figure(*(4.3, 3.7 * rows) if narrow else (5.2 * columns + 0.8, 4.5))
    most = 0
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, (axes, (name, panel)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        ends: dict[str, tuple[float, str]] = {}
        seeds = max((len(some) for found in (panel.full, panel.super) for some in found.values()), default=0)
        most = max(most, seeds)
        everything = [one for found in (panel.full, panel.super) for some in found.values() for one in some]
        whole = panel.full.get(max(panel.full, default=0), [])
        limits = limits_of([*everything, panel.constant], least_range(list(whole), panel.scored))
        axes.set_ylim(100 * limits[0], 100 * limits[1])
        for label, found, colour, marker, shift in (
            ("full model", panel.full, FULL, "D", 0.97), ("super ticket", panel.super, SUPER, "o", 1.03)
        ):  # fmt: skip
            measured = [number for number in sorted(found) if found[number]]
            if not measured:
                continue
            # Shift the points, so that they do not hide each other.
            at = [number * shift for number in measured]
            spreads = [Spread.of(found[number]) for number in measured]
            axes.plot(at, [100 * spread.mean for spread in spreads], color=colour, linewidth=1.6, zorder=2)
            group = f"ladder{place}-{label.replace(' ', '-')}"
            _means(axes, at, spreads, colour, marker, label, seeds, group)
            _single(axes, at, [found[number] for number in measured], colour, marker, seeds, group)
            ends[label] = (100 * spreads[-1].mean, colour)
        axes.axhline(100 * panel.constant, color=CONSTANT, linestyle=":", linewidth=1.2, zorder=1)
        ends["constant answer"] = (100 * panel.constant, CONSTANT)
        axes.set_xscale("log")
        ticks = sorted({*panel.full, *panel.super})
        axes.set_xticks(ticks, [f"{number:,}" for number in ticks], rotation=30 if len(ticks) > 5 else 0)
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"{printable(panel.metric)} (x 100)")
        axes.set_title("\n".join(textwrap.wrap(printable(name), 44)), fontsize=10)
        axes.grid(alpha=0.25)
        label_ends(axes, ends)
    entitle(figure, title, seeds_note(most, "bars"))
    return figure

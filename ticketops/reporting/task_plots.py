"""Figures of several tasks: scores of arms, overlaps and layer profiles of tickets, scores by number of training
rows."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ticketops.reporting.plots import FULL, KEPT, SUPER, new_figure
from ticketops.searching.statistics import Spread
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


def arms(spreads: Mapping[str, Mapping[str, Spread]], titles: Mapping[str, str], relative: bool) -> Figure:
    """Draws each arm's scores by task, or their differences from multi-task training without tickets.

    Args:
        spreads: arm -> task -> mean and standard deviation over seeds.
        titles: task -> its label; other tasks are labelled with their name.
        relative: True if `spreads` are differences.

    Returns:
        The figure.
    """
    tasks = list(dict.fromkeys(task for by_task in spreads.values() for task in by_task))
    figure = new_figure(2.6 + 1.3 * max(len(tasks), 3), 4.2)
    axes = figure.subplots()
    if relative:
        axes.axhline(0.0, color=FULL, linestyle="--", linewidth=1.2, label="shared, no tickets", zorder=1)
    width = 0.8 / max(len(spreads), 1)
    for place, (arm, by_task) in enumerate(spreads.items()):
        colour, marker = _STYLES[place % len(_STYLES)]
        scored = [task for task in tasks if task in by_task]
        axes.errorbar(
            [tasks.index(task) + (place + 0.5) * width - 0.4 for task in scored],
            [100 * by_task[task].mean for task in scored],
            yerr=[100 * (by_task[task].std or 0.0) for task in scored],
            color=colour,
            marker=marker,
            markersize=7,
            linestyle="none",
            elinewidth=1.2,
            capsize=3,
            label=arm,
            zorder=2,
        )
    axes.set_xticks(range(len(tasks)), [titles.get(task, task) for task in tasks])
    for edge in np.arange(len(tasks) - 1) + 0.5:
        axes.axvline(edge, color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, max(len(tasks), 1) - 0.5)
    axes.set_ylabel("points against no tickets" if relative else "score (x 100)")
    seeds = max((spread.count for by_task in spreads.values() for spread in by_task.values()), default=0)
    spread_note = f"Mean over {seeds} seeds, bars: one standard deviation" if seeds > 1 else "One seed"
    axes.set_title(spread_note + (" of the difference by seed" if relative and seeds > 1 else ""), fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    # Below the axes, so that long names of arms do not narrow the plot.
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def overlaps(tasks: Sequence[str], overlap: np.ndarray, chance: np.ndarray) -> Figure:
    """Draws the overlap of the tasks' tickets, and its difference from that of random tickets.

    Args:
        tasks: names of the tasks.
        overlap: [tasks, tasks], mean Jaccard overlap; on the diagonal between seeds; NaN if there is no pair.
        chance: [tasks, tasks], the same for random tickets of the same sizes.

    Returns:
        The figure.
    """
    side = 0.75 * len(tasks) + 1.2
    figure = new_figure(2 * side + 1.6, side + 1.2)
    first, second = figure.subplots(1, 2)
    _matrix(first, tasks, 100 * overlap, "Overlap of tickets (Jaccard, %)", (0.0, 100.0), "viridis", "{:.0f}")
    excess = 100 * (overlap - chance)
    reach = max(float(np.nanmax(np.abs(excess))) if np.isfinite(excess).any() else 0.0, 1.0)
    _matrix(second, tasks, excess, "More than by chance (points)", (-reach, reach), "PuOr_r", "{:+.1f}")
    return figure


def _matrix(
    axes: Axes,
    tasks: Sequence[str],
    values: np.ndarray,
    title: str,
    limits: tuple[float, float],
    colours: str,
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


def profiles(tickets: Mapping[str, Mapping[int, Ticket]]) -> Figure:
    """Draws the share of heads and of the FFN that the tasks' tickets keep in each layer, averaged over seeds.

    Args:
        tickets: task -> seed -> ticket.

    Returns:
        The figure.
    """
    by_task = {task: list(by_seed.values()) for task, by_seed in tickets.items() if by_seed}
    heads = np.array([np.mean([t.head_mask.float().mean(1).numpy() for t in own], axis=0) for own in by_task.values()])
    ffns = np.array([np.mean([t.ffn_shares.float().numpy() for t in own], axis=0) for own in by_task.values()])
    layers = heads.shape[1]
    figure = new_figure(2 * (0.42 * layers + 1.5) + 0.8, 0.45 * len(by_task) + 1.9)
    panels = figure.subplots(1, 2)
    for axes, values, title in zip(panels, (heads, ffns), ("Heads kept", "FFN kept"), strict=True):
        image = axes.imshow(values, cmap=KEPT, vmin=0.0, vmax=1.0, aspect="auto")
        for (i, j), value in np.ndenumerate(values) if layers <= 16 else ():
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(0, layers, 1 + (layers - 1) // 12))
        axes.set_yticks(range(len(by_task)), list(by_task))
        axes.set_xlabel("layer")
        axes.set_title(f"{title} (%)", fontsize=10)
        axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(by_task) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.02)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "50", "100"])
    return figure


def ladders(panels: Mapping[str, tuple[str, Mapping[int, tuple[Spread, Spread]], float]]) -> Figure:
    """Plots the scores of full model and super ticket over the number of training rows.

    Args:
        panels: title -> (name of metric and split, training rows -> (full model, super ticket), score of a constant
            answer).

    Returns:
        The figure.
    """
    figure = new_figure(4.6 * len(panels) + 0.6, 4.1)
    for axes, (title, (metric, rungs, majority)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        rows = sorted(rungs)
        styles = (("full model", FULL, "D", 0.97), ("super ticket", SUPER, "o", 1.03))
        for place, (name, colour, marker, shift) in enumerate(styles):
            measured = [count for count in rows if rungs[count][place].count]
            axes.errorbar(
                # Shift the points, so that the error bars do not hide each other.
                [count * shift for count in measured],
                [100 * rungs[count][place].mean for count in measured],
                yerr=[100 * (rungs[count][place].std or 0.0) for count in measured],
                color=colour,
                marker=marker,
                linewidth=1.6,
                elinewidth=1.0,
                capsize=3,
                label=name,
            )
        axes.axhline(100 * majority, color="#999999", linestyle=":", linewidth=1.2, label="one constant answer")
        axes.set_xscale("log")
        axes.set_xticks(rows, [f"{count:,}" for count in rows])
        axes.minorticks_off()
        axes.set_xlabel("training rows")
        axes.set_ylabel(f"{metric} (x 100)")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    return figure

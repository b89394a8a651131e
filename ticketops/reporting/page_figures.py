"""What report.html shows in place of the still figures: plots whose points can be read, maps of cells, and data."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import Colormap, to_hex

from ticketops.reporting import plots, task_plots
from ticketops.reporting.page import fragment
from ticketops.reporting.parts import plain_names, shown
from ticketops.reporting.svg import inline
from ticketops.reporting.tables import points
from ticketops.searching.selection import Selection
from ticketops.searching.statistics import Spread
from ticketops.text import count, printable

if TYPE_CHECKING:
    from ticketops.tickets import Importance, Ticket

#: Inches of a plot on a wide page and on a phone.
_WIDE, _NARROW = (8.4, 4.7), (4.3, 4.4)
#: Cells of a map: (text, tip, style, class) by place; None is a gap.
Cells = list[tuple[str, str, str, str] | None]


def phase(selection: Selection, metric: str) -> Markup:
    """The metric over the weights remaining, with intervals, and every seed to point at.

    Args:
        selection: levels and scores of a search.
        metric: name of the metric.
    """
    comparisons = selection.comparisons
    seeds = max((len(selection.scores(level)) for level in selection.levels), default=0)
    tips: dict[str, list[str]] = {}
    rows = [["ticket", "sparsity", "weights left (%)", "mean", "seed: score", "against the full model"]]
    for kind in dict.fromkeys(level.kind for level in selection.levels):
        levels = [level for level in selection.levels if level.kind == kind and selection.scores(level)]
        for level in levels:
            scores = selection.scores(level)
            name = "full model" if kind == "full" else f"{kind}, sparsity {level.sparsity:g}"
            one = comparisons.get(level.sparsity) if kind == "winning" else None
            against = shown(one, "levels") if one is not None and one.difference.count else ""
            mean = points(Spread.of(scores.values()))
            left = f"{100 * level.weights_remaining:.1f}"
            if seeds <= plots.MOST_SEEDS:
                tips.setdefault(f"{kind}-seeds", []).extend(
                    f"{name}, seed {seed}: {metric} {100 * score:.2f}" for seed, score in scores.items()
                )
            if kind != "full":
                text = f"{name}: mean {metric} {mean} over {count(len(scores), 'seed')}, {left} % of the weights left"
                tips.setdefault(f"{kind}-means", []).append(text + (f"; against full: {against}" if against else ""))
            if against:
                tips.setdefault("differences", []).append(f"{name} against the full model: {against}")
            known = list(scores.items())[: plots.MOST_SEEDS]
            by_seed = ", ".join(f"{seed}: {100 * score:.2f}" for seed, score in known)
            by_seed += ", ..." if len(known) < len(scores) else ""
            star = " ★" if level is selection.super_level else ""
            rows.append([kind + star, f"{level.sparsity:g}", left, mean, by_seed, against])
    kinds = [kind for kind in ("winning", "random", "losing") if f"{kind}-means" in tips]
    series = [(f"{kind}-", kind) for kind in kinds]
    series += [("-seeds", "single seeds")] if seeds <= plots.MOST_SEEDS else []
    series += [("-band", "bands")] if seeds > plots.FEW_SEEDS else []
    if not any(one.low is not None for one in comparisons.values()):
        tips.pop("differences", None)
    caption = f"{printable(metric)} on {selection.split} against the weights remaining"
    drawn = [
        _inlined(plots.phase_transition, (selection, metric, "", size), f"phase-{name}", caption, tips)
        for name, size in (("wide", _WIDE), ("narrow", _NARROW))
    ]
    return fragment("figure", caption=caption, plots=drawn, series=series, rows=rows)


def importance(importances: "Sequence[Importance]", tickets: "Mapping[int, Ticket]", name: str) -> Markup:
    """The importance of each head and FFN, what the super ticket keeps, and how far the tickets of seeds agree.

    Args:
        importances: one per seed.
        tickets: seed -> super ticket; may be empty.
        name: name of the tickets.
    """
    heads, ffns = plots.mean_importance(importances)
    tops = [max(float(values.max()), 1e-12) for values in (heads, ffns)]
    viridis = colormaps["viridis"]
    gradient = _gradient(viridis)
    rows = []
    for layer, (own, ffn) in enumerate(zip(heads, ffns, strict=True)):
        cells: Cells = [
            _cell(f"{value:.3f}", f"layer {layer}, head {head}: {value:.3f}", viridis, value / tops[0])
            for head, value in enumerate(own)
        ]
        rows.append(
            (layer, [*cells, None, _cell(f"{ffn:.3f}", f"layer {layer}, FFN: {ffn:.3f}", viridis, ffn / tops[1])])
        )
    columns = [*map(str, range(heads.shape[1])), None, "FFN"]
    scales = [(label, "0", f"{top:.2f}", gradient) for label, top in zip(("heads", "FFNs"), tops, strict=True)]
    maps = [_map(f"Importance, mean over {count(len(importances), 'seed')}", "layer", columns, rows, scales)]
    if tickets:
        kept_heads, kept_ffns = plots.mean_kept(list(tickets.values()))
        rows = [
            (
                layer,
                [
                    *(_kept(f"layer {layer}, head {head}", share) for head, share in enumerate(own)),
                    None,
                    _kept(f"layer {layer}, FFN", ffn),
                ],
            )
            for layer, (own, ffn) in enumerate(zip(kept_heads, kept_ffns, strict=True))
        ]
        scale = ("", "pruned", "kept" if len(tickets) == 1 else f"kept by all {len(tickets)} seeds", _KEPT_GRADIENT)
        maps.append(_map(f"Kept by {name}", "layer", columns, rows, [scale]))
    if 1 < len(tickets) <= plots.MOST_SEEDS:
        from ticketops.tickets import jaccards

        seeds, overlap = list(tickets), 100 * jaccards(list(tickets.values()))
        np.fill_diagonal(overlap, np.nan)
        names = [str(seed) for seed in seeds]
        maps.append(
            _matrix(
                "Overlap of the seeds' tickets (Jaccard, %)", names, overlap, (0, 100), plots.KEPT, "{:.0f}", "seed"
            )
        )
    caption = "Importance of each head and FFN" + (", what the super ticket keeps" if tickets else "")
    return fragment("maps", caption=f"{caption}. A layer's head scores and the FFN scores have a scale each", maps=maps)


def arms(scores: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], relative: bool) -> Markup:
    """Each arm's scores by task, or their differences from training without tickets: `task_plots.arms`.

    Args:
        scores, titles, relative: as there.
    """
    what = "points against no tickets" if relative else "score"
    seeds = max((len(values) for by_task in scores.values() for values in by_task.values()), default=0)
    few = seeds <= plots.FEW_SEEDS
    tasks = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    tips: dict[str, list[str]] = {}
    rows = [["arm", "task", "mean", what]]
    for place, (arm, by_task) in enumerate(scores.items()):
        for task in (task for task in tasks if task in by_task):
            name = f"{arm}, {titles.get(task, task)}"
            spread = points(Spread.of(by_task[task]), sign=relative)
            tips.setdefault(f"arm{place}-means", []).append(
                f"{name}: {spread} over {count(len(by_task[task]), 'seed')}"
            )
            if few:
                tips.setdefault(f"arm{place}-seeds", []).extend(
                    f"{name}: {100 * value:{'+' if relative else ''}.2f}" for value in by_task[task]
                )
            values = ", ".join(f"{100 * value:{'+' if relative else ''}.2f}" for value in by_task[task])
            rows.append([arm, titles.get(task, task), spread, values])
    caption = f"Each arm by task: {what}"
    drawn = [
        _inlined(task_plots.arms, (scores, titles, relative, "", narrow), f"arms-{name}", caption, tips)
        for name, narrow in (("wide", False), ("narrow", True))
    ]
    series = [(f"arm{place}-", arm) for place, arm in enumerate(scores)]
    return fragment("figure", caption=caption, plots=drawn, series=series, rows=rows)


def overlaps(tasks: Sequence[str], overlap: np.ndarray, chance: np.ndarray) -> Markup:
    """The overlap of the tasks' tickets, and its difference from chance: `task_plots.overlaps`.

    Args:
        tasks, overlap, chance: as there.
    """
    excess = 100 * (overlap - chance)
    reach = max(float(np.nanmax(np.abs(excess))) if np.isfinite(excess).any() else 0.0, 1.0)
    maps = [
        _matrix("Overlap of tickets (Jaccard, %)", tasks, 100 * overlap, (0, 100), plots.KEPT, "{:.0f}"),
        _matrix("More than by chance (points)", tasks, excess, (-reach, reach), task_plots.EXCESS, "{:+.1f}"),
    ]
    return fragment(
        "maps", caption="Overlap of the tasks' tickets; on the diagonal, of two seeds of one task", maps=maps
    )


def profiles(tickets: "Mapping[str, Mapping[int, Ticket]]") -> Markup:
    """The share of heads and of the FFN that the tasks' tickets keep in each layer, averaged over seeds.

    Args:
        tickets: task -> seed -> ticket.
    """
    kept = {task: plots.mean_kept(list(by_seed.values())) for task, by_seed in tickets.items() if by_seed}
    layers = len(next(iter(kept.values()))[1])
    maps = []
    for place, title in enumerate(("Heads kept", "FFN kept")):
        shares = {task: found[place].reshape(layers, -1).mean(1) for task, found in kept.items()}
        rows = [
            (task, [_kept(f"{task}, layer {layer}", value) for layer, value in enumerate(values)])
            for task, values in shares.items()
        ]
        scale = ("", "none", "all", _KEPT_GRADIENT)
        maps.append(_map(title, "layer", [*map(str, range(layers))], rows, [scale]))
    return fragment("maps", caption="What the tickets keep, layer by layer, mean over seeds", maps=maps)


def ladder(panels: Mapping[str, task_plots.Panel]) -> Markup:
    """The scores of full model and super ticket over the number of training rows: `task_plots.ladders`.

    Args:
        panels: as there.
    """
    tips: dict[str, list[str]] = {}
    rows = [["ladder", "model", "training rows", "mean", "scores of the seeds"]]
    for place, (title, panel) in enumerate(panels.items()):
        seeds = max((len(some) for found in (panel.full, panel.super) for some in found.values()), default=0)
        for label, found in (("full model", panel.full), ("super ticket", panel.super)):
            for number in (number for number in sorted(found) if found[number]):
                values, name = found[number], f"{title}, {label}, {count(number, 'training row')}"
                mean = points(Spread.of(values))
                key = f"ladder{place}-{label.replace(' ', '-')}"
                tips.setdefault(f"{key}-means", []).append(f"{name}: {panel.metric} {mean}")
                if seeds <= plots.FEW_SEEDS:
                    tips.setdefault(f"{key}-seeds", []).extend(f"{name}: {100 * value:.2f}" for value in values)
                each = ", ".join(f"{100 * value:.2f}" for value in values)
                rows.append([title, label, f"{number}", mean, each])
    caption = "Scores against the number of training rows"
    drawn = [
        _inlined(task_plots.ladders, (panels, "", narrow), f"ladder-{name}", caption, tips)
        for name, narrow in (("wide", False), ("narrow", True))
    ]
    return fragment("figure", caption=caption, plots=drawn, series=[], rows=rows)


def _inlined(draw: Any, arguments: Sequence[Any], name: str, caption: str, tips: Mapping[str, Sequence[str]]) -> Markup:
    # A page's tips are one line each, without control characters.
    clean = {group: [printable(tip) for tip in texts] for group, texts in tips.items()}
    with plain_names():
        return inline(draw(*arguments), name, f"{caption}. The data follows the figure.", clean)


def _map(title: str, corner: str, columns: Sequence[str | None], rows: Any, scales: Any, numbers: bool = False) -> Any:
    return {"title": title, "corner": corner, "columns": columns, "rows": rows, "scales": scales, "numbers": numbers}


def _cell(text: str, tip: str, colours: Colormap, place: float) -> tuple[str, str, str, str]:
    """A cell in a colour of a map, with its text in black or white, whichever is read better on it."""
    red, green, blue, _ = colours(float(np.clip(place, 0.0, 1.0)))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"
    return text, tip, f"background:{to_hex((red, green, blue))};color:{ink}", ""


_KEPT_GRADIENT = "background:linear-gradient(90deg,var(--pruned),var(--kept))"


def _kept(what: str, share: float) -> tuple[str, str, str, str]:
    """A cell for what tickets keep, in colours that the page's scheme sets."""
    text = {0.0: "pruned", 1.0: "kept"}.get(float(share), f"{100 * share:.0f} % kept")
    return text, f"{what}: {text}", f"--v:{float(share):.3f}", "share"


def _gradient(colours: Colormap) -> str:
    return f"background:linear-gradient(90deg,{','.join(to_hex(colours(place / 6)) for place in range(7))})"


def _matrix(
    title: str,
    names: Sequence[str],
    values: np.ndarray,
    limits: tuple[float, float],
    colours: Colormap,
    form: str,
    corner: str = "",
) -> Any:
    """A square map whose cells hold their numbers."""
    low, high = limits
    rows = []
    for name, own in zip(names, values, strict=True):
        cells: Cells = [
            _cell(
                form.format(value),
                f"{corner} {name} and {other}: {form.format(value)}".lstrip(),
                colours,
                (value - low) / (high - low),
            )
            if np.isfinite(value)
            else ("–", f"{corner} {name} and {other}: no pair".lstrip(), "", "")
            for other, value in zip(names, own, strict=True)
        ]
        rows.append((name, cells))
    scale = ("", form.format(low), form.format(high), _gradient(colours))
    return _map(title, corner, list(names), rows, [scale], numbers=True)

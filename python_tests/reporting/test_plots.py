import io
import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ticketops.reporting import plots
from ticketops.searching import select
from ticketops.tickets import prune

from .made_up import importance


def level_records(seeds: int) -> list[dict]:
    draw = np.random.default_rng(0)
    levels = [("full", 0.0), *itertools.product(("winning", "random", "losing"), (0.1, 0.3, 0.6))]
    return [
        {
            "kind": kind,
            "sparsity": level,
            "seed": seed,
            "heads_pruned": 0,
            "ffns_pruned": 0,
            "weights_remaining": 1 - 0.7 * level,
            "weights_remaining_encoder": 1 - level,
            "score": 0.8 + 0.01 * float(draw.normal()),
            "report_score": None,
        }
        for (kind, level), seed in itertools.product(levels, range(seeds))
    ]


class Drawn:
    """What was saved: the figures, and where each text stood."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.texts: dict[int, tuple[str, Bbox]] = {}

    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of texts whose boxes overlap."""
        return [(a, b) for (a, x), (b, y) in itertools.combinations(self.texts.values(), 2) if x.overlaps(y)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    seen = Drawn()
    save, draw = Figure.savefig, Text.draw

    def keep_figure(figure: Figure, *args: Any, **kwargs: Any) -> None:
        seen.figures.append(figure)
        save(figure, *args, **kwargs)

    def keep_text(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            # The layout draws several times; the last one counts.
            # Without the arrow of an annotation.
            seen.texts[id(text)] = (text.get_text(), Text.get_window_extent(text, renderer))
        draw(text, renderer)

    monkeypatch.setattr(Figure, "savefig", keep_figure)
    monkeypatch.setattr(Text, "draw", keep_text)
    return seen


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_phase_transition_shows_every_level_with_its_seeds(drawn: Drawn, seeds: int):
    selection = select(level_records(seeds), range(seeds))
    plots.phase_transition(selection, "accuracy", "Super tickets of m on t").savefig(io.BytesIO())
    axes, *below = drawn.figures[0].axes
    assert bool(below) == (seeds > 1)
    groups = {
        group.get_gid(): group.get_offsets() for group in axes.collections if group.get_gid() and "-" in group.get_gid()
    }
    for kind in ("winning", "random", "losing"):
        levels = [level for level in selection.levels if level.kind == kind]
        expected = [[100 * level.weights_remaining, 100 * level.spread.mean] for level in levels]
        np.testing.assert_allclose(groups[f"{kind}-means"], expected)
        expected = [[100 * level.weights_remaining, 100 * one] for level in levels for one in level.scores.values()]
        np.testing.assert_allclose(groups[f"{kind}-seeds"], expected)
        assert (f"{kind}-band" in groups) == (seeds > plots.FEW_SEEDS)
    texts = {text for text, _ in drawn.texts.values()}
    assert {"full model", "winning tickets", "random tickets", "losing tickets"} <= texts
    assert any(text.startswith("Super tickets of m on t\n") for text in texts)
    assert axes.xaxis_inverted()
    assert "accuracy on validation" in axes.get_ylabel()
    assert drawn.overlapping() == []


def test_intervals_of_the_winning_levels_are_those_that_the_verdict_rests_on(drawn: Drawn):
    selection = select(level_records(3), range(3))
    plots.phase_transition(selection, "accuracy").savefig(io.BytesIO())
    below = drawn.figures[0].axes[1]
    bars = [line.get_ydata() for line in below.lines if len(set(line.get_xdata())) == 1]
    np.testing.assert_allclose(bars, [[100 * one.low, 100 * one.high] for one in selection.comparisons.values()])


def test_a_score_axis_is_high_enough_to_show_noise_as_noise():
    assert plots.least_range([0.8, 0.82, 0.84], 0) == pytest.approx(8 * 0.02)
    assert plots.least_range([0.8], 400) == pytest.approx(6 * 0.02)
    assert plots.least_range([0.8], 0) == plots.least_range([], 0) == 0.05
    assert plots.limits_of([0.79, 0.81], 0.12) == pytest.approx((0.74, 0.86))
    assert plots.limits_of([0.5, 0.9], 0.12) == pytest.approx((0.476, 0.924))


@pytest.mark.parametrize("shape", [(1, 2), (6, 12), (24, 16)])
def test_importance_map_shows_heads_and_ffns_on_scales_of_their_own(drawn: Drawn, shape: tuple[int, int]):
    scores = [importance(seed, shape) for seed in range(2)]
    tickets = [prune(one, counts=(1, 1)) for one in scores]
    plots.importance_map(scores, tickets, "the ticket", "Super tickets of m on t").savefig(io.BytesIO())
    heads, ffns, kept = drawn.figures[0].axes
    (cells,), (column,), (share,) = (axes.images for axes in (heads, ffns, kept))
    np.testing.assert_allclose(cells.get_array(), np.mean([one.normalized_head().numpy() for one in scores], axis=0))
    np.testing.assert_allclose(np.linalg.norm(column.get_array()), 1.0, atol=0.2)
    assert (cells.norm.vmax, column.norm.vmax) == (cells.get_array().max(), column.get_array().max())
    found = np.ma.filled(share.get_array(), np.nan)
    np.testing.assert_allclose(found[:, :-2], np.mean([ticket.head_mask.numpy() for ticket in tickets], axis=0))
    np.testing.assert_allclose(found[:, -1], np.mean([ticket.ffn_mask.numpy() for ticket in tickets], axis=0))
    assert all(axes.child_axes for axes in (heads, ffns, kept))
    assert drawn.overlapping() == []

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

from .test_report import importance


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
            seen.texts[id(text)] = (text.get_text(), text.get_window_extent(renderer))
        draw(text, renderer)

    monkeypatch.setattr(Figure, "savefig", keep_figure)
    monkeypatch.setattr(Text, "draw", keep_text)
    return seen


@pytest.mark.parametrize("seeds", [1, 5])
def test_phase_transition_shows_every_level_with_its_spread(drawn: Drawn, seeds: int):
    selection = select(level_records(seeds), range(seeds))
    plots.phase_transition(selection, "accuracy").savefig(io.BytesIO())
    (axes,) = drawn.figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(labels) == {"full model", "winning tickets", "random tickets", "losing tickets", "super ticket"}
    for container in axes.containers:
        kind = container.get_label().split()[0]
        levels = [level for level in selection.levels if level.kind == kind]
        points = container.lines[0].get_xydata()
        expected = [[100 * level.weights_remaining, 100 * level.spread.mean] for level in levels]
        np.testing.assert_allclose(points, expected)
    assert axes.xaxis_inverted()
    assert "(%)" in axes.get_xlabel()
    assert "accuracy on validation" in axes.get_ylabel()
    assert len(drawn.texts) > 5
    assert drawn.overlapping() == []


@pytest.mark.parametrize("seeds", [1, 3])
def test_importance_map_shows_scores_and_what_is_kept(drawn: Drawn, seeds: int):
    scores = [importance(seed) for seed in range(seeds)]
    tickets = [prune(one, counts=(3, 1)) for one in scores]
    plots.importance_map(scores, tickets, "the ticket").savefig(io.BytesIO())
    left, right = drawn.figures[0].axes[:2]
    cells = np.ma.filled(left.images[0].get_array(), np.nan)
    np.testing.assert_allclose(cells[:, :4], np.mean([one.normalized_head().numpy() for one in scores], axis=0))
    assert np.isnan(cells[:, 4]).all()
    np.testing.assert_allclose(np.linalg.norm(cells[:, 5]), 1.0, atol=0.1)
    kept = np.ma.filled(right.images[0].get_array(), np.nan)
    np.testing.assert_allclose(kept[:, :4], np.mean([ticket.head_mask.numpy() for ticket in tickets], axis=0))
    np.testing.assert_allclose(kept[:, 5], np.mean([ticket.ffn_mask.numpy() for ticket in tickets], axis=0))
    assert (left.get_xlabel(), left.get_ylabel()) == ("head", "layer")
    assert len(drawn.texts) > 5
    assert drawn.overlapping() == []

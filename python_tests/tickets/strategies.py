"""Random tickets and importances for the property tests of this folder."""

from typing import Any

import torch
from hypothesis import strategies as st

from ticketops.tickets import Granularity, Importance, Ticket

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6))
# Few values, so that ties are common; zero so that whole layers of zeros occur.
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 1e-6, 1e6])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
METADATA = st.dictionaries(st.text(), JSON, max_size=4)


@st.composite
def tickets(draw: Any, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES, metadata: Any = METADATA) -> Ticket:
    layers, heads = draw(shapes)
    bits = draw(st.lists(st.booleans(), min_size=layers * (heads + 1), max_size=layers * (heads + 1)))
    masks = torch.tensor(bits).view(layers, heads + 1)
    return Ticket(masks[:, :heads], masks[:, heads], draw(metadata))


@st.composite
def same_shape_tickets(draw: Any, count: int) -> list[Ticket]:
    shape = st.just(draw(SHAPES))
    return [draw(tickets(shape, st.just({}))) for _ in range(count)]


@st.composite
def importances(draw: Any, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES) -> Importance:
    layers, heads = draw(shapes)
    scores = draw(st.lists(SCORES, min_size=layers * (heads + 1), max_size=layers * (heads + 1)))
    return of_scores(*torch.tensor(scores, dtype=torch.float64).view(layers, heads + 1).split([heads, 1], dim=1))


def of_scores(head: torch.Tensor, ffn: torch.Tensor, granularity: Granularity = "example") -> Importance:
    """The importance whose averages are these scores: one example was recorded."""
    importance = Importance(*head.shape, granularity)
    for layer, (head_row, ffn_row) in enumerate(zip(head, ffn.flatten(), strict=True)):
        importance.add_head(layer, head_row[None], head_row[None])
        importance.add_ffn(layer, ffn_row[None], ffn_row[None])
    return importance

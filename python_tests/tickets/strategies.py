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
NEURONS = 5
METADATA = st.dictionaries(st.text(), JSON, max_size=4)


@st.composite
def tickets(draw: Any, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES, metadata: Any = METADATA) -> Ticket:
    layers, heads = draw(shapes)
    width = heads + 1 + (NEURONS if draw(st.booleans()) else 0)
    bits = draw(st.lists(st.booleans(), min_size=layers * width, max_size=layers * width))
    masks = torch.tensor(bits).view(layers, width)
    neurons = masks[:, heads + 1 :] if width > heads + 1 else None
    return Ticket(masks[:, :heads], masks[:, heads], draw(metadata), neurons)


@st.composite
def same_shape_tickets(draw: Any, count: int) -> list[Ticket]:
    shape = st.just(draw(SHAPES))
    return [draw(tickets(shape, st.just({}))) for _ in range(count)]


@st.composite
def importances(draw: Any, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES) -> Importance:
    layers, heads = draw(shapes)
    width = heads + 1 + NEURONS
    scores = torch.tensor(draw(st.lists(SCORES, min_size=layers * width, max_size=layers * width)), dtype=torch.float64)
    head, ffn, neuron = scores.view(layers, width).split([heads, 1, NEURONS], dim=1)
    return of_scores(head, ffn, neuron=neuron if draw(st.booleans()) else None)


def of_scores(
    head: torch.Tensor, ffn: torch.Tensor, granularity: Granularity = "example", neuron: torch.Tensor | None = None
) -> Importance:
    """The importance whose averages are these scores: one example was recorded."""
    importance = Importance(*head.shape, granularity, neurons=None if neuron is None else neuron.shape[1])
    for layer, row in enumerate(() if neuron is None else neuron):
        importance.add_neuron(layer, row[None], row[None])
    for layer, (head_row, ffn_row) in enumerate(zip(head, ffn.flatten(), strict=True)):
        importance.add_head(layer, head_row[None], head_row[None])
        importance.add_ffn(layer, ffn_row[None], ffn_row[None])
    return importance

import copy
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.tickets import Ticket, WeightCounts

from .strategies import NEURONS, same_shape_tickets, tickets


def kept_neurons(ticket: Ticket) -> torch.Tensor:
    """Bool [layers, NEURONS], spelled out where the ticket prunes none."""
    return ticket.ffn_mask[:, None].expand(-1, NEURONS) if ticket.neuron_mask is None else ticket.neuron_mask


def ticket(head_rows: list[str], ffn_row: str) -> Ticket:
    heads, ffns = ([[c == "1" for c in row] for row in rows] for rows in (head_rows, [ffn_row]))
    return Ticket(torch.tensor(heads), torch.tensor(ffns[0]))


def test_masks_given_are_copied() -> None:
    head_mask, ffn_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    metadata = {"nested": {"list": [1]}}
    made = Ticket(head_mask, ffn_mask, metadata)
    head_mask[0, 0] = False
    ffn_mask[0] = False
    metadata["nested"]["list"].append(2)
    assert made.is_full
    assert made.metadata == {"nested": {"list": [1]}}


def test_nothing_that_a_ticket_hands_out_changes_it() -> None:
    made = Ticket(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, dtype=torch.bool), {"nested": {"list": [1]}})
    made.head_mask[0, 0] = False
    made.ffn_mask[0] = False
    made.metadata["nested"]["list"].append(2)
    assert made.is_full
    assert made.metadata == {"nested": {"list": [1]}}
    with pytest.raises(TypeError):
        made.metadata["new"] = 1  # type: ignore[index]
    for name in ("head_mask", "metadata", "new"):
        with pytest.raises(AttributeError):
            setattr(made, name, None)


def test_full() -> None:
    full = Ticket.full(3, 4)
    assert full.is_full
    assert (full.num_layers, full.num_heads, full.heads_pruned, full.ffns_pruned) == (3, 4, 0, 0)
    with pytest.raises(InputError, match="0 layers x 4 heads"):
        Ticket.full(0, 4)


@pytest.mark.parametrize(
    ("head_mask", "ffn_mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, dtype=torch.bool), "head_mask is torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), [True, True], "ffn_mask is list"),
        (torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool), r"head_mask \[3\]"),
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(3, dtype=torch.bool), r"\[2, 3\] and ffn_mask \[3\]"),
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool), r"ffn_mask \[2, 1\]"),
        (torch.ones(2, 0, dtype=torch.bool), torch.ones(2, dtype=torch.bool), r"head_mask \[2, 0\]"),
    ],
)
def test_bad_masks_are_refused(head_mask: torch.Tensor, ffn_mask: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ticket(head_mask, ffn_mask)


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}, ["x"]])
def test_metadata_that_is_not_json_is_refused(metadata: object) -> None:
    with pytest.raises(InputError, match="metadata"):
        Ticket(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool), metadata)  # type: ignore[arg-type]


def test_check_names_both_shapes() -> None:
    Ticket.full(12, 12).check(12, 12)
    with pytest.raises(InputError, match="12 layers x 12 heads does not fit 6 layers x 8 heads"):
        Ticket.full(12, 12).check(6, 8)


def test_shapes_must_agree() -> None:
    for combine in (Ticket.union, Ticket.intersection, Ticket.jaccard):
        with pytest.raises(InputError, match="2 layers x 3 heads"):
            combine(Ticket.full(2, 3), Ticket.full(2, 4))


@given(same_shape_tickets(3))
def test_set_algebra(abc: list[Ticket]) -> None:
    a, b, c = abc
    full = Ticket.full(a.num_layers, a.num_heads)
    empty = Ticket(~full.head_mask, ~full.ffn_mask)
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (a & b) == a == a & (a | b)
    assert a | empty == a == a & full
    assert a | full == full
    assert a & empty == empty


@given(same_shape_tickets(2))
def test_jaccard_is_the_share_of_common_structures(ab: list[Ticket]) -> None:
    a, b = ab

    def kept(ticket: Ticket) -> Counter[tuple[int, int]]:
        """Structure -> how much of it is kept, in neurons; a head counts as much as a whole FFN."""
        heads = dict.fromkeys(map(tuple, ticket.head_mask.nonzero().tolist()), NEURONS)
        neurons = kept_neurons(ticket).nonzero().tolist()
        return Counter({**heads, **{(layer, -1 - neuron): 1 for layer, neuron in neurons}})

    either = (kept(a) | kept(b)).total()
    assert a.jaccard(b) == pytest.approx((kept(a) & kept(b)).total() / either if either else 1.0)
    assert 0 <= a.jaccard(b) == b.jaccard(a) <= 1
    assert (a.jaccard(b) == 1) == (a == b)


@given(same_shape_tickets(2))
def test_equality_and_hash_are_of_the_masks_alone(ab: list[Ticket]) -> None:
    a, b = ab
    renamed = Ticket(a.head_mask, a.ffn_mask, {"name": "x"}, a.neuron_mask)
    assert renamed == a
    assert hash(renamed) == hash(a)
    same = torch.equal(a.head_mask, b.head_mask) and torch.equal(kept_neurons(a), kept_neurons(b))
    assert (a == b) == same == (len({a, b}) == 1)


def test_a_ticket_is_not_equal_to_anything_else() -> None:
    assert Ticket.full(1, 2) != "ticket"
    assert Ticket.full(1, 2) != Ticket.full(2, 1)


@given(tickets())
def test_copies_and_pickles_are_equal(made: Ticket) -> None:
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin == made
        assert twin.metadata == made.metadata


@given(tickets(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 50))
def test_weights_remaining_counts_weights(made: Ticket, head: int, ffn: int, norms: int, embeddings: int) -> None:
    # The model as one list of weights, each of them kept or not; an FFN's are its neurons' and those of its bias.
    head_weights = made.head_mask.flatten().repeat_interleave(head)
    neuron_weights = kept_neurons(made).flatten().repeat_interleave(2)
    bias_weights = made.ffn_mask.repeat_interleave(ffn)
    encoder = torch.cat([head_weights, neuron_weights, bias_weights, torch.ones(norms, dtype=torch.bool)])
    model = torch.cat([encoder, torch.ones(embeddings, dtype=torch.bool)])
    counts = WeightCounts(head, ffn + 2 * NEURONS, encoder.numel(), model.numel(), neuron=2)
    assert made.weights_remaining(counts) == pytest.approx(model.double().mean().item(), abs=1e-15)
    assert made.weights_remaining(counts, embeddings=False) == pytest.approx(encoder.double().mean().item(), abs=1e-15)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match="prunes 20 of 10 weights"):
        ticket(["01", "11"], "11").weights_remaining(WeightCounts(head=20, ffn=1, encoder=10, total=10))
    for counts in [(-1, 1, 5, 5), (1, -1, 5, 5), (1, 1, 6, 5), (0, 0, 0, 0)]:
        with pytest.raises(InputError, match="is not a model"):
            WeightCounts(*counts)


def test_print_out() -> None:
    assert str(ticket(["101", "000"], "01")).splitlines() == [
        "layer  heads  FFN",
        "    0  ■ · ■   ·",
        "    1  · · ·   ■",
        "■ kept, · pruned: 4 of 6 heads and 1 of 2 FFNs pruned",
    ]
    assert repr(ticket(["101", "000"], "01")) == "<Ticket: 2 layers x 3 heads, 4 heads and 1 FFN pruned>"


@given(tickets())
def test_print_out_shows_every_structure(made: Ticket) -> None:
    *rows, counts = str(made).splitlines()[1:]
    cells = [[cell == "■" for cell in row.split()[1 : made.num_heads + 2]] for row in rows]
    expected = torch.cat([made.head_mask, made.ffn_mask[:, None]], dim=1)
    assert cells == expected.tolist()
    assert f"{made.heads_pruned} of" in counts
    if made.neuron_mask is not None:
        assert [row.split()[-1] for row in rows] == [f"{kept}/{NEURONS}" for kept in made.neuron_mask.sum(1).tolist()]


def test_neurons_have_one_form() -> None:
    heads, ffns = torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False])
    neurons = torch.tensor([[True, True, False], [True, True, True]])
    made = Ticket(heads, ffns, None, neurons)
    neurons[0] = False
    made.neuron_mask.zero_()  # type: ignore[union-attr]
    assert made.neuron_mask.tolist() == [[True, True, False], [False] * 3]  # type: ignore[union-attr]
    assert (made.neurons_pruned, made.ffns_pruned, made.is_full) == (1, 1, False)
    assert Ticket(heads, ffns, None, torch.ones(2, 3, dtype=torch.bool)) == Ticket(heads, ffns)
    # The last neuron takes the FFN along.
    assert Ticket(heads, ffns, None, neurons) == Ticket(heads, ~ffns & ffns)
    assert str(made).splitlines() == [
        "layer  heads  FFN  neurons",
        "    0  ■       ■   2/3",
        "    1  ■       ·   0/3",
        "■ kept, · pruned: 0 of 2 heads and 1 of 2 FFNs pruned, and 1 of the 3 neurons of the others",
    ]
    assert repr(made) == "<Ticket: 2 layers x 1 head, 0 heads, 1 FFN and 1 neuron pruned>"
    made.check(2, 1, 3)
    with pytest.raises(InputError, match="FFNs of 3 neurons does not fit FFNs of 4"):
        made.check(2, 1, 4)
    for bad in (torch.ones(3, 3, dtype=torch.bool), torch.ones(2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(InputError, match="neuron_mask"):
            Ticket(heads, ffns, None, bad)

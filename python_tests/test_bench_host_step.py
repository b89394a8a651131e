"""A whole training step on the path of a GPU: how much it launches outside of graphs, and that the host never waits."""

from collections import Counter

import pytest
import torch

from bench import host_step
from ticketops import PackingCollator, Ticket

X = torch.tensor([1.0, -1.0, 2.0])
ONE = torch.tensor(1)


def in_rows(batch):
    """A batch of PackingCollator with the tokens of a padded one."""
    rows = [
        {name: value[row, :length].tolist() for name, value in batch.items() if name != "labels"} | {"labels": 0}
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist())
    ]
    return PackingCollator()(rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_never_waits_and_has_at_most_150_launches(autocast):
    launches, waits = host_step.count_step(autocast=autocast)
    assert not waits
    assert launches.total() <= 150, launches
    # Those of a graph are its own.
    assert launches["graph"] == 2
    assert launches["importance"] == 1
    assert launches["_fused_adamw_"] == 7


def test_a_step_under_a_ticket_never_waits():
    heads, ffns = torch.ones(12, 1).bool(), torch.ones(12).bool()
    heads[5], ffns[3] = False, False
    ticket = Ticket(heads, ffns, neuron_mask=torch.arange(32).expand(12, -1) % 3 > 0)
    launches, waits = host_step.count_step(ticket=ticket)
    assert not waits
    # What no optimizer may move is put aside and back.
    assert launches["copy_table"] == 2


def test_a_step_on_packed_batches_never_waits():
    launches, waits = host_step.count_step(collator=in_rows)
    assert not waits
    assert launches["masked_scatter_"] == 2 * 5


def test_a_batch_that_nobody_has_counted_is_waited_for():
    _, waits = host_step.count_step(collator=dict)
    assert waits == Counter(is_nonzero=1, tolist=1)


def test_a_wait_anywhere_in_the_step_shows():
    _, waits = host_step.count_step(after=lambda model: model.classifier.bias[0].item())
    assert waits == Counter(item=1)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda: X[0].item(), "item"),
        (lambda: bool(X.any()), "is_nonzero"),
        (lambda: int(ONE), "item"),
        (lambda: float(ONE), "item"),
        (lambda: [0, 1][ONE], "item"),
        (lambda: X.tolist(), "tolist"),
        (lambda: X.cpu(), "cpu"),
        (lambda: X.numpy(), "numpy"),
        (lambda: X.to("cpu"), "to"),
        (lambda: X.to(device="cpu"), "to"),
        (lambda: torch.tensor([1, 2], device="cpu"), "tensor"),
        (lambda: X.nonzero(), "nonzero"),
        (lambda: X[X > 0], "nonzero"),
        (lambda: X.masked_select(X > 0), "masked_select"),
        (lambda: X.unique(), "_unique2"),
        (lambda: torch.equal(X, X), "equal"),
        (lambda: X.repeat_interleave(ONE.expand(3)), "repeat_interleave"),
        (lambda: 2.0 in X, "item"),
    ],
)
def test_what_waits_is_known(run, name):
    assert host_step.followed(run)[1][name] == 1


def test_what_does_not_wait_is_no_wait():
    def run():
        x = X.to(torch.float64).clone().masked_fill(X > 0, 0)
        x.sum().add_(1)
        return x[:2], len(x), x.shape, torch.where(x > 0, x, 0), x.clamp_min(0).index_select(0, torch.arange(2))

    assert host_step.followed(run)[1] == Counter()


def test_launches_of_a_call_for_many_tensors():
    assert host_step.launches_for([], 4) == 0
    assert host_step.launches_for([1] * 36, 4) == 1
    assert host_step.launches_for([1] * 37, 4) == 2
    # Pieces of 65536 elements, 320 of them.
    assert host_step.launches_for([320 * 65536], 4) == 1
    assert host_step.launches_for([320 * 65536, 1], 4) == 2
    assert host_step.launches_for([320 * 65536 + 1] * 2, 4) == 3
    # The part of a tensor that is left over counts among the next launch's.
    assert host_step.launches_for([320 * 65536 + 1, *[1] * 35], 4) == 2
    assert host_step.launches_for([320 * 65536 + 1, *[1] * 36], 4) == 3

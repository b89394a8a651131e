"""A random walk over what users do to models: a patched one does the same as its stock twin, or refuses by name.

A walk that fails is shrunk to the few steps that it takes, and walking.walk(...) repeats it.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from transformers.utils import logging

import ticketops
from models import walking
from ticketops.ops import memory

PACKINGS = (True, None), (True, 16), (False, None)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written is not a number, and saving says nothing."""
    take = memory.from_dlpack
    monkeypatch.setattr(memory, "from_dlpack", lambda capsule: take(capsule).fill_(float("nan")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    torch.use_deterministic_algorithms(False)


def random_walks(walks, length):
    """How many steps were made, and how often each message refused one."""
    counts: Counter[str] = Counter()
    # Shrinking puts the first name in the place of others; lists would be short if they could be.
    step = st.tuples(st.sampled_from(["nothing", *sorted(walking.OPERATIONS)]), st.integers(0, 999))

    @settings(max_examples=walks, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(
        st.sampled_from(walking.STARTS),
        st.sampled_from(PACKINGS),
        st.lists(step, min_size=length, max_size=length),
    )
    def walk(name, packing, steps):
        steps = [(each, choice) for each, choice in steps if each != "nothing"]
        try:
            walking.walk(name, *packing, steps, counts)
        except walking.Apart:
            note(f"walking.walk({name!r}, *{packing}, {steps}, Counter())")
            raise

    walk()
    return counts


def said(counts):
    """A table of counts, for the summary of a test run."""
    lines = [f"{counts['steps']:,} steps, {counts['refused']:,} of them refused"]
    lines += [f"  {count:5} {what}" for what, count in counts.most_common() if what not in ("steps", "refused")]
    return "\n".join(lines)


@pytest.mark.slow
def test_each_operation_once_whole_and_once_with_a_ticket(record_property):
    counts: Counter[str] = Counter()
    for place, name in enumerate(sorted(walking.OPERATIONS)):
        steps = [("padding", place), (name, place), ("ticket", place), (name, place + 1)]
        try:
            walking.walk(walking.STARTS[place % len(walking.STARTS)], *PACKINGS[place % 3], steps, counts)
        except walking.Apart as error:
            raise AssertionError(f"{name}: {error}") from error
    record_property("said", said(counts))
    assert len(walking.OPERATIONS) >= 40
    assert counts["refused"]


@pytest.mark.slow
def test_short_walks(record_property):
    record_property("said", said(random_walks(15, 10)))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_long_walks(record_property):
    counts = random_walks(200, 20)
    record_property("said", said(counts))
    assert counts["steps"] >= 2000


@pytest.mark.parametrize("fault", ["other weights", "an error", "a refusal without a ticket"])
def test_a_walk_sees_what_differs(monkeypatch, fault):
    def change(walker, random):
        if walker.stock:
            return
        if fault == "an error":
            raise RuntimeError(fault)
        if fault == "a refusal without a ticket":
            raise walking.UnsupportedError(fault)
        with torch.no_grad():
            walker.layers[0].get_submodule("output.dense").weight.mul_(1.001)

    monkeypatch.setitem(walking.OPERATIONS, "change", change)
    steps = [("train", 0), ("change", 0)]
    with pytest.raises(walking.Apart, match="change"):
        walking.walk("BertForTokenClassification", True, None, steps, Counter())


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("name", ["ModernBertForSequenceClassification", "ViTForImageClassification"])
def test_hooks_beside_what_a_ticket_prunes(monkeypatch, name, kind):
    """The LayerNorm and the dropout of a sublayer that is gone see what they see in the stock model."""

    def watch(walker, random):
        for layer in walker.layers:
            for path in ("attn_norm", "mlp_norm", "layernorm_before", "layernorm_after", "dropout"):
                if hasattr(layer, path) and not isinstance(getattr(layer, path), torch.nn.Identity):
                    walking.register(getattr(layer, path), kind, walking.Hook(kind, False, walker.seen))

    monkeypatch.setitem(walking.OPERATIONS, "watch", watch)
    masks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([1, 0, 0]).bool()
    monkeypatch.setattr(walking, "draw_ticket", lambda random: ticketops.Ticket(*masks))
    counts: Counter[str] = Counter()
    walking.walk(name, True, None, [("watch", 0), ("ticket", 0)], counts)
    assert not counts["refused"]

"""All layers of an encoder as one node of autograd, and when they are computed one by one."""

import contextlib
import gc
import weakref

import pytest
import torch
from bounds import roundings
from ops.cases import need
from torch.nn.parallel import DistributedDataParallel

import ticketops
from models.conftest import LAYERS
from ticketops.models import handle


@pytest.fixture(autouse=True)
def served():
    need("native", "attention", torch.float32)


@pytest.fixture
def counts(monkeypatch):
    """How many layers each call of the op computed."""
    found, compute = [], ticketops.ops.encoder_layers
    counted = lambda x, layers, *more: found.append(len(layers)) or compute(x, layers, *more)  # noqa: E731
    monkeypatch.setattr(ticketops.ops, "encoder_layers", counted)
    return found


def gradients(model, batch, handle, **options):
    model.zero_grad()
    with handle.record_importance() as importance:
        model(**batch, **options).loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [*(x for x in found if x is not None), importance.head, importance.ffn]


@pytest.mark.parametrize("training", [False, True])
def test_all_layers_are_computed_at_once(model, batch, counts, training):
    model.train(training)
    with ticketops.patch(model) as handle:
        gradients(model, batch, handle)
        assert counts == [LAYERS]
        with torch.inference_mode():
            model(**batch)
        assert counts == [LAYERS] * 2


def test_a_pass_leaves_nothing_to_the_garbage_collector(model, batch, monkeypatch):
    passes, made = [], handle.EncoderPass
    monkeypatch.setattr(handle, "EncoderPass", lambda *args: passes.append(weakref.ref(one := made(*args))) or one)
    with ticketops.patch(model) as patched:
        gc.collect()
        gc.disable()
        try:
            gradients(model, batch, patched)
            with torch.inference_mode():
                model(**batch)
            assert [one() for one in passes] == [None, None]
        finally:
            gc.enable()


@pytest.mark.parametrize("why", ["checkpointing", "hidden states", "hook", "distributed", "graphs"])
def test_layers_are_computed_one_by_one_where_somebody_comes_between(model, batch, counts, why, request):
    model.train()
    options, caller = {}, model
    with ticketops.patch(model, graphs="auto" if why == "graphs" else False) as handle, contextlib.ExitStack() as stack:
        want = gradients(model, batch, handle)
        counts.clear()
        if why == "checkpointing":
            model.gradient_checkpointing_enable()
        elif why == "hidden states":
            options["output_hidden_states"] = True
        elif why == "hook":
            hook = model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
            stack.callback(hook.remove)
        elif why == "distributed":
            request.getfixturevalue("process_group")
            caller = DistributedDataParallel(model)
        found = gradients(caller, batch, handle, **options)
        # Padded tokens round elsewhere.
        torch.testing.assert_close(found, want, **roundings(1000, 10))
    if why == "graphs":
        # No graph serves a CPU.
        assert counts == [LAYERS]
    else:
        assert set(counts) == {1}
        assert len(counts) >= LAYERS

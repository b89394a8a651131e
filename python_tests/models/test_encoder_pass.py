"""All layers of an encoder as one node of autograd, and when they are computed one by one."""

import contextlib
import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from bounds import roundings
from ops.cases import need
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ticketops
from models.conftest import LAYERS
from models.test_encoders import make
from ticketops.errors import UnsupportedError
from ticketops.models import handle
from ticketops.ops.layer import native


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


def test_gradients_that_are_added_up_come_layer_by_layer(model, batch, counts):
    with ticketops.patch(model):
        model(**batch).loss.backward()
        first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model(**batch).loss.backward()
        assert counts == [LAYERS, *[1] * LAYERS]
        twice = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.equal(2 * one, both) for one, both in zip(first, twice, strict=True))
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)
    assert counts[1 + LAYERS :] == [LAYERS] * 2


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


def checkpointed(reentrant):
    def change(model, place):
        # Lower layers that are frozen in evaluation are not checkpointed.
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for each in set(range(LAYERS)) - {place}:
            model.bert.encoder.layer[each].eval()

    return change


def compiled(model, place):
    model.bert.encoder.layer[place].compile(backend="eager")


def sharded(model, place):
    fully_shard(model.bert.encoder.layer[place])
    fully_shard(model)


@pytest.mark.parametrize("place", range(LAYERS))
@pytest.mark.parametrize("change", [checkpointed(False), checkpointed(True), compiled, sharded])
def test_a_single_layer_that_is_computed_in_its_own_way(model, stock, batch, change, place, process_group):
    with ticketops.patch(model):
        found = []
        for each in (model, stock):
            change(each, place)
            output = each(**batch)
            output.loss.backward()
            found.append([output.logits, *(p.grad for p in each.parameters() if p.grad is not None)])
            found[-1] = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found[-1]]
        torch.testing.assert_close(*found, **roundings(1000, 10))


def larger(layer, given, output):
    return output * 1.5


@pytest.mark.parametrize("place", range(LAYERS))
def test_a_hook_that_comes_within_the_pass(model, stock, batch, place):
    with ticketops.patch(model):
        found = []
        for each in (model, stock):
            each(**batch)
            hooks, register = [], each.bert.encoder.layer[place].register_forward_hook
            add = partial(lambda hooks, register, *_: hooks.append(register(larger)), hooks, register)
            hooks.append(each.bert.embeddings.register_forward_hook(add))
            output = each(**batch)
            output.loss.backward()
            for hook in hooks:
                hook.remove()
            found.append([output.logits, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*found, **roundings(1000, 10))


class Dropping(nn.ModuleList):
    """Leaves out a layer, as LayerDrop does."""

    left_out = -1

    def __iter__(self):
        return iter([each for place, each in enumerate(self._modules.values()) if place != self.left_out])


def fewer(model, place):
    model.config.num_hidden_layers = place


def dropping(model, place):
    owner, name = (model.bert.encoder, "layer") if hasattr(model, "bert") else (model.base_model, "layers")
    setattr(owner, name, Dropping(getattr(owner, name)))
    getattr(owner, name).left_out = place


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GteModel", "EuroBertModel"])
@pytest.mark.parametrize("change", [fewer, dropping])
def test_layers_that_a_pass_leaves_out(name, change, batch):
    model = make(name).eval()
    stock, known = copy.deepcopy(model), ("input_ids", "attention_mask")
    batch = {each: value for each, value in batch.items() if each in known}
    real = batch["attention_mask"][..., None].bool()
    handle = ticketops.patch(model)
    for place in range(1, LAYERS):
        for each in (model, stock):
            change(each, place)
        ours, theirs = (each(**batch)[0] for each in (model, stock))
        if ours.ndim == 3:
            ours, theirs = ours * real, theirs * real
        torch.testing.assert_close(ours, theirs, **roundings(1000, 10))
    with handle.record_importance(), pytest.raises(UnsupportedError, match=r"num_hidden_layers=2|in a Dropping"):
        model(**batch)


def test_weights_of_layers_without_gradients_may_change_before_the_backward_pass(model, stock, batch):
    with ticketops.patch(model):
        for each in (model, stock):
            frozen = [each.bert.embeddings, each.bert.encoder.layer[0]]
            for module in frozen:
                module.requires_grad_(False)
            loss = each(**batch).loss
            with torch.no_grad():
                for parameter in frozen[1].parameters():
                    parameter.mul_(0.5)
            loss.backward()
        found = [[p.grad for p in each.parameters() if p.grad is not None] for each in (model, stock)]
        torch.testing.assert_close(*found, **roundings(1000, 10))


def test_a_backward_pass_that_broke_off_is_not_resumed(model, batch, monkeypatch):
    with ticketops.patch(model):
        output = model.bert(batch["input_ids"]).last_hidden_state
        compute, calls = native.backward, []

        def breaks_off(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError
            return compute(*arguments)

        monkeypatch.setattr(native, "backward", breaks_off)
        with pytest.raises(MemoryError):
            output.backward(torch.ones_like(output))
        with pytest.raises(RuntimeError, match="broke off"):
            output.backward(torch.ones_like(output))

"""Several layers as one node of autograd, against one node for each."""

import weakref

import pytest
import torch

from ticketops import ops
from ticketops.errors import UnsupportedError
from ticketops.ops.layer import chain

from .cases import need
from .layers import DTYPES, STACKS, TRAINED, assert_equal, one_by_one, results, stack


@pytest.fixture(autouse=True)
def served():
    for op in ("attention", "ffn", "residual"):
        need("native", op, torch.float32)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("first_tokens", [False, True])
def test_the_same_to_the_bit_as_one_by_one(name, trained, dtype, autocast, first_tokens):
    given = stack(name, trained, dtype, first_tokens)
    want = results(one_by_one, *given, autocast)
    got = results(ops.encoder_layers, *given, autocast)
    assert any(each is not None for each in want[1:])
    assert_equal(got, want)


def test_they_are_one_node_and_layers_below_what_is_trained_keep_nothing():
    x, sequences, layers, _ = stack("tickets", "upper layers")
    out = ops.encoder_layers(x, layers, sequences)
    assert {type(each).__name__ for each, _ in out.grad_fn.next_functions if each} == {"AccumulateGrad"}
    assert [each is None for each in out.grad_fn.layers] == [True, True, *[False] * (len(layers) - 2)]


def test_what_a_layer_saved_is_freed_when_its_gradients_are_there(monkeypatch):
    x, sequences, layers, _ = stack("tickets")
    out = ops.encoder_layers(x, layers, sequences)
    saved = [weakref.ref(kept[1].output if len(kept[1].output) else kept[1].context) for kept in out.grad_fn.layers]
    alive = []
    as_gradients = chain.as_gradients

    def noted(*arguments):
        alive.append([each() is not None for each in saved])
        return as_gradients(*arguments)

    monkeypatch.setattr(chain, "as_gradients", noted)
    out.sum().backward()
    count = len(layers)
    # The layer at hand is freed behind its own gradients.
    assert alive == [[True] * (count - done) + [False] * done for done in range(count)]
    assert not any(each() is not None for each in saved)


def test_a_graph_that_is_kept_serves_twice_and_no_other():
    x, sequences, layers, leaves = stack("tickets")
    out = ops.encoder_layers(x, layers, sequences).sum()
    out.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    out.backward()
    assert all(map(torch.equal, first, [leaf.grad for leaf in leaves if leaf.grad is not None]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_weights_that_change_before_the_backward_pass_are_noticed():
    x, sequences, layers, _ = stack("tickets")
    out = ops.encoder_layers(x, layers, sequences)
    with torch.no_grad():
        layers[1].weights.wo.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    # The result itself is the caller's.
    x, sequences, layers, leaves = stack("tickets")
    out = ops.encoder_layers(x, layers, sequences)
    out.mul_(2).sum().backward()
    assert leaves[0].grad is not None


def test_hooks_on_saved_tensors_see_those_of_each_layer():
    x, sequences, layers, leaves = stack("tickets")
    want = results(ops.encoder_layers, x, sequences, layers, leaves)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        got = results(ops.encoder_layers, x, sequences, layers, leaves)
    assert len(packed) > 10 * len(layers)
    assert_equal(got, want)


def test_second_derivatives_and_several_gradients_at_once_are_refused():
    x, sequences, layers, _ = stack("tickets")
    out = ops.encoder_layers(x, layers, sequences)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="has no second derivative: take gradients without create_graph=True"):
        gradient.sum().backward()
    out = ops.encoder_layers(x, layers, sequences)
    with pytest.raises(UnsupportedError, match="encoder layers have no backward pass for several gradients at once"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True)

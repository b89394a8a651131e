"""Recorded importance against its definition: one example at a time, masks multiplied in by hand, autograd."""

import contextlib
import copy

import pytest
import torch
from bounds import roundings
from transformers import BertForMultipleChoice, BertForSequenceClassification

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from ticketops.errors import InputError

GRANULARITIES = ["example", "token", "batch"]


def mask_gradients(stock, batch):
    """dL/d mask of a stock eager model with a mask a token: head [B, S, layers, heads] and ffn [B, S, layers]."""
    shape = batch["input_ids"].shape
    head_mask = torch.ones(*shape, LAYERS, HEADS, requires_grad=True)
    ffn_mask = torch.ones(*shape, LAYERS, requires_grad=True)
    hooks = []
    for index, layer in enumerate(stock.bert.encoder.layer):

        def scale_heads(module, args, output, index=index):
            context = output[0].unflatten(-1, (HEADS, -1)) * head_mask[:, :, index, :, None]
            return context.flatten(2), output[1]

        def scale_ffn(module, args, output, index=index):
            return output * ffn_mask[:, :, index, None]

        hooks += [
            layer.attention.self.register_forward_hook(scale_heads),
            # After the FFN's dropout, before the residual.
            layer.output.dropout.register_forward_hook(scale_ffn),
        ]
    stock(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return head_mask.grad.double(), ffn_mask.grad.double()


def by_definition(stock, batches, granularity):
    """Average |dL/d mask|, the slow way: one example at a time but for `batch`."""
    totals, count = [torch.zeros(LAYERS, HEADS).double(), torch.zeros(LAYERS).double()], 0
    for batch in batches:
        rows = (
            [batch]
            if granularity == "batch"
            else [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
        )
        for row in rows:
            for total, gradient in zip(totals, mask_gradients(stock, row), strict=True):
                real = row["attention_mask"].bool()
                terms = gradient[real]
                total += terms.abs().sum(0) if granularity == "token" else terms.sum(0).abs()
            count += 1
    return [total / count for total in totals]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("unpad", [True, False])
def test_importance_equals_its_definition(model, stock, granularity, unpad):
    batches = [tiny_batch(seed=1), tiny_batch(rows=3, width=12, seed=2)]
    with ticketops.patch(model, unpad=unpad) as handle, handle.record_importance(granularity) as importance:
        for batch in batches:
            model(**batch).loss.backward()
    head, ffn = by_definition(stock, batches, granularity)
    torch.testing.assert_close(importance.head, head, **roundings(100, 100 * head.max().item()))
    torch.testing.assert_close(importance.ffn, ffn, **roundings(100, 100 * ffn.max().item()))


@pytest.mark.network
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_importance_of_real_weights_equals_its_definition(minilm, granularity, monkeypatch):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    stock = BertForSequenceClassification.from_pretrained(minilm, attn_implementation="eager").eval().double()
    texts = ["A fine, moving film.", "Dull.", "It goes on and on and on, and then it ends."]
    batch = dict(AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([1, 0, 0])
    monkeypatch.setattr("models.test_importance.LAYERS", 6)
    monkeypatch.setattr("models.test_importance.HEADS", 12)
    model = copy.deepcopy(stock)
    with ticketops.patch(model) as handle, handle.record_importance(granularity) as importance:
        model(**batch).loss.backward()
    head, ffn = by_definition(stock, [batch], granularity)
    torch.testing.assert_close(importance.head, head, **roundings(100, 100 * head.max().item()))
    torch.testing.assert_close(importance.ffn, ffn, **roundings(100, 100 * ffn.max().item()))


def test_batch_importance_equals_the_weight_gradient_identities(model, batch):
    with ticketops.patch(model) as handle, handle.record_importance("batch") as importance:
        model(**batch).loss.backward()
    for index, layer in enumerate(model.bert.encoder.layer):
        weight = layer.attention.output.dense.weight
        products = (weight * weight.grad).detach().double().unflatten(1, (HEADS, -1)).sum((0, 2))
        torch.testing.assert_close(importance.head[index], products.abs(), **roundings(1000, 1))
        # <dY, Y> = <W2, dW2> + <b2, db2>, since Y is linear in both.
        dense = layer.output.dense
        product = sum((p * p.grad).detach().double().sum() for p in (dense.weight, dense.bias))
        torch.testing.assert_close(importance.ffn[index], product.abs(), **roundings(1000, 1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padding_changes_nothing(model, granularity):
    batch = tiny_batch()
    wider = {
        name: value if name == "labels" else torch.nn.functional.pad(value, (0, 9)) for name, value in batch.items()
    }
    wider["input_ids"][:, -9:] = 7
    scores = []
    with ticketops.patch(model) as handle:
        for each in (batch, wider):
            with handle.record_importance(granularity) as importance:
                model(**each).loss.backward()
            scores.append((importance.head, importance.ffn))
    torch.testing.assert_close(scores[1], scores[0], **roundings(10, 0))


def test_importance_needs_no_weight_gradient(model, batch):
    with ticketops.patch(model) as handle:
        with handle.record_importance() as full:
            model(**batch).loss.backward()
        model.zero_grad()
        model.requires_grad_(False)
        with handle.record_importance() as alone:
            model(**batch).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close((alone.head, alone.ffn), (full.head, full.ffn), **roundings(10))


def test_recording_changes_no_gradient(model, batch):
    with ticketops.patch(model) as handle:
        model(**batch).loss.backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        with handle.record_importance():
            model(**batch).loss.backward()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_only_backward_passes_inside_the_block_count(model, batch):
    with ticketops.patch(model) as handle:
        with handle.record_importance() as importance:
            with torch.no_grad():
                model(**batch)
            with pytest.raises(InputError, match="no head importance was recorded"):
                _ = importance.head
            model(**batch).loss.backward()
        head = importance.head.clone()
        model(**batch).loss.backward()
        assert torch.equal(importance.head, head)
        with (
            handle.record_importance(),
            pytest.raises(InputError, match="recorded already"),
            handle.record_importance(),
        ):
            pass
        with pytest.raises(InputError, match="granularity"), handle.record_importance("sentence"):
            pass


def test_an_example_of_multiple_choice_is_all_its_choices():
    torch.manual_seed(0)
    model = BertForMultipleChoice(tiny_config()).eval()
    batch = tiny_batch(rows=4)
    batch = {name: value.view(2, 2, -1) for name, value in batch.items() if name != "labels"}
    batch["labels"] = torch.tensor([0, 1])
    with ticketops.patch(model) as handle:
        with pytest.raises(InputError, match="sequences_per_example"), handle.record_importance():
            pass
        with handle.record_importance(sequences_per_example=2) as whole:
            model(**batch).loss.backward()
        with handle.record_importance("batch", sequences_per_example=2) as single:
            for i in range(2):
                model(**{name: value[i : i + 1] for name, value in batch.items()}).loss.backward()
    torch.testing.assert_close(whole.head, single.head, **roundings(100, 0.1))


def test_pruned_structures_score_zero_and_the_others_are_scored(model, batch):
    head_mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    head_mask[0, 1] = head_mask[2] = False
    ticket = ticketops.Ticket(head_mask, torch.tensor([True, False, True]))
    with ticketops.patch(model).apply(ticket) as handle, handle.record_importance() as importance:
        model(**batch).loss.backward()
    assert torch.equal(importance.head > 0, head_mask)
    assert torch.equal(importance.ffn > 0, ticket.ffn_mask)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_neuron_importance_equals_its_definition(model, stock, granularity):
    """Against a mask a token and neuron, multiplied in by hand."""
    batch = tiny_batch(seed=1)
    with ticketops.patch(model) as handle, handle.record_importance(granularity, neurons=True) as importance:
        model(**batch).loss.backward()
    masks = [torch.ones(*batch["input_ids"].shape, 64, requires_grad=True) for _ in range(LAYERS)]
    for layer, mask in zip(stock.bert.encoder.layer, masks, strict=True):
        layer.output.dense.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
    stock(**batch).loss.backward()
    for layer, mask in enumerate(masks):
        terms = mask.grad.double() * batch["attention_mask"][:, :, None]
        want = {
            "example": terms.sum(1).abs().sum(0),
            "token": terms.abs().sum((0, 1)),
            "batch": terms.sum((0, 1)).abs(),
        }[granularity]
        # The loss is a mean over the batch, so an example's own gradient is as many times larger as there are examples:
        # that and the mean over the examples cancel.
        torch.testing.assert_close(importance.neuron[layer], want, **roundings(1000, 100 * want.max().item()))


def test_neurons_are_recorded_only_when_asked(model, batch):
    with ticketops.patch(model) as handle, handle.record_importance() as importance:
        model(**batch).loss.backward()
    with pytest.raises(InputError, match="no neuron importance was recorded"):
        _ = importance.neuron
    with pytest.raises(InputError, match="has no neurons"):
        ticketops.prune(importance, 0.5, neurons=True)


def test_importance_is_single_precision_whatever_the_default_dtype(model, batch):
    with ticketops.patch(model) as handle:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                with handle.record_importance() as importance:
                    model(**batch).loss.backward()
            finally:
                torch.set_default_dtype(torch.float32)
            found.append(importance.head)
    torch.testing.assert_close(found[1], found[0], **roundings(10))


def test_an_error_leaves_what_was_recorded_before_it(model, batch):
    with ticketops.patch(model) as handle:
        with contextlib.suppress(KeyError), handle.record_importance() as importance:
            model(**batch).loss.backward()
            raise KeyError
        with handle.record_importance() as again:
            model(**batch).loss.backward()
    torch.testing.assert_close(importance.head, again.head)

"""The last layer computes first tokens alone, where nobody can see that."""

import copy
import types

import pytest
import torch
from accelerate import Accelerator
from bounds import roundings
from ops.cases import need
from torch import nn
from transformers import BertForPreTraining, BertForSequenceClassification, BertForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import ticketops
from models.conftest import HEADS, LAYERS, tiny_config
from models.test_encoders import HANDING_NOTHING_ON, NAMES, draw, make
from models.test_patch import calls
from ticketops.errors import InputError
from ticketops.models.handle import find_handle
from ticketops.models.registry import ADAPTERS
from ticketops.tickets import Ticket


@pytest.fixture(autouse=True)
def native():
    for op in ("attention", "ffn", "residual"):
        need("native", op, torch.float32)


class Said(list):
    """What each forward pass on the ops says of first tokens."""

    def __init__(self, model):
        self.calls = calls(find_handle(model))

    def __eq__(self, other):
        return [call.first_tokens for call in self.calls] == other

    __hash__ = None


def watched(model):
    return Said(model)


def step(model, batch, handle=None):
    """Loss, gradients and importance of a training step."""
    model.zero_grad()
    if handle is None:
        loss, scores = model(**batch).loss, []
        loss.backward()
    else:
        with handle.record_importance("token", neurons=True) as importance:
            loss = model(**batch).loss
            loss.backward()
        scores = [importance.head, importance.ffn, importance.neuron]
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], scores


#: Those whose sequence classifier reads first tokens alone.
FIRST = [name for name, adapter in zip(NAMES, ADAPTERS, strict=True) if adapter.first_token_heads]


@pytest.mark.parametrize("encoder", FIRST)
@pytest.mark.parametrize("padding", ["right", "none"])
def test_every_classifier_of_bert_s_kind_is_served(encoder, padding):
    model = make(f"{encoder}ForSequenceClassification")
    stock, batch = copy.deepcopy(model), draw(model, padding)
    batch["labels"] = torch.tensor([0, 2, 1, 1])
    with ticketops.patch(model):
        said = watched(model)
        for got, want in zip(step(model, batch)[0], step(stock, batch)[0], strict=True):
            torch.testing.assert_close(got, want, **roundings(1000, 100))
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, **roundings(1000, 100))
    assert said == [LAYERS - 1] * 2


@pytest.mark.parametrize("encoder", FIRST)
def test_a_hook_on_what_takes_the_first_token_sees_all(encoder):
    model = make(f"{encoder}ForSequenceClassification")
    stock, batch, seen = copy.deepcopy(model), draw(model), []
    for each in (model, stock):
        reader = getattr(each.base_model, "pooler", None) or each.classifier
        reader.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with ticketops.patch(model), torch.no_grad():
        for each in (model, stock):
            each(**batch)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_all_tokens_are_computed_where_a_mean_is_taken_or_somebody_looks_at_the_last_norm(pooling):
    model = make("ModernBertForSequenceClassification", classifier_pooling=pooling)
    batch, seen = draw(model), []
    with ticketops.patch(model) as handle, torch.no_grad():
        # Without a ticket, the stock code would compute what somebody looks at.
        handle.apply(Ticket(torch.ones(LAYERS, HEADS).bool(), torch.tensor([True, False, True])))
        before, said = model(**batch).logits, watched(model)
        if pooling == "cls":
            model.model.final_norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        torch.testing.assert_close(model(**batch).logits, before, **roundings(1000, 100))
    assert said == [None]
    assert seen == ([] if pooling == "mean" else [(*batch["input_ids"].shape, 48)])


@pytest.mark.parametrize("ffn", [True, False])
def test_importance_and_tickets_are_those_of_all_tokens(model, batch, ffn):
    head_mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    whole = copy.deepcopy(model)
    results = []
    for each in (model, whole):
        with ticketops.patch(each) as handle:
            handle.apply(Ticket(head_mask, torch.tensor([True, False, ffn])))
            said = watched(each)
            if each is whole:
                each.bert.register_forward_hook(lambda *_: None)
            results.append(step(each, batch, handle))
        assert said == [LAYERS - 1 if each is model else None]
    torch.testing.assert_close(*results, **roundings(1000, 10))


def test_a_row_without_tokens_is_zeros(model, batch):
    batch["attention_mask"][2] = 0
    with ticketops.patch(model), torch.no_grad():
        said = watched(model)
        logits = model(**batch).logits
        states = model.bert(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        assert states.last_hidden_state.shape[:2] == batch["input_ids"].shape
        torch.testing.assert_close(logits, model.classifier(states.pooler_output))
    assert said == [LAYERS - 1, None]
    assert not states.last_hidden_state[2].any()


class MeanForSequenceClassification(BertForSequenceClassification):
    """A head of the user's own, which reads every token."""

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        states = self.bert(input_ids, attention_mask, token_type_ids, **kwargs).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(states.sum(1)))


class MeanPooler(nn.Module):
    def forward(self, states):
        return states.sum(1)


def with_pooler(model):
    model.bert.pooler = MeanPooler()


def with_forward(model):
    model.forward = types.MethodType(MeanForSequenceClassification.forward, model)


def with_class(model):
    model.__class__ = MeanForSequenceClassification


def with_hook(place):
    def add(model):
        model.get_submodule(place).register_forward_hook(lambda *_: None)

    return add


@pytest.mark.parametrize(
    "change",
    [with_pooler, with_forward, with_class] + [with_hook(place) for place in ("bert", "bert.encoder", "bert.pooler")],
)
def test_whoever_may_see_the_other_tokens_gets_them(model, stock, batch, change):
    with ticketops.patch(model):
        change(model)
        change(stock)
        said = watched(model)
        # The stock model fills padding with numbers that a sum would see.
        batch["attention_mask"][:] = 1
        got, want = (each(**batch).logits for each in (model, stock))
    assert said == [None]
    torch.testing.assert_close(got, want, **roundings(1000))


@pytest.mark.parametrize("encoder", HANDING_NOTHING_ON)
def test_a_bare_model_gives_all_tokens_beside_a_head(encoder):
    """These heads tell their bare model past the arguments, and that ends with its forward pass, also with an error."""
    model = make(f"{encoder}ForSequenceClassification")
    stock, batch = copy.deepcopy(model), draw(model)
    real = batch["attention_mask"].bool()
    with ticketops.patch(model), torch.no_grad():
        copied, said = copy.deepcopy(model), watched(model)
        with pytest.raises((IndexError, InputError)):
            model(batch["input_ids"] + 1000)
        states = [each.base_model(**batch)[0][real] for each in (model, stock)]
        torch.testing.assert_close(*states, **roundings(1000, 100))
        for each in (model, copied):
            torch.testing.assert_close(each(**batch).logits, stock(**batch).logits, **roundings(1000, 100))
    assert said == [LAYERS - 1, None, LAYERS - 1]
    assert type(model) is type(stock)


def test_hidden_states_are_whole(model, stock, batch):
    keep = batch["attention_mask"].bool()
    with ticketops.patch(model), torch.no_grad():
        said = watched(model)
        got, want = (each(**batch, output_hidden_states=True).hidden_states for each in (model, stock))
        model.config.output_hidden_states = True
        model(**batch)
    assert said == [None, None]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours[keep], theirs[keep], **roundings(1000, 100))


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForPreTraining])
def test_heads_that_read_every_token_get_them(kind, batch):
    torch.manual_seed(0)
    model = kind(tiny_config()).eval()
    del batch["labels"]
    with ticketops.patch(model), torch.no_grad():
        said = watched(model)
        model(**batch)
    assert said == [None]


def test_packed_inputs_have_one_first_token(model, stock, batch):
    ids, bounds = batch["input_ids"][:2].reshape(1, -1), torch.tensor([0, 17, 34])
    packed = {
        "input_ids": ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 17,
        "max_length_k": 17,
    }
    model.config._attn_implementation = "flash_attention_2"
    with ticketops.patch(model), torch.no_grad():
        said = watched(model)
        # Positions are the first sequence's, then the others'.
        logits = model(**packed).logits
    assert said == [None]
    torch.testing.assert_close(logits, stock(input_ids=ids[:, :17]).logits, **roundings(1000))


def test_what_accelerate_wraps_is_served(model, stock, batch):
    with ticketops.patch(model):
        said = watched(model)
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        got = prepared(**batch).logits
    assert said == [LAYERS - 1]
    torch.testing.assert_close(got, stock(**batch).logits, rtol=0.1, atol=0.2)


def test_a_layer_by_its_modules_leaves_first_tokens_too(model, stock, batch):
    with ticketops.patch(model) as handle:
        said = watched(model)
        # Somebody looks at its attention while importance is recorded, so its modules compute the layer.
        model.bert.encoder.layer[-1].attention.self.register_forward_hook(lambda *_: None)
        for got, want in zip(step(model, batch, handle)[0], step(stock, batch)[0], strict=True):
            torch.testing.assert_close(got, want, **roundings(1000, 100))
    assert said == [LAYERS - 1]


def test_checkpointed_layers_are_served(batch):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1))
    # Checkpointing puts a hook on the embeddings, which then draw for padding too.
    model.bert.embeddings.dropout.p = 0.0
    results = []
    with ticketops.patch(model.train()) as handle:
        said = watched(model)
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            torch.manual_seed(5)
            results.append([value.clone() for part in step(model, batch, handle) for value in part])
    assert said == [LAYERS - 1] * 2
    torch.testing.assert_close(*results)


def test_reverting_leaves_nothing_behind(model, stock, batch):
    ticketops.patch(model).revert()
    assert torch.equal(model(**batch).logits, stock(**batch).logits)

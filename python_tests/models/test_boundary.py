"""What users do to a model before and after patching: the same comes of it as in the stock model, or a refusal."""

import copy

import pytest
import torch
from bounds import roundings
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertForTokenClassification, BertModel
from transformers.integrations.neftune import activate_neftune
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from models.test_encoders import compare, draw, make
from models.test_patch import ticket
from ticketops.errors import UnsupportedError
from ticketops.models.registry import find_adapter
from ticketops.ops import memory

TOKENS = [f"{name}ForTokenClassification" for name in ("Bert", "Roberta", "DistilBert", "ModernBert", "Electra")]


def twins(kind=BertForTokenClassification, **changes):
    torch.manual_seed(0)
    model = kind(tiny_config(**changes)).eval()
    return model, copy.deepcopy(model)


def layers(model):
    adapter, base = find_adapter(model)
    return getattr(adapter.encoder(base), adapter.stack)


@pytest.fixture
def text(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# --- hooks and modules from transformers and torch


def test_input_gradients_reach_the_layers_under_checkpointing(model, stock, batch):
    # Reentrant checkpoints have no gradients unless their input needs one, which transformers sees to by a hook.
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("classifier" in name or ("encoder" in name and name.endswith("bias")))
    ticketops.patch(model)
    for each in (model, stock):
        each.train().gradient_checkpointing_enable({"use_reentrant": True})
        each.enable_input_require_grads()
        each(**batch).loss.backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)


@pytest.mark.parametrize("patched_first", [True, False])
def test_neftune_s_noise_is_added(model, batch, patched_first):
    model.train()
    if patched_first:
        ticketops.patch(model)
    quiet = model(**batch).logits
    activate_neftune(model, 30.0)
    if not patched_first:
        ticketops.patch(model)
    torch.manual_seed(1)
    first = model(**batch).logits
    torch.manual_seed(1)
    assert torch.equal(model(**batch).logits, first)
    assert (first - quiet).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
@pytest.mark.parametrize("place", ["pooler", "classifier"])
def test_heads_of_torch_s_modules_read_what_they_read(name, place):
    model = make(name)
    owner = model.base_model if place == "pooler" else model
    if getattr(owner, place, None) is None:
        pytest.skip("it has none")
    # Somebody wants all tokens' states, by the plainest module there is.
    setattr(owner, place, nn.Identity())
    stock = copy.deepcopy(model)
    with ticketops.patch(model):
        compare(model, stock, draw(model, "none"))


# --- layers


def cut(model):
    owner, name = stack(model)
    setattr(owner, name, getattr(owner, name)[:2])


def stack(model):
    adapter, base = find_adapter(model)
    return adapter.encoder(base), adapter.stack


def reversed_layers(model):
    owner, name = stack(model)
    setattr(owner, name, nn.ModuleList(reversed(list(getattr(owner, name)))))


def anew(model):
    layers(model)[-1] = layers(make(type(model).__name__, initializer_range=0.3))[-1]


def a_copy(model):
    layers(model)[0] = copy.deepcopy(layers(model)[1])


def repeated(model):
    layers(model)[2] = layers(model)[0]


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("change", [cut, reversed_layers, anew, a_copy, repeated])
def test_layers_changed_after_patching_are_the_ones_that_run(name, change):
    model = make(name)
    stock = copy.deepcopy(model)
    handle, batch = ticketops.patch(model), draw(model)
    compare(model, stock, batch)
    for each in (model, stock):
        change(each)
    compare(model, stock, batch)
    with pytest.raises(UnsupportedError, match="layers"):
        handle.apply(ticket(heads=[(0, 1)]))
    assert handle.ticket is None


def test_a_layer_in_several_places_is_refused_by_name(model):
    stack = model.bert.encoder.layer
    stack[2] = stack[0]
    with pytest.raises(UnsupportedError, match=r"share one layer.*copy\.deepcopy"):
        ticketops.patch(model)


# --- packing


def test_hooks_see_rows_and_tokens_as_in_the_stock_model(text):
    model, stock = twins()
    vector, seen = torch.randn(48), []

    def steer(module, args, output):
        seen.append(output.shape)
        return torch.cat([output[:, :1] + vector, output[:, 1:]], 1)

    ticketops.patch(model)
    for each in (model, stock):
        each.bert.encoder.layer[1].register_forward_hook(steer)
    compare(model, stock, text)
    assert seen[0] == seen[1] == (5, 17, 48)


class WithSpeaker(BertEmbeddings):
    """Embeddings with one more vector for each row."""

    def __init__(self, config):
        super().__init__(config)
        self.speaker = nn.Embedding(5, 48)

    def forward(self, **inputs):
        return super().forward(**inputs) + self.speaker(torch.arange(5))[:, None]


@pytest.mark.parametrize("patched_first", [True, False])
def test_embeddings_of_one_s_own_get_rows_of_tokens(text, patched_first):
    model, stock = twins()
    if patched_first:
        ticketops.patch(model)
    model.bert.embeddings = WithSpeaker(model.config).eval()
    stock.bert.embeddings = copy.deepcopy(model.bert.embeddings)
    if not patched_first:
        ticketops.patch(model)
    compare(model, stock, text)


def test_hooks_on_the_model_from_before_patching_see_padded_states(text):
    model, stock = twins(BertModel)
    seen = []
    for each in (model, stock):
        each.register_forward_hook(lambda module, args, output: seen.append([x.shape for x in output.hidden_states]))
    with ticketops.patch(model):
        for each in (model, stock):
            each(**text, output_hidden_states=True)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", [name for name in TOKENS if not name.startswith(("Roberta", "ModernBert"))])
@pytest.mark.parametrize("buffer", ["position_ids", "token_type_ids"])
def test_positions_and_types_are_the_buffers(name, buffer):
    model = make(name)
    if not hasattr(model.base_model.embeddings, buffer):
        pytest.skip("it has none")
    stock = copy.deepcopy(model)
    with ticketops.patch(model):
        for each in (model, stock):
            embeddings = each.base_model.embeddings
            value = torch.arange(39, -1, -1)[None] if buffer == "position_ids" else torch.arange(40)[None] % 2
            embeddings.register_buffer(buffer, value, persistent=False)
        compare(model, stock, draw(model))
        # Somebody looks on, and the embeddings' own modules compute.
        model.base_model.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
        compare(model, stock, draw(model))


@pytest.mark.parametrize("setting", [{"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"padding_idx": 7}])
def test_settings_of_a_table_hold_for_padding_too(text, setting):
    model, stock = twins()
    # Padding is looked up as often as it stands there.
    text["input_ids"] = text["input_ids"].masked_fill(text["attention_mask"] == 0, 3)
    text["input_ids"][:, 0] = 3
    with ticketops.patch(model):
        compare(model, stock, text)
        for each in (model, stock):
            for name, value in setting.items():
                setattr(each.bert.embeddings.word_embeddings, name, value)
        compare(model, stock, text)
    assert torch.equal(*(each.bert.embeddings.word_embeddings.weight for each in (model, stock)))


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    "name", ["BertModel", "RobertaForSequenceClassification", "ModernBertForSequenceClassification"]
)
def test_padding_in_front_goes_to_the_stock_code_where_first_tokens_are_read(name, unpad):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model, "left")
    with ticketops.patch(model, unpad=unpad) as handle:
        compare(model, stock, batch)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match="padding in front of a row"):
            model(**batch)
        handle.apply(None)
        if not unpad:
            # A compiled graph cannot choose: it stops.
            with pytest.raises(RuntimeError, match="begins with padding"):
                torch.compile(model, backend="eager")(**batch)


# --- what can be set on a layer's modules


@pytest.mark.parametrize("name", [*TOKENS, "ViTForImageClassification"])
def test_attention_is_causal_where_it_is_told_to_be(name):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model, "none")
    batch.pop("attention_mask", None)
    with ticketops.patch(model) as handle:
        compare(model, stock, batch)
        for each in (model, stock):
            module = next(module for module in layers(each)[1].modules() if hasattr(module, "is_causal"))
            module.is_causal = True
        compare(model, stock, batch)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match="layer 1 has causal attention"):
            model(**batch)


def test_heads_of_another_width_are_computed_so(text):
    model, stock = twins()
    with ticketops.patch(model) as handle:
        compare(model, stock, text)
        for each in (model, stock):
            attention = each.bert.encoder.layer[1].attention.self
            attention.num_attention_heads, attention.attention_head_size = 2, 24
        compare(model, stock, text)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match="heads of width 24"):
            model(**text)


@pytest.mark.parametrize("place", ["self", "output"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_contexts_are_refused_where_a_ticket_makes_them_narrower(text, place, kind):
    model, _ = twins()
    getattr(getattr(model.bert.encoder.layer[0].attention, place), kind)(lambda *_: None)
    with ticketops.patch(model) as handle:
        handle.apply(ticket(ffns=[0]))
        model(**text)
        handle.apply(ticket(heads=[(1, 1)]))
        model(**text)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match=f"hooks on its attention.{place}"):
            model(**text)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Embedding, BertEmbeddings, BertLayer, nn.Linear])
def test_forwards_replaced_in_a_class_are_called(text, monkeypatch, kind):
    model, stock = twins()
    text["position_ids"] = torch.arange(17).expand(5, -1)
    with ticketops.patch(model) as handle:
        compare(model, stock, text)
        before = kind.forward
        monkeypatch.setattr(kind, "forward", lambda *args, **options: before(*args, **options) * 0.9)
        compare(model, stock, text)
        if kind is nn.Embedding:
            # The layers are what they were.
            return
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match=rf"{kind.__name__}\.forward has been replaced"):
            model(**text)


# --- parameters


def by_assignment(model):
    state = {name: value.clone() for name, value in model.state_dict().items() if "attention" in name}
    model.load_state_dict(state, strict=False, assign=True)


def by_parameter(model):
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(query.weight.detach().clone())


def by_module(model):
    model.bert.encoder.layer[0].attention.self.query = nn.Linear(48, 48)


@pytest.mark.parametrize("change", [by_assignment, by_parameter, by_module])
def test_new_parameters_are_held_still_by_the_ticket(model, batch, change):
    ticketops.patch(model).apply(ticket(heads=[(0, 1)], ffns=[2]))
    model(**batch)
    change(model)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    before = weight.detach().clone().view(HEADS, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    moved = (weight.detach().view(HEADS, -1) != before).any(1)
    assert moved.tolist() == [True, False, True, True]


# --- importance


@pytest.mark.parametrize("passes", [2, 3])
def test_passes_before_one_backward_pass_share_their_masks(model, stock, passes):
    batches = [tiny_batch(seed=seed) for seed in range(passes)]

    def loss(each):
        logits = [each(**batch).logits for batch in batches]
        return torch.stack(logits).prod(0).sum(1).mean()

    with ticketops.patch(model) as handle, handle.record_importance() as importance:
        loss(model).backward()
    masks = [(torch.ones(5, HEADS, requires_grad=True), torch.ones(5, requires_grad=True)) for _ in range(LAYERS)]
    for layer, (heads, ffn) in zip(stock.bert.encoder.layer, masks, strict=True):
        layer.attention.output.register_forward_pre_hook(
            lambda _, args, by=heads: ((args[0].unflatten(-1, (HEADS, -1)) * by[:, None, :, None]).flatten(2), args[1])
        )
        layer.output.dense.register_forward_hook(lambda _, args, output, by=ffn: output * by[:, None, None])
    loss(stock).backward()
    for found, each in ((importance.head, 0), (importance.ffn, 1)):
        want = torch.stack([(5 * mask[each].grad).abs().mean(0) for mask in masks]).double()
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5 * want.max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_passes_that_checkpointing_runs_again_belong_to_their_step(model, reentrant):
    batches, start = [tiny_batch(seed=seed) for seed in range(2)], torch.zeros((), requires_grad=True)

    def importance(run):
        with handle.record_importance() as found:
            logits = [run(lambda _, batch=batch: model(**batch).logits, start) for batch in batches]
            torch.stack(logits).prod(0).sum(1).mean().backward()
        return found.head

    def checkpointed(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    with ticketops.patch(model) as handle:
        want = importance(lambda function, *args: function(*args))
        if reentrant:
            # Their gradients come in backward passes of their own.
            with pytest.raises(UnsupportedError, match="forward passes within one backward pass"):
                importance(checkpointed)
        else:
            torch.testing.assert_close(importance(checkpointed), want, **roundings(1000))


# --- other parameters than the model's own


def test_functional_call_takes_the_parameters_it_is_given(model, stock, batch):
    others = {name: (value.detach() * 0.9).requires_grad_() for name, value in stock.named_parameters()}
    ours = {name: value.detach().clone().requires_grad_() for name, value in others.items()}
    with ticketops.patch(model) as handle:
        got, want = (torch.func.functional_call(*each, (), batch) for each in ((model, ours), (stock, others)))
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            *(torch.autograd.grad(x.loss, [*p.values()]) for x, p in ((got, ours), (want, others))), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        handle.apply(ticket(heads=[(0, 1)]))
        own = {name: value.detach().clone() for name, value in model.named_parameters()}
        torch.testing.assert_close(torch.func.functional_call(model, own, (), batch).logits, model(**batch).logits)


# --- copies of the handle


def test_a_model_has_one_handle_and_a_copy_has_its_own(model, batch):
    handle = ticketops.patch(model)
    assert copy.copy(handle) is handle
    other = copy.deepcopy(handle)
    other.apply(ticket(heads=[(0, 1)]))
    assert handle.ticket is None
    want = model(**batch).logits
    assert (other.model(**batch).logits - want).abs().max() > 1e-3
    other.revert()
    torch.testing.assert_close(other.model(**batch).logits, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch).logits, want)


def test_nobody_who_looks_on_sees_memory_that_was_not_written(text, monkeypatch):
    take = memory.from_dlpack
    monkeypatch.setattr(memory, "from_dlpack", lambda capsule: take(capsule).fill_(float("nan")))
    model, _ = twins()
    seen = []
    with ticketops.patch(model) as handle:
        handle.apply(ticket(heads=[(1, 0)], ffns=[2]))
        for layer in model.bert.encoder.layer:
            for module in (layer, layer.attention):
                module.register_forward_hook(lambda module, args, output: seen.append(output))
        model(**text).logits.square().sum().backward()
    states = [each[0] if isinstance(each, tuple) else each for each in seen]
    assert len(states) == 6
    assert all(state.isfinite().all() for state in states)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

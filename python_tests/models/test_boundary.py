"""What users do to a model before and after patching: the same comes of it as in the stock model, or a refusal."""

import copy
import functools

import pytest
import torch
from bounds import roundings
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.integrations.neftune import activate_neftune
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from models.test_encoders import compare, draw, make
from models.test_patch import ticket
from ticketops.errors import UnsupportedError
from ticketops.models.registry import find_adapter
from ticketops.ops import memory

TOKENS = [
    f"{name}ForTokenClassification"
    for name in ("Bert", "Roberta", "DebertaV2", "DistilBert", "ModernBert", "MPNet", "NomicBert", "Electra")
]

#: Those whose attention is a function that transformers looks up by its name.
INTERFACED = [name for name in TOKENS if not name.startswith(("DebertaV2", "MPNet"))]


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


@pytest.mark.parametrize(
    "name", [name for name in TOKENS if not name.startswith(("Roberta", "ModernBert", "DebertaV2", "MPNet"))]
)
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
    "name",
    [
        "BertModel",
        "EuroBertForSequenceClassification",
        "NomicBertForSequenceClassification",
        "RobertaForSequenceClassification",
        "ModernBertForSequenceClassification",
    ],
)
def test_padding_in_front_goes_to_the_stock_code_where_first_tokens_are_read(name, unpad):
    model = make(name, **({"classifier_pooling": "bos"} if name.startswith("EuroBert") else {}))
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


@pytest.mark.parametrize("name", [*INTERFACED, "ViTForImageClassification"])
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


def test_a_ticket_goes_off_whatever_layers_there_are_and_leaves_nothing_frozen(model, batch):
    layers, pruned = model.bert.encoder.layer, ticket(heads=[(0, 1)], ffns=[0])
    handle = ticketops.patch(model).apply(pruned)
    before, layers[0] = layers[0], copy.deepcopy(BertForSequenceClassification(tiny_config()).bert.encoder.layer[0])
    with pytest.raises(UnsupportedError, match=r"layers are not the .* revert\(\) and patch it again"):
        handle.apply(pruned)
    with pytest.raises(UnsupportedError, match=r"handle.apply\(None\)"):
        model(**batch)
    handle.apply(None)
    model(**batch)
    # What was taken away under the ticket comes back.
    layers[0] = before
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    weights = {name: value.clone() for name, value in before.named_parameters() if value.ndim == 2}
    model(**batch).loss.backward()
    optimizer.step()
    for name, value in weights.items():
        assert (before.get_parameter(name) != value).any(1).all(), name


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


def scaled(function):
    """The same code with half the result, an attention function's weights apart."""

    @functools.wraps(function)
    def run(*args, **options):
        result = function(*args, **options)
        return (result[0] * 0.5, *result[1:]) if isinstance(result, tuple) else result * 0.5

    return run


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (BertLayer, "feed_forward_chunk", "BertLayer.feed_forward_chunk has been replaced"),
        (modeling_bert, "eager_attention_forward", "modeling_bert.eager_attention_forward has been replaced"),
        (functional, "scaled_dot_product_attention", "functional.scaled_dot_product_attention that has been replaced"),
        (functional, "layer_norm", "functional.layer_norm that has been replaced"),
        (functional, "embedding", "functional.embedding that has been replaced"),
    ],
)
def test_functions_and_methods_replaced_in_stock_code_are_called(text, monkeypatch, owner, name, words):
    model, stock = twins()
    if name.startswith("eager"):
        for each in (model, stock):
            each.set_attn_implementation("eager")
    with ticketops.patch(model) as handle:
        compare(model, stock, text)
        monkeypatch.setattr(owner, name, scaled(getattr(owner, name)))
        compare(model, stock, text)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match=words):
            model(**text)


@pytest.mark.parametrize("name", [*INTERFACED, "ViTForImageClassification"])
def test_attention_functions_registered_under_a_stock_name_are_called(name, monkeypatch):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model)
    with ticketops.patch(model) as handle:
        compare(model, stock, batch)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", scaled(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        compare(model, stock, batch)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match="registered for the attention implementation 'sdpa'"):
            model(**batch)


class Halved(TorchFunctionMode):
    """Watches all functions of torch, and halves what attention computes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 0.5 if function is functional.scaled_dot_product_attention else result


def test_a_function_mode_sees_what_it_sees_of_the_stock_model(text):
    model, stock = twins()
    with ticketops.patch(model) as handle:
        with Halved():
            compare(model, stock, text)
        handle.apply(ticket(heads=[(0, 1)]))
        with Halved(), pytest.raises(UnsupportedError, match="a TorchFunctionMode"):
            model(**text)


def own_chunk(model):
    layer = layers(model)[1]
    layer.feed_forward_chunk = scaled(layer.feed_forward_chunk)


def own_loop(model):
    """Skips a layer, as early exits and layer drop do."""

    def forward(states, attention_mask=None, **options):
        for layer in (layers(model)[0], layers(model)[2]):
            states = layer(states, attention_mask, **options)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    model.bert.encoder.forward = forward


def own_masks(model):
    make_masks = model.bert._create_attention_masks
    model.bert._create_attention_masks = lambda **options: (None, make_masks(**options)[1])


def own_activation(model):
    layers(model)[1].intermediate.intermediate_act_fn.act = functional.silu


def learned_scale(model):
    attention = layers(model)[1].attention.self
    del attention.scaling
    attention.scaling = nn.Parameter(torch.tensor(0.3))
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (own_chunk, "a feed_forward_chunk method of its own on its BertLayer"),
        (own_loop, "a forward method of its own on its encoder"),
        (own_masks, "a _create_attention_masks method of its own"),
        (own_activation, "another function as its act"),
        (learned_scale, "a Parameter as the factor of its attention scores"),
    ],
)
def test_what_is_put_on_an_instance_is_what_computes(text, change, words):
    model, stock = twins()
    with ticketops.patch(model) as handle:
        compare(model, stock, text)
        for each in (model, stock):
            change(each)
        compare(model, stock, text)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match=words):
            model(**text)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_a_layer_attends_as_it_is_told_to(kind):
    model = make("ModernBertForTokenClassification")
    stock, batch = copy.deepcopy(model), draw(model)
    for patched_first in (True, False):
        with ticketops.patch(copy.deepcopy(model)) as handle:
            for each in (handle.model, twin := copy.deepcopy(stock)):
                place = next(i for i, layer in enumerate(layers(each)) if layer.attention_type != kind)
                layers(each)[place].attention_type = kind
            if not patched_first:
                handle.revert()
                handle = ticketops.patch(handle.model)
            compare(handle.model, twin, batch)
            handle.apply(ticket(heads=[(0, 1)]))
            with pytest.raises(UnsupportedError, match="where its configuration says"):
                handle.model(**batch)


# --- hidden states, and what hooks see beside them


@pytest.mark.parametrize("name", [*TOKENS, "BertForSequenceClassification", "ViTForImageClassification"])
@pytest.mark.parametrize("padding", ["right", "holes"])
def test_gradients_flow_through_hidden_states(name, padding):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model)
    if padding == "holes" and "attention_mask" in batch:
        batch["attention_mask"][0, [3, 5]] = 0
    real = batch.get("attention_mask", torch.ones(4, 17)).bool()
    found = []
    with ticketops.patch(model):
        for each in (model, stock):
            output = each(**batch, output_hidden_states=True)
            output.hidden_states[1].register_hook(lambda gradient: gradient * 0.5)
            logits = output.logits[real] if output.logits.ndim == 3 else output.logits
            wanted = [*output.hidden_states, *each.parameters()]
            gradients = torch.autograd.grad(logits.square().sum(), wanted, allow_unused=True)
            assert all(gradient is not None for gradient in gradients[: len(output.hidden_states)])
            found.append([torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True)])
    scale = max(each.abs().max().item() for each in found[1])
    for place, (got, want) in enumerate(zip(*found, strict=True)):
        if place <= 3:
            got, want = got[real], want[real]
        torch.testing.assert_close(got, want, **roundings(100, 100 * scale))


def test_hooks_are_given_what_stock_modules_are_given(text):
    """Masks and keyword arguments too: the same, or refused."""
    model, stock = twins(BertForSequenceClassification)
    seen = []

    def note(module, args, *rest):
        seen.append([(type(x).__name__, getattr(x, "shape", None)) for x in args])
        seen.extend(sorted(x) for x in rest if type(x) is dict)

    with ticketops.patch(model) as handle:
        handle.apply(ticket(ffns=[1]))
        places = ["", "bert.encoder.layer.0", "bert.encoder.layer.1.attention"]
        hooks = [each.get_submodule(place).register_forward_hook(note) for place in places for each in (model, stock)]
        hooks += [each.register_forward_hook(note, with_kwargs=True) for each in (model, stock)]
        for each in (model, stock):
            each(**text)
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        for place in ("bert.encoder.layer.1", "bert.encoder"):
            hook = model.get_submodule(place).register_forward_pre_hook(lambda *_: None, with_kwargs=True)
            with pytest.raises(UnsupportedError, match="with keyword arguments, which differ from a stock model's"):
                model(**text)
            hook.remove()
        # Stock attention returns its weights then.
        for each in (model, stock):
            each.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match=r"layer 1 has hooks on its attention"):
            model(**text)
        for hook in hooks:
            hook.remove()


def test_holes_are_named_where_hooks_see_padded_batches(text):
    model, stock = twins()
    text["attention_mask"][0, 3] = 0
    with ticketops.patch(model) as handle:
        for each in (model, stock):
            each.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
        compare(model, stock, text)
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match="hooks inside it, which see padded batches, with holes"):
            model(**text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_ids_that_torch_does_not_take_are_no_ids(text, dtype):
    model, stock = twins()
    text["input_ids"] = text["input_ids"].to(dtype)
    with ticketops.patch(model):
        for each in (model, stock):
            with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
                each(**text)


def test_several_gradients_at_once_are_refused_by_name(text):
    model, _ = twins()
    with ticketops.patch(model):
        logits = model(**text).logits[0, :2].flatten()
        with pytest.raises(UnsupportedError, match=r"several gradients at once.*one by one"):
            torch.autograd.grad(logits, [*model.parameters()], torch.eye(6), is_grads_batched=True, allow_unused=True)


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

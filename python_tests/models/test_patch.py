"""A patched model against stock transformers, and the traps on the way."""

import copy
import pickle

import pytest
import torch
import transformers
from bounds import roundings
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, BertModel
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from ticketops import ops
from ticketops.errors import InputError, UnsupportedError
from ticketops.models import check_supported, weight_counts
from ticketops.ops import products
from ticketops.tickets import Ticket


def compare(model, stock, batch):
    """Asserts that outputs and gradients are equal to float32 rounding, on the scale of the largest gradient."""
    for each in (model, stock):
        each.zero_grad()
    got, want = model(**batch), stock(**batch)
    for name in want:
        if name != "hidden_states":
            a, b = got[name], want[name]
            if a.shape[:2] == batch["input_ids"].shape and "attention_mask" in batch:
                # One value a token: the stock model also fills padding, with numbers that mean nothing.
                a, b = a[batch["attention_mask"].bool()], b[batch["attention_mask"].bool()]
            torch.testing.assert_close(a, b, **roundings(100))
    loss = (lambda out: out.loss) if "loss" in want else (lambda out: out[0].double().square().mean())
    loss(got).backward()
    loss(want).backward()
    # A key bias has no gradient but rounding noise: softmax does not see it.
    scale = max(parameter.grad.abs().max().item() for parameter in stock.parameters() if parameter.grad is not None)
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (parameter.grad - other.grad).abs().max() <= roundings(30)["atol"] * scale, name


def calls(handle):
    """The list of what each forward pass on the ops hands to its layers; a pass of the stock code adds nothing."""
    found, make = [], handle.call

    def call(*args):
        found.append(make(*args))
        return found[-1]

    handle.call = call
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("unpad", [True, False])
def test_logits_and_gradients_equal_stock(attention, unpad, batch):
    torch.manual_seed(0)
    model = BertForSequenceClassification._from_config(tiny_config(), attn_implementation=attention).eval()
    stock = copy.deepcopy(model)
    with ticketops.patch(model, unpad=unpad):
        compare(model, stock, batch)
        del batch["attention_mask"]
        compare(model, stock, batch)


@pytest.mark.parametrize("rows", [[[1, 0, 1, 1], [0, 0, 1, 1]], [[0, 1, 1, 0], [1, 1, 1, 1]]])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_padding_anywhere_is_never_attended(model, stock, rows, dtype):
    mask = torch.tensor(rows, dtype=dtype)
    ids = torch.randint(0, 100, mask.shape)
    with ticketops.patch(model), torch.no_grad():
        got = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        want = stock.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        keep = mask.bool()
        torch.testing.assert_close(got[keep], want[keep], **roundings(100))
        other = ids.masked_fill(~keep, 5)
        again = model.bert(input_ids=other, attention_mask=mask).last_hidden_state
        assert torch.equal(again[keep], got[keep])


@pytest.mark.parametrize(
    "head",
    [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
    ],
)
def test_every_task_head_equals_stock(head):
    torch.manual_seed(0)
    labels = 2 if head == "BertForQuestionAnswering" else 3
    model = getattr(transformers, head)(tiny_config(num_labels=labels)).eval()
    stock = copy.deepcopy(model)
    batch = tiny_batch(rows=4)
    batch.pop("labels")
    if head == "BertForMultipleChoice":
        batch = {name: value.view(2, 2, -1) for name, value in batch.items()} | {"labels": torch.tensor([0, 1])}
    elif head in ("BertForSequenceClassification", "BertForNextSentencePrediction"):
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    elif head == "BertForQuestionAnswering":
        # Its loss is a softmax over all positions, padding included: only whole rows compare.
        batch["attention_mask"] = torch.ones(4, 17)
        batch["start_positions"] = batch["end_positions"] = torch.zeros(4, dtype=torch.long)
    elif head in ("BertForTokenClassification", "BertForMaskedLM"):
        batch["labels"] = torch.where(batch["attention_mask"] > 0, 1, -100)
    with ticketops.patch(model):
        if head in ("BertModel", "BertForPreTraining"):
            compare(model, stock, batch | {"attention_mask": torch.ones(4, 17)})
        else:
            compare(model, stock, batch)


@pytest.mark.network
@pytest.mark.parametrize("unpad", [True, False])
def test_real_weights_equal_stock(minilm, unpad):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A fine, moving film.", "Dull.", "It is what it is, and what it is " + "goes on and on " * 20, "Why not?"]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    batch["labels"] = torch.tensor([1, 0, 0, 1])
    torch.manual_seed(0)
    stock = BertForSequenceClassification.from_pretrained(minilm).eval()
    model = copy.deepcopy(stock)
    with ticketops.patch(model, unpad=unpad):
        compare(model, stock, batch)


def test_the_state_dict_and_classes_never_change(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    classes = [type(module) for module in model.modules()]

    def same():
        now = model.state_dict()
        assert list(now) == list(before)
        assert all(torch.equal(now[name], before[name]) for name in before)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

    handle = ticketops.patch(model)
    same()
    assert type(model) is BertForSequenceClassification
    assert isinstance(model.bert, BertModel)
    assert isinstance(model.bert.encoder.layer[0], BertLayer)
    # Whoever looks a class up by its name finds it.
    assert [str(type(module)) for module in model.modules()] == [str(kind) for kind in classes]
    assert isinstance(model.bert.encoder.layer[0].attention.self, BertSelfAttention)
    handle.apply(Ticket.full(LAYERS, HEADS) & ticket(heads=[(0, 1)], ffns=[2]))
    same()
    handle.revert()
    same()
    assert [type(module) for module in model.modules()] == classes
    assert not any("_ticketops" in vars(module) for module in model.modules())
    assert not any(hasattr(parameter, "_ticketops_frozen") for parameter in parameters)
    handle.revert()


def ticket(heads=(), ffns=()):
    head_mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    ffn_mask = torch.ones(LAYERS, dtype=torch.bool)
    for layer, head in heads:
        head_mask[layer, head] = False
    ffn_mask[list(ffns)] = False
    return Ticket(head_mask, ffn_mask)


def test_a_reverted_model_is_bit_exact(model, stock, batch):
    handle = ticketops.patch(model)
    model(**batch).loss.backward()
    handle.apply(ticket(heads=[(0, 1)], ffns=[2])).revert()
    model.zero_grad()
    outputs = [each(**batch) for each in (model, stock)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_patched_model_saves_what_a_stock_one_saves(model, tmp_path, batch):
    with ticketops.patch(model):
        model.save_pretrained(tmp_path)
        want = model(**batch).logits
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    torch.testing.assert_close(loaded(**batch).logits, want, **roundings(100, 10))


@pytest.mark.parametrize("hooked_before", [False, True])
def test_hidden_states_are_captured_and_padded(model, stock, batch, hooked_before):
    if hooked_before:
        # transformers installs its capturing hooks once, on whatever modules are there.
        model(**batch, output_hidden_states=True)
    keep = batch["attention_mask"].bool()
    with ticketops.patch(model):
        got = model(**batch, output_hidden_states=True).hidden_states
        want = stock(**batch, output_hidden_states=True).hidden_states
        as_tuple = model.bert(batch["input_ids"], batch["attention_mask"], output_hidden_states=True, return_dict=False)
    assert len(got) == len(want) == LAYERS + 1
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a[keep], b[keep], **roundings(100))
    assert [x.shape for x in as_tuple[-1]] == [x.shape for x in want]


def test_autocast_stays_within_its_rounding(model, stock, batch):
    with ticketops.patch(model):
        exact = stock(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            got, other = model(**batch).logits, stock(**batch).logits
    assert (got - exact).abs().max() <= 3 * (other - exact).abs().max() + 1e-3


def test_rows_that_round_a_bfloat16_batch_change_no_result(model, batch, monkeypatch):
    monkeypatch.setattr(products, "has_bf16_products", lambda: True)
    exact, rows, results = copy.deepcopy(model), [], []
    for each, bucket in ((exact, 1), (model, None)):
        patched = ticketops.patch(each, bucket=bucket, graphs=False)
        with patched as handle, handle.record_importance("token") as importance:
            rows.append(calls(handle))
            with torch.autocast("cpu", torch.bfloat16):
                output = each(**batch)
            output.loss.backward()
        results.append((output.logits, importance.head, importance.ffn, [p.grad for p in each.parameters()]))
    # 42 real tokens.
    assert [len(call.packing.indices) for (call,) in rows] == [42, 48]
    torch.testing.assert_close(*results, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_and_importance(reentrant, batch):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1))
    # Checkpointing puts a hook on the embeddings, which then draw for padding too.
    model.bert.embeddings.dropout.p = 0.0
    with ticketops.patch(model.train()) as handle:
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            torch.manual_seed(5)
            with handle.record_importance() as importance:
                model(**batch).loss.backward()
            results.append(([p.grad.clone() for p in model.parameters()], importance.head, importance.ffn))
    for got, want in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(results[1][1:], results[0][1:])


def test_torch_compile_gives_the_same_and_records(model, stock, batch):
    with ticketops.patch(model) as handle:
        compiled = torch.compile(model, backend="aot_eager")
        with handle.record_importance() as eager:
            model(**batch).loss.backward()
        model.zero_grad()
        with handle.record_importance() as recorded:
            loss = compiled(**batch).loss
            loss.backward()
        torch.testing.assert_close(recorded.head, eager.head, **roundings(10))
        torch.testing.assert_close(recorded.ffn, eager.ffn, **roundings(10))
        want = stock(**batch)
        torch.testing.assert_close(loss, want.loss)
        want.loss.backward()
        for a, b in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **roundings(1000, 100))
        shorter = tiny_batch(rows=3, width=11, seed=1)
        torch.testing.assert_close(compiled(**shorter).logits, stock(**shorter).logits, **roundings(100))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_trace_holds_the_ops_and_not_one_batch_s_values(model, stock, gradients):
    ids, others = (tiny_batch(seed=seed)["input_ids"] for seed in (0, 1))
    with ticketops.patch(model.requires_grad_(False)), torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(lambda ids: model(ids).logits, (ids,), check_trace=False)
        torch.testing.assert_close(traced(others), stock(others).logits, **roundings(100))


@pytest.mark.skipif(not ops.serves_layer(torch.empty(1), torch.empty(1)), reason="needs the native extension")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_dispatch_mode_sees_the_ops(model, stock, batch, gradients):
    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with ticketops.patch(model), Names(), torch.set_grad_enabled(gradients):
        logits = model(**batch).logits
    assert {"ticketops::embeddings", "ticketops::encoder_layer"} <= seen
    torch.testing.assert_close(logits, stock(**batch).logits, **roundings(100))


@pytest.mark.parametrize("part", ["word_embeddings", "token_type_embeddings", "LayerNorm", "dropout"])
def test_a_hook_among_the_embeddings_is_called(model, stock, batch, part):
    """Where nobody looks on, they are one op."""
    for each in (model, stock):
        each.get_submodule(f"bert.embeddings.{part}").register_forward_hook(lambda module, args, output: 2 * output)
    with ticketops.patch(model):
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, **roundings(100))


def test_embeddings_of_words_that_are_given_are_taken(model, stock, batch):
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    embeds = torch.randn(*batch["input_ids"].shape, 48)
    with ticketops.patch(model):
        got, want = (each(inputs_embeds=embeds, **given).logits for each in (model, stock))
    torch.testing.assert_close(got, want, **roundings(100))


def test_training_draws_dropout_that_torch_governs(batch):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(attention_probs_dropout_prob=0.3)).train()
    with ticketops.patch(model):
        logits = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            logits.append(model(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_patching_twice_is_refused(model):
    ticketops.patch(model)
    with pytest.raises(InputError, match="patched already"):
        ticketops.patch(model)
    with pytest.raises(InputError, match="patched already"):
        ticketops.patch(model.bert)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "activation Mish"),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward=2"),
    ],
)
def test_configurations_that_are_not_served_are_named(changes, words):
    model = BertModel(tiny_config(**changes))
    for refuse in (ticketops.patch, check_supported):
        with pytest.raises(UnsupportedError, match=words):
            refuse(model)
    assert type(model.encoder.layer[0]) is BertLayer


def test_other_models_and_wrappers_are_named(model):
    with pytest.raises(UnsupportedError, match="AlbertModel is not supported"):
        ticketops.patch(
            transformers.AlbertModel(
                transformers.AlbertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, embedding_size=8)
            )
        )
    with pytest.raises(UnsupportedError, match=r"not a transformers model: patch before torch\.compile"):
        ticketops.patch(torch.compile(model))


def test_linear_layers_that_are_not_plain_are_named(model):
    class Lora(torch.nn.Linear):
        pass

    model.bert.encoder.layer[1].output.dense = Lora(64, 48)
    with pytest.raises(UnsupportedError, match=r"layer 1 has a .*Lora as its fc2"):
        ticketops.patch(model)
    assert type(model.bert.encoder) is transformers.models.bert.modeling_bert.BertEncoder


class Lora(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("place", "other", "reason"),
    [
        ("attention.self.query", Lora(48, 48), r"Lora as its query"),
        ("attention.output.dense", Lora(48, 48), r"Lora as its output"),
        ("output.dense", Lora(64, 48), r"Lora as its fc2"),
        ("output.LayerNorm", torch.nn.RMSNorm(48), r"RMSNorm as its ffn_norm"),
        ("output.dropout", torch.nn.Identity(), r"Identity as its dropout 2"),
        ("intermediate.intermediate_act_fn", torch.nn.ReLU(), r"another activation \(ReLU\)"),
    ],
)
def test_what_replaces_a_part_after_patching_is_called_or_named(model, stock, batch, place, other, reason):
    with ticketops.patch(model) as handle:
        model(**batch)
        for each in (model, stock):
            each.bert.encoder.layer[1].set_submodule(place, other)
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, **roundings(1000, 100))
        handle.apply(ticket(heads=[(1, 0)]))
        with pytest.raises(UnsupportedError, match=f"layer 1 has .*{reason}.*ignore the applied ticket"):
            model(**batch)
        handle.apply(None)
        with handle.record_importance(), pytest.raises(UnsupportedError, match=f"layer 1 has .*{reason}.*importance"):
            model(**batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_ticket_applied_before_layers_are_computed_again_is_refused(model, batch, reentrant):
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with ticketops.patch(model) as handle:
        handle.apply(ticket(heads=[(1, 0)]))
        loss = model(**batch).loss
        handle.apply(ticket(heads=[(1, 1)]))
        with pytest.raises(UnsupportedError, match=r"apply it after backward\(\)"):
            loss.backward()
        handle.apply(ticket(heads=[(1, 0)]))
        model(**batch).loss.backward()


def test_outputs_that_were_captured_once_leave_layers_whole(model, batch, monkeypatch):
    with ticketops.patch(model):
        model(**batch, output_hidden_states=True)
        assert model.bert.encoder.layer[0].attention.self._forward_hooks
        monkeypatch.setattr(type(model.bert.encoder.layer[0]), "_by_modules", None)
        model(**batch).loss.backward()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("output_attentions", True),
        ("encoder_hidden_states", torch.zeros(5, 17, 48)),
        ("use_cache", True),
        ("is_causal", True),
        ("attention_mask", torch.randint(0, 2, (5, 1, 17, 17)).bool()),
    ],
)
def test_arguments_that_the_ops_do_not_serve_go_to_the_stock_code(model, stock, batch, argument, value):
    batch.pop("labels")
    batch[argument] = value
    with ticketops.patch(model) as handle:
        got, want = (each.bert(**batch) for each in (model, stock))
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, **roundings(1000, 100))
        handle.apply(ticket(heads=[(0, 1)]))
        with pytest.raises(UnsupportedError, match=f"{argument}.*ignore the applied ticket"):
            model.bert(**batch)


def test_the_package_and_a_handle_show_what_they_have(model):
    assert set(ticketops.__all__) <= set(dir(ticketops))
    with ticketops.patch(model).apply(pruned := ticket(heads=[(0, 1)])) as handle:
        assert repr(handle) == f"PatchHandle(BertForSequenceClassification, ticket={pruned!r})"
    assert repr(handle) == "PatchHandle(BertForSequenceClassification, reverted)"


def test_weights_are_counted_as_they_are(model):
    counts = weight_counts(model)
    layer = model.bert.encoder.layer[0]
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.encoder == sum(p.numel() for p in model.bert.encoder.parameters())
    assert counts.head == 3 * 12 * 48 + 3 * 12 + 48 * 12
    assert counts.ffn == sum(p.numel() for m in (layer.intermediate.dense, layer.output.dense) for p in m.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_patched_and_keeps_its_ticket(model, batch, copied):
    pruned = ticket(heads=[(0, 1)], ffns=[2])
    with ticketops.patch(model).apply(pruned):
        other = copied(model)
        assert torch.equal(other(**batch).logits, model(**batch).logits)
        rows = other.bert.encoder.layer[0].attention.self.query.weight.detach().view(HEADS, -1)
        before = rows.clone()
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5)
        other(**batch).loss.backward()
        optimizer.step()
    assert torch.equal(rows[1], before[1])
    assert not torch.equal(rows[0], before[0])


def test_a_batch_without_a_real_token_is_zeros(model, batch):
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with ticketops.patch(model):
        assert model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state.eq(0).all()
        assert model(batch["input_ids"][:0], batch["attention_mask"][:0]).logits.shape == (0, 3)


def test_training_goes_on_after_inference_mode(model, batch):
    with ticketops.patch(model).apply(ticket(heads=[(0, 1)])):
        with torch.inference_mode():
            model(**batch)
        model(**batch).loss.backward()


def test_token_types_of_one_row_stand_for_all(model, stock, batch):
    batch["token_type_ids"] = batch["token_type_ids"][:1]
    want = stock(**batch).logits
    with ticketops.patch(model):
        torch.testing.assert_close(model(**batch).logits, want, **roundings(1000, 100))

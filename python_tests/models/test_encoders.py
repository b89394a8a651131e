"""Every encoder that an adapter serves: stock equality of every task head, tickets, importance, exports, refusals."""

import copy
import json
import sys

import pytest
import torch
import transformers
from bounds import roundings
from huggingface_hub.errors import StrictDataclassFieldValidationError
from ops.cases import need
from searching.tiny import DEBERTA_V3
from sklearn.datasets import load_digits
from torch import nn
from transformers import DataCollatorWithFlattening

import ticketops
from models.conftest import HEADS, LAYERS
from models.emulated_graphs import emulated
from models.test_shrink import TICKETS, close
from ticketops.errors import InputError, UnsupportedError
from ticketops.models import costs, describe, weight_counts
from ticketops.models.inputs import positions
from ticketops.models.record import kept_neurons
from ticketops.models.registry import ADAPTERS, find_adapter
from ticketops.models.shrink import cut_indices
from ticketops.ops.dropout import draw_seed, keep_elements
from ticketops.searching.release import release
from ticketops.tickets import Ticket

NAMES = [adapter.base.__name__.removesuffix("Model") for adapter in ADAPTERS]
TEXT = [name for name, adapter in zip(NAMES, ADAPTERS, strict=True) if adapter.inputs.ragged]
#: The task head that tickets, importance and exports are tested with.
CLASSIFIERS = [
    f"{name}ForSequenceClassification" if name in TEXT else f"{name}ForImageClassification" for name in NAMES
]
#: Every task head of every encoder that the installed transformers has, and the bare models.
MODELS = [
    name
    for adapter, encoder in zip(ADAPTERS, NAMES, strict=True)
    for name in sys.modules[adapter.base.__module__].__all__
    if name == f"{encoder}Model" or (name.startswith(f"{encoder}For") or name == f"{encoder}LMHeadModel")
]
#: A bare model of each family of adapters.
BUILT_APART = [
    "BertModel",
    "DebertaV2Model",
    "DistilBertModel",
    "EuroBertModel",
    "ModernBertModel",
    "MPNetModel",
    "NomicBertModel",
    "ViTModel",
]
#: Encoders whose task heads hand no keyword arguments on, patched or not.
HANDING_NOTHING_ON = ("MPNet", "DebertaV2")
PADDING = {"right": [17, 3, 9, 1], "left": [17, 3, 9, 1], "none": [17, 17, 17, 17]}


def make(name, **changes):
    """A tiny model by its class name, dropout off, weights large enough that every head and FFN matters."""
    encoder = max((each for each in NAMES if name.startswith(each)), key=len, default=None)
    if encoder is None or not hasattr(transformers, name):
        pytest.skip(f"with transformers {transformers.__version__} no {name} is served")
    sizes = {"vocab_size": 100, "num_labels": 3, "initializer_range": 0.2, "max_position_embeddings": 40}
    if encoder == "DistilBert":
        sizes |= {"dim": 48, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64}
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    elif encoder == "ModernBert":
        # A window of four tokens to either side, and rows of 17.
        sizes |= {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
        sizes |= {"local_attention": 8, "pad_token_id": 0}
    elif encoder == "EuroBert":
        sizes |= {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
        sizes |= {"pad_token_id": 0}
    else:
        sizes |= {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes |= {} if encoder == "MPNet" else {"type_vocab_size": 2}
        sizes |= DEBERTA_V3 if encoder == "DebertaV2" else {}
        sizes |= {"image_size": 32, "patch_size": 8, "encoder_stride": 8} if encoder not in TEXT else {}
        sizes |= {"embedding_size": 24} if encoder == "Electra" else {}
        # Gates multiply what rounding has done to the activations.
        sizes |= {"initializer_range": 0.1} if encoder in ("Gte", "NomicBert") else {}
        sizes |= {"use_task_id": True} if encoder == "Ernie" else {}
    if name.endswith("ForQuestionAnswering"):
        sizes["num_labels"] = 2
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{encoder}Config")(**(sizes | changes))).eval()


def draw(model, padding="right"):
    """Four rows of token ids, padded with the model's own padding id, by which RoBERTa counts; or four images."""
    lengths, generator = torch.tensor(PADDING[padding]), torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)}
    mask = (torch.arange(17) < lengths[:, None]).long()
    if padding == "left":
        mask = mask.flip(1)
    ids = torch.randint(5, 100, mask.shape, generator=generator).where(mask.bool(), model.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("ForMultipleChoice"):
        batch = {name: value.view(2, 2, -1) for name, value in batch.items()}
    return batch


def real(outputs, batch):
    """The output tensors by name, at real tokens where they have one value a token."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if "attention_mask" not in batch:
        return found
    mask = batch["attention_mask"].bool()
    return {name: value[mask] if value.shape[: mask.ndim] == mask.shape else value for name, value in found.items()}


def compare(model, stock, batch):
    """Asserts that outputs and all gradients are equal to float32 rounding, on the scale of the largest gradient."""
    both = []
    for each in (model, stock):
        each.zero_grad()
        both.append(real(each(**batch), batch))
        sum(value.double().square().mean() for value in both[-1].values()).backward()
    got, want = both
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **roundings(100))
    scale = max(parameter.grad.abs().max().item() for parameter in stock.parameters() if parameter.grad is not None)
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        gradient, wanted = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, other))
        assert (gradient - wanted).abs().max() <= roundings(100)["atol"] * scale, name


@pytest.fixture(params=CLASSIFIERS)
def encoder(request):
    return make(request.param)


@pytest.fixture
def inputs(encoder):
    return draw(encoder) | {"labels": torch.tensor([0, 2, 1, 2])}


def masked(stock, ticket):
    """The stock model with the ticket's masks multiplied in, at the linear layers that every encoder has."""
    adapter, base = find_adapter(stock)
    masks = (ticket.head_mask, ticket.ffn_mask, kept_neurons(ticket, 64))
    for layer, heads, ffn, neurons in zip(adapter.layers(base), *masks, strict=True):
        parts, mask = adapter.parts(layer), heads.repeat_interleave(12)
        parts.fc2.register_forward_pre_hook(lambda module, args, neurons=neurons: (args[0] * neurons,))
        parts.output.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
        parts.fc2.register_forward_hook(lambda module, args, output, ffn=ffn: output * ffn)
    return stock


@pytest.mark.parametrize("name", MODELS)
def test_every_task_head_equals_stock(name):
    model = make(name)
    stock = copy.deepcopy(model)
    with ticketops.patch(model):
        compare(model, stock, draw(model))


@pytest.mark.parametrize("name", [name for name in TEXT if name not in HANDING_NOTHING_ON])
def test_packed_inputs_are_the_sequences_that_flash_attention_sees(name):
    model = make(f"{name}ForTokenClassification")
    stock, padded, base = copy.deepcopy(model), draw(model), model.base_model
    real = padded["attention_mask"].bool()
    rows = [{"input_ids": ids[keep].tolist()} for ids, keep in zip(padded["input_ids"], real, strict=True)]
    table = getattr(find_adapter(model)[0].embeddings(base), "position_embeddings", None)
    start = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    del packed["labels"]
    packed["position_ids"] += start
    positions = {key: packed[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        apart, together = stock(**padded).logits[real], stock(**positions).logits[0]
    found = []
    with ticketops.patch(model) as handle:
        for batch in (padded, packed):
            model.zero_grad()
            with handle.apply(None).record_importance() as importance:
                logits = model(**batch).logits
                logits = logits[real] if batch is padded else logits[0]
                (logits.square().sum() / 4).backward()
            assert importance._heads.counts == [4] * LAYERS
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append([logits, importance.head, importance.ffn, *gradients])
            torch.testing.assert_close(logits, apart, **roundings(1000, 100))
            handle.apply(TICKETS["neither"])
            found[-1].append(model(**batch).logits[real if batch is padded else slice(None)].reshape(-1, 3))
            if batch is padded:
                # Nobody who computes attention otherwise tells them apart.
                with pytest.raises(
                    UnsupportedError, match="the argument cu_seq_lens_q, beside padding or without flash"
                ):
                    model(**packed)
                model.config._attn_implementation = "flash_attention_2"
        for got, want in zip(*reversed(found), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
        handle.apply(None)
        # Not every encoder's attention gets to see the positions.
        want = apart if handle.adapter.reads_positions else together
        torch.testing.assert_close(model(**positions).logits[0], want, **roundings(1000, 100))
        mask = torch.ones_like(packed["input_ids"])
        torch.testing.assert_close(model(**packed, attention_mask=mask).logits[0], apart, **roundings(1000, 100))
        bounds = packed["cu_seq_lens_q"]
        for change in ({"max_length_q": 3}, {"cu_seq_lens_q": bounds + 1}, {"cu_seq_lens_k": bounds[1:]}):
            with pytest.raises(InputError, match=r"must rise from 0|differ"):
                model(**packed | change)


@pytest.mark.parametrize("name", TEXT)
def test_positions_count_as_stock_counts_them(name):
    # Left padding, ids or embeddings: RoBERTa's positions start behind its padding id, BERT's at the row's start.
    model = make(f"{name}ForTokenClassification")
    stock, batch = copy.deepcopy(model), draw(model, "left")
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}
    with ticketops.patch(model):
        compare(model, stock, batch)
        compare(model, stock, embedded | {"attention_mask": batch["attention_mask"]})


@pytest.mark.parametrize(
    "name",
    ["BertForPreTraining", "ErnieForNextSentencePrediction", "RobertaForMultipleChoice", "XLMRobertaForCausalLM"],
)
def test_padding_where_the_task_head_reads_is_left_to_the_stock_code(name):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model, "left")
    with ticketops.patch(model) as handle:
        compare(model, stock, batch)
        handle.apply(TICKETS["neither"])
        if name.endswith("CausalLM"):
            model(**batch)
            return
        with pytest.raises(UnsupportedError, match=r"padding in front of a row.*ignore the applied ticket"):
            model(**batch)
        # A row without any token has no first one.
        model(
            batch["input_ids"],
            batch["attention_mask"] * torch.tensor([1, 0, 0, 0]).view(*batch["input_ids"].shape[:-1], 1),
        )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ElectraForPreTraining", {"embedding_size": 48}),
        ("DistilBertModel", {"sinusoidal_pos_embds": True}),
        ("DistilBertModel", {"activation": "relu"}),
        ("XLMRobertaModel", {"hidden_act": "gelu_new"}),
        ("RobertaModel", {"pad_token_id": 0}),
        ("ViTModel", {"image_size": [32, 32], "patch_size": [16, 4]}),
        ("ViTModel", {"head_dim": 8}),
        ("MPNetForMaskedLM", {"hidden_act": "relu", "pad_token_id": 0}),
        ("NomicBertForMaskedLM", {"head_dim": 8, "hidden_act": "gelu"}),
        ("NomicBertModel", {"attn_implementation": "eager"}),
        ("GteModel", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("GteForSequenceClassification", {"type_vocab_size": 0}),
        ("JinaEmbeddingsV3Model", {"hidden_act": "silu"}),
        ("EuroBertModel", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
        ("EuroBertForSequenceClassification", {"classifier_pooling": "bos"}),
        ("EuroBertForSequenceClassification", {"classifier_pooling": "mean", "attn_implementation": "eager"}),
        # DeBERTa-v2-xlarge's convolution, and what else v2 and mDeBERTa have.
        ("DebertaV2ForMaskedLM", {"conv_kernel_size": 3, "conv_act": "gelu", "share_att_key": False}),
        ("DebertaV2ForSequenceClassification", {"conv_kernel_size": 5, "conv_groups": 2, "position_buckets": 3}),
        ("DebertaV2ForTokenClassification", {"share_att_key": False, "pos_att_type": "c2p", "norm_rel_ebd": "none"}),
        ("DebertaV2ForTokenClassification", {"share_att_key": False, "pos_att_type": "p2c", "position_buckets": -1}),
        ("DebertaV2ForTokenClassification", {"position_buckets": -1, "max_relative_positions": 6}),
        ("DebertaV2ForTokenClassification", {"position_buckets": 16, "max_relative_positions": 10}),
        ("DebertaV2Model", {"position_biased_input": True, "type_vocab_size": 2, "share_att_key": False}),
        ("DebertaV2Model", {"embedding_size": 24, "pos_att_type": []}),
        ("DebertaV2Model", {"relative_attention": False, "position_biased_input": True}),
        ("DebertaV2ForMaskedLM", {"legacy": False, "hidden_act": "relu"}),
        ("ModernBertModel", {"attn_implementation": "eager"}),
        ("ModernBertModel", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
        ("ModernBertModel", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("ModernBertModel", {"local_attention": 1, "hidden_activation": "relu"}),
        ("ModernBertForMaskedLM", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("ModernBertForSequenceClassification", {"classifier_pooling": "mean"}),
    ],
)
def test_other_configurations_equal_stock(name, changes):
    model = make(name, **changes)
    stock = copy.deepcopy(model)
    with ticketops.patch(model):
        compare(model, stock, draw(model))


#: ModernBERTs under other names, with what their config.json files say in words older than transformers 5.
MODERNBERTS = {
    "mmBERT": {"num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "mask_token_id": 4}
    | {"cls_token_id": 1, "sep_token_id": 1},
    # The smallest one's seven layers, of which every third attends to the whole sequence, the last one too.
    "Ettin": {"num_hidden_layers": 7, "pad_token_id": 3, "causal_mask": False, "is_causal": False},
}


@pytest.mark.parametrize("name", MODERNBERTS)
def test_mmbert_and_ettin_are_modernberts(name, tmp_path):
    words = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "classifier_pooling": "mean"}
    words |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 160000.0}
    words |= {"position_embedding_type": "sans_pos", "layer_norm_eps": 1e-05, "reference_compile": False}
    words |= {"vocab_size": 100, "hidden_size": 48, "num_attention_heads": HEADS, "intermediate_size": 64}
    words |= {"local_attention": 8, "max_position_embeddings": 40, "initializer_range": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(words | MODERNBERTS[name]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert describe(config)["adapter"] == "ModernBertModel"
    layers = config.num_hidden_layers
    assert {config.rope_parameters[kind]["rope_theta"] for kind in set(config.layer_types)} == {160000.0}
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    stock, batch = copy.deepcopy(model), draw(model)
    heads = torch.arange(layers * HEADS).view(layers, HEADS) % 3 > 0
    heads[1] = False
    ticket = Ticket(heads, torch.arange(layers) % 4 != 2)
    with ticketops.patch(model) as handle:
        compare(model, stock, batch)
        want = masked(stock, ticket)(**batch).logits
        torch.testing.assert_close(handle.apply(ticket).model(**batch).logits, want, **close)
    folder = ticketops.export(model, tmp_path / "out", ticket=ticket)
    torch.testing.assert_close(ticketops.load(folder)(**batch).logits, want, **close)


@pytest.mark.parametrize("name", ["ModernBertForSequenceClassification", "NomicBertForTokenClassification"])
@pytest.mark.parametrize("options", [{}, {"unpad": False}, {"bucket": 16}])
def test_positions_that_follow_the_width_of_a_batch_equal_stock(name, options):
    # Beyond 10 tokens angles shrink; no row is as long as the batch is wide, and the next one is within 10 again.
    model = make(name, max_position_embeddings=10, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    stock, lengths = copy.deepcopy(model), torch.tensor([12, 3, 9, 1])
    with ticketops.patch(model, **options):
        for width in (17, 13, 9, 12):
            mask = (torch.arange(width) < lengths[:, None]).long()
            batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
            compare(model, stock, batch)
            with torch.no_grad():
                got, want = (real(each(**batch), batch)["logits"] for each in (model, stock))
            torch.testing.assert_close(got, want, **roundings(100))


@pytest.mark.parametrize("options", [{}, {"unpad": False}, {"bucket": 16}])
def test_rows_longer_than_a_window_equal_stock(options):
    # Several blocks of queries, most of them without a view of either end; a row within the window beside them.
    model = make("ModernBertForTokenClassification", local_attention=40, max_position_embeddings=200)
    stock, lengths = copy.deepcopy(model), torch.tensor([190, 15, 101])
    mask = (torch.arange(190) < lengths[:, None]).long()
    batch = {"input_ids": torch.randint(5, 100, mask.shape), "attention_mask": mask}
    with ticketops.patch(model, **options):
        compare(model, stock, batch)


@pytest.mark.parametrize("options", [{}, {"unpad": False}, {"bucket": 16}])
def test_a_bias_by_distance_is_that_of_stock_in_long_rows(options):
    # Every bucket, the last ones for distances of 128 and more; the table's gradient too.
    model = make("MPNetForTokenClassification", max_position_embeddings=304)
    stock, lengths = copy.deepcopy(model), torch.tensor([300, 15, 101])
    mask = (torch.arange(300) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape).where(mask.bool(), model.config.pad_token_id)
    with ticketops.patch(model, **options) as handle:
        compare(model, stock, {"input_ids": ids, "attention_mask": mask})
        found = []
        for each in (model, masked(stock, TICKETS["uneven"])):
            handle.apply(TICKETS["uneven"])
            each.zero_grad()
            each(ids, mask).logits[mask.bool()].square().sum().backward()
            found.append(each.mpnet.encoder.relative_attention_bias.weight.grad)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * found[1].abs().max().item())
        # No distance is in the bucket of those that are positive and 0.
        assert (found[1].abs().amin(1) > 0).sum() == 31


@pytest.mark.parametrize("options", [{}, {"unpad": False}, {"bucket": 16}])
@pytest.mark.parametrize("changes", [{}, {"share_att_key": False, "conv_kernel_size": 3}])
def test_position_vectors_are_those_of_stock_in_long_rows(options, changes):
    # As many buckets as DeBERTa-v3, and distances that share them; the gradients of vectors and projections too.
    sizes = {"max_position_embeddings": 304, "position_buckets": 256, "max_relative_positions": 280, **changes}
    model = make("DebertaV2ForTokenClassification", **sizes)
    stock, lengths = copy.deepcopy(model), torch.tensor([300, 15, 101])
    mask = (torch.arange(300) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape).where(mask.bool(), model.config.pad_token_id)
    with ticketops.patch(model, **options) as handle:
        compare(model, stock, {"input_ids": ids, "attention_mask": mask})
        found = []
        for each in (model, masked(stock, TICKETS["uneven"])):
            handle.apply(TICKETS["uneven"])
            each.zero_grad()
            each(ids, mask).logits[mask.bool()].square().sum().backward()
            found.append(each.deberta.encoder.rel_embeddings.weight.grad)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * found[1].abs().max().item())
        assert (found[1].abs().amax(1) > 0).sum() > 300


def test_position_vectors_are_dropped_out_as_stock_drops_them():
    # Once for each layer and all rows of a batch.
    model = make("DebertaV2ForTokenClassification", num_hidden_layers=1, share_att_key=False)
    stock, batch = copy.deepcopy(model), draw(model, "none")
    found = []
    with ticketops.patch(model):
        for each in (model, stock):
            dropout = each.train().deberta.encoder.layer[0].attention.self.pos_dropout
            dropout.p = 0.5
            torch.manual_seed(1)
            outputs = torch.stack([each(**batch).logits.detach() for _ in range(400)])
            found.append((outputs.mean(0), outputs.std(0)))
    assert found[0][1].max() > 0.1
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() < 0.25 * found[1][1].max()


def test_a_last_layer_that_is_passed_several_times_is_left_to_the_stock_code():
    model = make("DebertaV2ForTokenClassification")
    stock, batch = copy.deepcopy(model), draw(model)
    for each in (model, stock):
        each.deberta.z_steps = 2
    with ticketops.patch(model) as handle:
        results = []
        for each in (model, stock):
            try:
                results.append(each(**batch).logits)
            # What transformers makes of it is not ours to say.
            except Exception as error:
                results.append(repr(error))
        assert type(results[0]) is type(results[1])
        handle.apply(TICKETS["neither"])
        with pytest.raises(UnsupportedError, match=r"z_steps=2.*ignore the applied ticket"):
            model(**batch)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: setattr(table, "max_norm", 0.5), "a relative-position bias with max_norm"),
        (lambda table: setattr(table, "padding_idx", 3), "a relative-position bias with max_norm"),
        (
            lambda table: table.register_forward_hook(lambda *_: None),
            "hooks on its encoder.relative_attention_bias, which a patched encoder does not call",
        ),
        (
            lambda table: setattr(table, "__class__", type("Other", (nn.Embedding,), {})),
            "as its relative-position bias",
        ),
    ],
)
def test_a_changed_table_of_a_bias_is_left_to_the_stock_code(change, problem):
    model = make("MPNetModel")
    stock, batch = copy.deepcopy(model), draw(model)
    with ticketops.patch(model) as handle:
        compare(model, stock, batch)
        for each in (model, stock):
            change(each.encoder.relative_attention_bias)
        compare(model, stock, batch)
        handle.apply(TICKETS["neither"])
        with pytest.raises(UnsupportedError, match=rf"{problem}.*ignore the applied ticket"):
            model(**batch)
    if "hooks" not in problem:
        with pytest.raises(UnsupportedError, match=problem):
            ticketops.patch(model)


def test_the_gradient_of_a_half_precision_table_is_rounded_once():
    model = make("MPNetForTokenClassification", max_position_embeddings=304, num_hidden_layers=1).bfloat16()
    ids, found = torch.randint(5, 100, (1, 300)), []
    for table in (torch.bfloat16, torch.float32):
        model.mpnet.encoder.relative_attention_bias.to(table)
        model.zero_grad()
        with ticketops.patch(model):
            model(ids).logits.float().square().sum().backward()
        found.append(model.mpnet.encoder.relative_attention_bias.weight.grad)
    assert torch.equal(found[0], found[1].bfloat16())


def test_a_trained_table_of_a_bias_is_read_anew():
    model = make("MPNetForSequenceClassification").bfloat16()
    stock, batch = copy.deepcopy(model).float(), draw(model)
    with ticketops.patch(model), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**batch).logits.float(), stock(**batch).logits, rtol=0.1, atol=0.1)
            for each in (model, stock):
                each.mpnet.encoder.relative_attention_bias.weight.mul_(-2)


@pytest.mark.parametrize("name", ["DebertaV2Model", "MPNetForSequenceClassification", "MPNetModel"])
def test_results_are_tuples_where_they_are_asked_for(name):
    model = make(name)
    stock, batch = copy.deepcopy(model), draw(model)
    real = batch["attention_mask"].bool()
    with ticketops.patch(model):
        for wanted in ({}, {"output_hidden_states": True}):
            got, want = (each(**batch, return_dict=False, **wanted) for each in (model, stock))
            assert len(got) == len(want)
            for one, other in zip(got, want, strict=True):
                assert type(one) is type(other)
                pairs = zip(one, other, strict=True) if isinstance(other, tuple) else [(one, other)]
                for a, b in pairs:
                    both = (a[real], b[real]) if b.shape[:2] == real.shape else (a, b)
                    torch.testing.assert_close(*both, **close)
        with pytest.raises(ValueError, match="both input_ids and inputs_embeds"):
            model.base_model(batch["input_ids"], inputs_embeds=torch.zeros(4, 17, 48))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ModernBertForSequenceClassification", {}),
        ("ModernBertForSequenceClassification", {"classifier_pooling": "mean"}),
        ("ModernBertForTokenClassification", {}),
        ("MPNetForSequenceClassification", {}),
        ("MPNetForTokenClassification", {}),
        ("DebertaV2ForSequenceClassification", {}),
        ("DebertaV2ForTokenClassification", {"conv_kernel_size": 3, "conv_act": "gelu"}),
        ("DebertaV2ForTokenClassification", {"share_att_key": False, "position_biased_input": True}),
    ],
)
@pytest.mark.parametrize("way", ["plain", "bucket", "parts", "spread", "compiled"])
def test_holes_in_masks_keep_the_distances_of_the_tokens_around_them(name, changes, way, monkeypatch):
    model = make(name, **changes)
    stock, batch = copy.deepcopy(model), draw(model)
    # A hole longer than the window, several, and a row whose mask has holes only behind its last token.
    batch["attention_mask"][0, [2, 4, 5, 6, 7, 8, 9, 12]] = 0
    batch["attention_mask"][2, 3] = 0
    if way == "parts":
        monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    if way == "spread":
        model.config.output_hidden_states = stock.config.output_hidden_states = True
    with ticketops.patch(model, bucket=16 if way == "bucket" else None) as handle:
        compare(torch.compile(model, backend="aot_eager") if way == "compiled" else model, stock, batch)
        for ticket in (TICKETS["neither"], TICKETS["neurons"]):
            handle.apply(ticket)
            compare(model, masked(copy.deepcopy(stock), ticket), batch)
        if name.endswith("SequenceClassification"):
            handle.apply(None)
            check_importance(handle, stock, batch | {"labels": torch.tensor([0, 2, 1, 2])})


def test_masks_with_holes_are_served_where_no_layer_has_a_window():
    try:
        model = make("ModernBertForSequenceClassification", layer_types=["full_attention"] * LAYERS)
    except StrictDataclassFieldValidationError:
        pytest.skip(f"transformers {transformers.__version__} has no configuration without a window")
    stock, batch = copy.deepcopy(model), draw(model)
    batch["attention_mask"][0, 5] = 0
    with ticketops.patch(model):
        compare(model, stock, batch)


@pytest.mark.parametrize("part", ["attention_norm", "ffn_norm"])
@pytest.mark.parametrize("index", [0, LAYERS - 1])
def test_another_norm_in_place_of_a_layers_own_is_computed_by_stock_code_or_refused(encoder, inputs, part, index):
    def replace(model):
        layer = find_adapter(model)[0].layers(model.base_model)[index]
        norm = getattr(find_adapter(model)[0].parts(layer), part)
        if norm is None:
            pytest.skip("this layer has none")
        place = next(name for name, module in layer.named_modules() if module is norm)
        layer.set_submodule(place, nn.RMSNorm(48))

    stock = copy.deepcopy(encoder)
    replace(stock)
    with pytest.raises(UnsupportedError, match=f"layer {index} has .*RMSNorm as its {part}, not a plain"):
        ticketops.patch(copy.deepcopy(stock))
    with ticketops.patch(encoder) as handle:
        replace(encoder)
        compare(encoder, stock, inputs)
        handle.apply(TICKETS["uneven"])
        with pytest.raises(UnsupportedError, match=f"layer {index} has .*RMSNorm as its {part}, not a plain"):
            encoder(**inputs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ModernBertForSequenceClassification", {"classifier_pooling": "mean"}),
        ("ModernBertForMultipleChoice", {}),
        ("EuroBertForSequenceClassification", {}),
    ],
)
def test_heads_that_do_not_read_the_first_token_take_padding_on_the_left(name, changes):
    model = make(name, **changes)
    stock = copy.deepcopy(model)
    with ticketops.patch(model):
        compare(model, stock, draw(model, "left"))


def test_no_optimizer_moves_what_is_pruned(encoder, inputs):
    """In particular rows that come several times in one weight: of q, k and v, or of neurons and their gates."""
    with ticketops.patch(encoder).apply(TICKETS["neurons"]):
        optimizer = torch.optim.AdamW(encoder.parameters(), 0.1, weight_decay=0.5)
        before = copy.deepcopy(encoder.state_dict())
        places = cut_indices(encoder, Ticket.full(LAYERS, HEADS), TICKETS["neurons"])
        for _ in range(2):
            optimizer.zero_grad()
            encoder(**inputs).loss.backward()
            optimizer.step()
    for name, (dim, kept) in places.items():
        changed = (encoder.state_dict()[name] != before[name]).movedim(dim, 0)
        pruned = torch.ones(len(changed), dtype=torch.bool).index_fill(0, kept, False)
        assert torch.equal(changed.flatten(1).any(1) if changed.ndim > 1 else changed, ~pruned), name


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_fused_and_gated_layers_are_counted_and_cut(changes):
    model = make("ModernBertModel", **changes)
    before, ticket = weight_counts(model), TICKETS["neurons"]
    whole, left = costs(model, 17, ticket)
    # In two of three layers a token sees four others to either side.
    pairs = sum(min(16, token + 4) - max(0, token - 4) + 1 for token in range(17))
    reach = [17 * 17, pairs, pairs]
    assert whole.macs_per_token == sum(4 * (4 * 48 * 12 + 2 * 12 * each // 17) + 64 * 3 * 48 for each in reach)
    ticketops.shrink(model, ticket)
    assert weight_counts(model).total == left.parameters == round(before.total * ticket.weights_remaining(before))
    widths = kept_neurons(ticket, 64).sum(1).tolist()
    for layer, heads, width in zip(model.layers, ticket.head_mask.sum(1).tolist(), widths, strict=True):
        assert (layer.attn.Wqkv.out_features, layer.attn.Wo.in_features) == (3 * 12 * heads, 12 * heads)
        assert (layer.mlp.Wi.out_features, layer.mlp.Wo.in_features) == (2 * width, width)
        assert (layer.mlp.Wo.bias is not None) == bool(changes and width)


@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["p2c"]])
def test_position_projections_are_counted_and_cut(kinds, tmp_path):
    model = make("DebertaV2ForTokenClassification", share_att_key=False, pos_att_type=kinds)
    batch, before, ticket = draw(model), weight_counts(model), TICKETS["neurons"]
    whole, left = costs(model, 17, ticket)
    assert whole.macs_per_token == LAYERS * (4 * (4 * 48 * 12 + (2 + len(kinds)) * 12 * 17) + 64 * 2 * 48)
    want = real(masked(copy.deepcopy(model), ticket)(**batch), batch)["logits"]
    ticketops.shrink(model, ticket)
    assert weight_counts(model).total == left.parameters == round(before.total * ticket.weights_remaining(before))
    for layer, heads in zip(model.deberta.encoder.layer, ticket.head_mask.sum(1).tolist(), strict=True):
        assert layer.attention.self.pos_query_proj.out_features == 12 * heads
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        torch.testing.assert_close(real(each(**batch), batch)["logits"], want, **close)
        with ticketops.patch(each):
            torch.testing.assert_close(real(each(**batch), batch)["logits"], want, **close)


def test_a_cut_optimizer_goes_on_as_a_masked_models_and_rewinds(encoder, inputs):
    ticket, pretrained = TICKETS["neurons"], copy.deepcopy(encoder.state_dict())
    small, models = ticketops.shrink(copy.deepcopy(encoder), ticket), []
    for cut in (True, False):
        model = copy.deepcopy(encoder)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=0.1)
        with ticketops.patch(model) as handle:
            for step in range(3):
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
                if step == 0:
                    _ = ticketops.shrink(model, ticket, optimizer=optimizer) if cut else handle.apply(ticket)
        models.append(model if cut else ticketops.shrink(model, ticket))
    for (name, value), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, **roundings(1000, 100), msg=lambda text, name=name: f"{name}: {text}")
    ticketops.rewind(models[0], pretrained)
    for value, other in zip(models[0].state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", ["full", "neither", "neurons"])
def test_patched_equals_stock_under_tickets(name, encoder, inputs):
    want = masked(copy.deepcopy(encoder), TICKETS[name])
    classes = [type(module) for module in encoder.modules()]
    handle = ticketops.patch(encoder).apply(TICKETS[name])
    outputs = [each(**inputs, output_hidden_states=True) for each in (encoder, want)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **close)
    assert len(outputs[0].hidden_states) == len(outputs[1].hidden_states) == LAYERS + 1
    for got, wanted in zip(*(output.hidden_states for output in outputs), strict=True):
        keep = inputs.get("attention_mask", torch.ones(wanted.shape[:2])).bool()
        torch.testing.assert_close(got[keep], wanted[keep], **close)
    for output in outputs:
        output.loss.backward()
    for (key, a), b in zip(encoder.named_parameters(), want.parameters(), strict=True):
        gradient = torch.zeros_like(a) if a.grad is None else a.grad
        other = torch.zeros_like(b) if b.grad is None else b.grad
        # Elements are sums of terms as large as the largest one: of DeiT's first positions, 6e5.
        atol = 1e-5 * max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    handle.revert()
    assert [type(module) for module in encoder.modules()] == classes


@pytest.mark.parametrize("name", BUILT_APART)
def test_a_forward_that_is_called_by_hand_is_served_too(name):
    model = make(name)
    batch = draw(model)
    with ticketops.patch(model).apply(TICKETS["neither"]):
        assert torch.equal(model(**batch)[0], model.forward(**batch)[0])
        layer = find_adapter(model)[0].layers(model)[0]
        with pytest.raises(UnsupportedError, match="layer 0 was called past the model's own forward"):
            layer(torch.zeros(1, 2, 48))


@pytest.mark.parametrize("name", BUILT_APART)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_hook_is_called_or_refused(name, register, pruned):
    model = make(name)
    adapter, base = find_adapter(model)
    batch, layer = draw(model), adapter.layers(base)[0]
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[0, 1] = not pruned
    ticket = Ticket(heads, torch.ones(LAYERS, dtype=torch.bool))
    outcomes = set()
    for place, module in [*layer.named_modules()]:
        for first in (True, False):
            calls = []
            add = lambda module=module, calls=calls: getattr(module, register)(lambda *_, calls=calls: calls.append(1))  # noqa: E731
            hook = add()
            model(**batch)[0].square().sum().backward()
            hook.remove()
            # Attention's dropout is called by no stock model either.
            in_stock, hook = bool(calls), None
            calls.clear()
            if first:
                hook = add()
            try:
                with ticketops.patch(model) as handle:
                    # Looked at once without it.
                    handle.apply(ticket)
                    if not first:
                        model(**batch)
                        hook = add()
                    model(**batch)[0].square().sum().backward()
                refusal = None
            except UnsupportedError as error:
                refusal = str(error)
            hook.remove()
            assert bool(calls) == (in_stock and refusal is None), place
            assert refusal is None or f"layer 0 has hooks on its {place}, which a patched layer does not" in refusal
            outcomes.add(refusal is None)
    # Without a ticket the stock code calls them all.
    assert outcomes == ({True, False} if pruned else {True})
    with ticketops.patch(model) as handle:
        handle.apply(ticket)
        model(**batch)


def test_importance_equals_its_definition(encoder, inputs):
    stock = copy.deepcopy(encoder)
    with ticketops.patch(encoder) as handle:
        check_importance(handle, stock, inputs)


def check_importance(handle, stock, inputs):
    """Asserts that the importance that a patched model records is the gradient of masks in the stock one, by rows."""
    with handle.record_importance() as importance:
        handle.model(**inputs).loss.backward()
    head, ffn = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS)
    adapter, base = find_adapter(stock)
    for row in range(4):
        masks = [(torch.ones(HEADS, requires_grad=True), torch.ones((), requires_grad=True)) for _ in range(LAYERS)]
        hooks = []
        for layer, (heads, whole) in zip(adapter.layers(base), masks, strict=True):
            parts = adapter.parts(layer)
            scale = lambda module, args, heads=heads: (args[0] * heads.repeat_interleave(12),)  # noqa: E731
            hooks.append(parts.output.register_forward_pre_hook(scale))
            hooks.append(parts.fc2.register_forward_hook(lambda module, args, output, whole=whole: output * whole))
        stock(**{name: value[row : row + 1] for name, value in inputs.items()}).loss.backward()
        for hook in hooks:
            hook.remove()
        head += torch.stack([heads.grad.abs() for heads, _ in masks]) / 4
        ffn += torch.stack([whole.grad.abs() for _, whole in masks]) / 4
    torch.testing.assert_close(importance.head.float(), head, **roundings(1000, 100 * head.max().item()))
    torch.testing.assert_close(importance.ffn.float(), ffn, **roundings(1000, 100 * ffn.max().item()))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        # transformers' MPNet has no checkpoints.
        *((name, "checkpointed") for name in CLASSIFIERS if not name.startswith("MPNet")),
        ("DebertaV2ForSequenceClassification", "compiled"),
        ("DistilBertForSequenceClassification", "compiled"),
        ("EuroBertForSequenceClassification", "compiled"),
        ("ElectraForSequenceClassification", "compiled"),
        ("ModernBertForSequenceClassification", "compiled"),
        ("MPNetForSequenceClassification", "compiled"),
        ("NomicBertForSequenceClassification", "compiled"),
        ("ViTForImageClassification", "compiled"),
    ],
)
def test_checkpointing_and_compiling_give_the_same(name, way):
    model = make(name).train()
    batch = draw(model) | {"labels": torch.tensor([0, 2, 1, 2])}
    results = []
    with ticketops.patch(model) as handle:
        for changed in (False, True):
            run = model
            if changed and way == "checkpointed":
                model.gradient_checkpointing_enable()
            elif changed:
                run = torch.compile(model, backend="aot_eager")
            model.zero_grad()
            with handle.record_importance() as importance:
                run(**batch).loss.backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            results.append([importance.head, importance.ffn, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **roundings(1000, 10))


@pytest.mark.parametrize("format", ["compact", "dense"])
def test_exports_equal_masked(format, encoder, inputs, tmp_path):
    want = masked(copy.deepcopy(encoder), TICKETS["neither"])(**inputs).logits
    folder = ticketops.export(encoder, tmp_path / "out", format, ticket=TICKETS["neither"])
    auto = "AutoModelForImageClassification" if "pixel_values" in inputs else "AutoModelForSequenceClassification"
    loaded = getattr(transformers, auto).from_pretrained(folder)
    torch.testing.assert_close(loaded(**inputs).logits, want, **close)
    with ticketops.patch(loaded).apply(Ticket.full(LAYERS, HEADS)):
        torch.testing.assert_close(loaded(**inputs).logits, want, **close)


def test_dropout_is_where_stock_has_it(encoder):
    adapter, base = find_adapter(encoder)
    parts = adapter.parts(adapter.layers(base)[0])
    inside = [module for module in adapter.layers(base)[0].modules() if isinstance(module, nn.Dropout)]
    assert {id(module) for module in parts.dropouts} == {id(module) for module in inside}


@pytest.mark.parametrize("ticket", [None, "neither", "neurons"])
# The op has no RMSNorm, as EuroBERT needs it.
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if not name.startswith("EuroBert")])
def test_all_layers_are_one_op_on_a_cpu(name, ticket, monkeypatch):
    need("native", "attention", torch.float32)
    model, counts, compute = make(name), [], ticketops.ops.encoder_layers
    monkeypatch.setattr(
        ticketops.ops,
        "encoder_layers",
        lambda x, layers, *more: counts.append(len(layers)) or compute(x, layers, *more),
    )
    with ticketops.patch(model) as handle:
        handle.apply(None if ticket is None else TICKETS[ticket])
        model(**draw(model)).logits.sum().backward()
    assert counts == [LAYERS]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_graphs_compute_what_is_computed_without(name):
    """In graphs that are emulated: training under a ticket, and importance, equal to the bit."""
    need("native", "attention", torch.float32)
    found = []
    with emulated(sightings=1):
        for graphs in ("auto", False):
            torch.manual_seed(0)
            model = make(name).train()
            handle = ticketops.patch(model, graphs=graphs, bucket=64 if model.main_input_name == "input_ids" else None)
            handle.apply(TICKETS["uneven"])
            optimizer, results = torch.optim.AdamW(model.parameters(), lr=1e-2), []
            for step in range(6):
                if step == 3 and hasattr(model.config, "local_attention"):
                    model.config.local_attention = 4
                torch.manual_seed(step)
                with handle.record_importance() as importance:
                    loss = model(**draw(model)).logits.square().mean()
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                results += [loss.detach(), importance.head, importance.ffn]
            found.append([*results, *(p.detach() for p in model.parameters())])
            if graphs:
                why, replays = dict(handle.graphs.eager), handle.graphs.replays
    assert all(map(torch.equal, *found))
    if name.startswith("Deberta"):
        assert why == {"position vectors, which each layer projects": 6}
    elif name.startswith("EuroBert"):
        assert why == {"layers that no single op computes": 6}
    else:
        # What changes a window changes what is computed.
        shapes = 1 + name.startswith("ModernBert")
        assert (replays, sum(why.values())) == (6 - shapes, shapes)


@pytest.mark.parametrize(("name", "place"), [("ModernBertModel", "drop"), ("GteModel", "dropout")])
def test_dropout_between_the_layers_of_an_ffn_is_the_op_s_own(name, place):
    class Drawn(nn.Module):
        def forward(self, x):
            rows = x.flatten(0, 1)
            keep = keep_elements(draw_seed(x.device), *rows.shape, 0.4, x.device)
            return (rows * keep / 0.6).view_as(x)

    model = make(name).train()
    for layer in model.layers:
        getattr(layer.mlp, place).p = 0.4
    stock, batch = copy.deepcopy(model), draw(model, "none")
    for layer in stock.layers:
        setattr(layer.mlp, place, Drawn())
    with ticketops.patch(model):
        for each in (model, stock):
            torch.manual_seed(3)
            each(**batch).last_hidden_state.square().mean().backward()
        for (name, got), want in zip(model.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, msg=name, **roundings(1000, 10))


def test_attention_weights_are_the_stock_code_s(encoder, inputs):
    stock = copy.deepcopy(encoder)
    for each in (encoder, stock):
        each.set_attn_implementation("eager")
    with ticketops.patch(encoder) as handle:
        got, want = (each(**inputs, output_attentions=True).attentions for each in (encoder, stock))
        assert len(got) == LAYERS
        torch.testing.assert_close(got, want, **close)
        handle.apply(TICKETS["neither"])
        with pytest.raises(UnsupportedError, match=r"output_attentions.*ignore the applied ticket"):
            encoder(**inputs, output_attentions=True)


@pytest.mark.parametrize(
    "name",
    [
        "EuroBertForTokenClassification",
        "DebertaV2ForTokenClassification",
        "ModernBertForMaskedLM",
        "MPNetForTokenClassification",
        "NomicBertForSequenceClassification",
        "RobertaForSequenceClassification",
        "ViTForImageClassification",
    ],
)
def test_onnx_equals_masked(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from ticketops.models.onnx import run_onnx

    model = make(name)
    batch, stock = draw(model), masked(copy.deepcopy(model), TICKETS["neither"])
    if "input_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    folder = ticketops.export(model, tmp_path / "out", "onnx", ticket=TICKETS["neither"])
    for rows in (4, 1):
        some = {key: value[:rows] for key, value in batch.items()}
        torch.testing.assert_close(run_onnx(folder, some)["logits"], stock(**some).logits, **roundings(1000))


@pytest.mark.parametrize("processed", [True, False])
def test_an_export_of_images_is_verified_on_photographs(processed, tmp_path):
    model = make("ViTForImageClassification")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}) if processed else None
    folder = ticketops.export(model, tmp_path / "out", ticket=TICKETS["uneven"], tokenizer=processor)
    assert (folder / "preprocessor_config.json").is_file() == processed
    assert "compared with the model that it was made from on photographs" in (folder / "README.md").read_text()
    try:
        again = release(folder, tmp_path / "again", "dense")
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert (again / "preprocessor_config.json").is_file() == processed


def test_images_of_another_size_and_masks():
    model = make("ViTForImageClassification")
    stock, pixels = copy.deepcopy(model), torch.randn(2, 3, 48, 32)
    with ticketops.patch(model) as handle:
        given = {"pixel_values": pixels, "interpolate_pos_encoding": True}
        torch.testing.assert_close(model(**given).logits, stock(**given).logits, **close)
        given["attention_mask"] = torch.arange(25) < torch.tensor([[25], [9]])
        torch.testing.assert_close(model(**given).logits, stock(**given).logits, **close)
        handle.apply(TICKETS["neither"])
        with pytest.raises(UnsupportedError, match=r"an attention_mask of images.*ignore the applied ticket"):
            model(**given)


@pytest.mark.parametrize("name", TEXT)
def test_the_longest_row_is_known(name):
    model = make(f"{name}Model")
    longest = positions(model)
    assert model(torch.full((1, longest), 7)).last_hidden_state.shape[1] == longest
    if getattr(find_adapter(model)[0].embeddings(model), "position_embeddings", None) is None:
        # Other kinds of positions have no table that ends; the configuration says what they were trained for.
        assert longest == model.config.max_position_embeddings
        return
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_real_digits_are_learned_scored_pruned_and_exported(tmp_path):
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    pixels, labels = nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear"), torch.from_numpy(digits.target)
    model = make("ViTForImageClassification", image_size=16, patch_size=4, num_channels=1, num_labels=10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with ticketops.patch(model) as handle:
        for step in range(60):
            rows = slice(64 * (step % 25), 64 * (step % 25) + 64)
            optimizer.zero_grad()
            model(pixels[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
        with handle.record_importance() as importance:
            model(pixels[:64], labels=labels[:64]).loss.backward()
        ticket = ticketops.prune(importance, sparsity=0.35)
        assert (model(pixels[1600:]).logits.argmax(1) == labels[1600:]).float().mean() > 0.6
        want = handle.apply(ticket).model(pixels[1600:]).logits
        folder = ticketops.export(model, tmp_path / "out", ticket=ticket)
    assert (ticket.heads_pruned, ticket.ffns_pruned) == (4, 1)
    torch.testing.assert_close(ticketops.load(folder)(pixels[1600:]).logits, want, **close)

"""What is said of a model from its configuration alone: how it is served, or precisely why not."""

import re

import pytest
import transformers

import ticketops
from models.conftest import tiny_config
from models.test_shrink import TICKETS
from ticketops.errors import InputError, UnsupportedError
from ticketops.models import describe, registry
from ticketops.models.registry import ADAPTERS
from ticketops.searching.setting import load_config


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.base.__name__)
def test_every_encoder_is_described(adapter):
    facts = describe(adapter.base.config_class())
    assert facts["adapter"] == facts["architecture"] == adapter.base.__name__
    assert facts["heads"] * facts["head_size"] == facts["hidden_size"]
    assert (facts["activation"] in ("gelu", "silu"), facts["ffns_left"]) == (True, facts["layers"])
    assert {row["op"] for row in facts["backends"]} >= {"attention", "ffn"}


def test_an_architecture_that_transformers_does_not_have_yet(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gte", "architectures": ["GteModel"]}')
    found = registry.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name.endswith(".gte") else found(name))
    for load in (ticketops.load, load_config):
        with pytest.raises(
            UnsupportedError, match=rf"{re.escape(transformers.__version__)} has no Gte.*5\.18 or later"
        ):
            load(str(tmp_path))


def test_a_model_with_code_of_its_own_is_refused_with_the_remedy():
    kind = type("ModernBertModel", (transformers.PreTrainedModel,), {"__module__": "transformers_modules.own"})
    kind.config_class = transformers.ModernBertConfig
    with pytest.raises(UnsupportedError, match="load it without trust_remote_code"):
        ticketops.patch(kind(transformers.ModernBertConfig()))


def test_no_weight_is_allocated():
    # Petabytes, if it were made.
    config = transformers.BertConfig(hidden_size=2**20, num_attention_heads=2**10, intermediate_size=2**22)
    assert describe(config)["head_size"] == 1024


def test_the_class_that_the_configuration_names_and_what_it_removed(model, tmp_path):
    ticketops.shrink(model, TICKETS["neither"]).save_pretrained(tmp_path)
    facts = describe(transformers.AutoConfig.from_pretrained(tmp_path))
    assert facts["architecture"] == "BertForSequenceClassification"
    assert (facts["heads_left"], facts["ffns_left"], facts["neurons_left"], facts["neurons"]) == (6, 1, 64, 64)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("Albert", "one layer's weights serve all layers"),
        ("Bart", "encoder with a decoder"),
        ("Deberta", "relative position terms in the attention scores, of which only MPNet's and DeBERTa-v2's adapters"),
        ("FNet", "Fourier"),
        ("GPT2", "decoder, whose attention is causal"),
        ("Longformer", "window"),
        ("ResNet", "no attention layers"),
        ("RoFormer", "rotary"),
        ("Splinter", "CONTRIBUTING"),
        ("RobertaPreLayerNorm", "RobertaPreLayerNormModel is not supported: it has LayerNorm before"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(config, words):
    with pytest.raises(UnsupportedError, match=words) as error:
        describe(getattr(transformers, f"{config}Config")())
    assert "\n" not in str(error.value)
    assert "ticketops serves BertModel" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        *((kind, {"is_decoder": True}, "is_decoder") for kind in ("Electra", "Ernie", "XLMRoberta")),
        ("Roberta", {"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
        ("DistilBert", {"chunk_size_feed_forward": 4}, "chunk_size_feed_forward=4"),
        ("DistilBert", {"activation": "mish"}, "activation Mish"),
        ("EuroBert", {"num_attention_heads": 12, "num_key_value_heads": 4}, "num_key_value_heads=4 for num_attention"),
        ("DebertaV2", {"attention_head_size": 32}, "attention_head_size=32"),
        ("DebertaV2", {"conv_kernel_size": 3, "num_hidden_layers": 1}, "conv_kernel_size=3 with one layer"),
        ("MPNet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets=64"),
        ("ModernBert", {"hidden_activation": "mish"}, "activation Mish"),
        ("Bert", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
    ],
)
def test_configurations_are_refused_with_the_reason(kind, changes, words):
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with pytest.raises(UnsupportedError, match=words):
        describe(getattr(transformers, f"{kind}Config")(**changes))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**6}, {"hidden_size": 50, "num_attention_heads": 4}])
def test_configurations_of_no_model_are_refused(changes):
    with pytest.raises(InputError, match=r"config\.json"):
        describe(tiny_config(**changes))

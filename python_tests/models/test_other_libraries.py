"""Models that other libraries have quantized, adapted or offloaded: refused at once, with the remedy."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_batch, tiny_config
from models.test_apply import draw_ticket
from ticketops.errors import UnsupportedError


class Int8Tensor(torch.Tensor):
    """As a quantization library's: a tensor subclass as the weight of a plain linear layer."""


def quantized_weight(model):
    linear = model.bert.encoder.layer[1].output.dense
    linear.weight = nn.Parameter(torch.zeros(48, 64).as_subclass(Int8Tensor), requires_grad=False)
    return model


class Linear4bit(nn.Linear):
    """As bitsandbytes' and as adapters': a linear layer's subclass in its place."""


def another_class(model):
    model.bert.encoder.layer[1].attention.self.query = Linear4bit(48, 48)
    return model


class Wrapper(nn.Module):
    """As PEFT's wrapper of a model whose adapters are in its layers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.peft_config = model, {}

    def merge_and_unload(self):
        return self.model


class PromptWrapper(nn.Module):
    """As PEFT's wrapper of a model with learned prompts in front."""

    def __init__(self, model):
        super().__init__()
        self.model, self.peft_config = model, {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized_weight, "layer 1 has a .*Int8Tensor as the weight of its fc2.*: undo quantization before patching"),
        (another_class, "layer 1 has a .*Linear4bit as its query.*: merge adapters and undo quantization"),
        (Wrapper, "Wrapper is not a transformers model: merge its adapters first, model = model.merge_and_unload()"),
        (PromptWrapper, "PromptWrapper is not a transformers model: patch the model inside, model.get_base_model()"),
        (lambda model: cpu_offload(model, execution_device="cpu"), "accelerate moves .*: load the whole model on one"),
    ],
)
def test_what_other_libraries_make_of_a_model_is_refused_with_the_remedy(change, words):
    model = change(BertForSequenceClassification(tiny_config()))
    with pytest.raises(UnsupportedError, match=words.replace("()", r"\(\)")) as error:
        ticketops.patch(model)
    assert "\n" not in str(error.value)


def test_offload_of_a_patched_model_is_refused_where_it_would_ignore_a_ticket():
    model = BertForSequenceClassification(tiny_config()).eval()
    stock, handle = copy.deepcopy(model), ticketops.patch(model)
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(**tiny_batch()).logits, stock(**tiny_batch()).logits)
    handle.apply(draw_ticket(0))
    with pytest.raises(UnsupportedError, match="take the ticket off"):
        model(**tiny_batch())

"""Every task head of every encoder, on real text or images: masked == shrunk == loaded == dense == ONNX, elsewhere.

Elsewhere is a process that never saw the original: one that imports ticketops for the compact folders, one that does
not for the dense ones, one without torch for ONNX.
"""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizerFast

import ticketops
from models.test_encoders import MODELS, make, masked
from models.test_shrink import close
from ticketops.models.inputs import SENTENCES
from ticketops.models.registry import find_adapter
from ticketops.tickets import Ticket

# A layer without heads and with some neurons, one with nothing left, an uneven one without its FFN.
TICKET = Ticket(
    torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool(),
    torch.tensor([1, 0, 0]).bool(),
    neuron_mask=torch.arange(64).expand(3, -1) % 3 > 0,
)
ONNX = [
    name
    for name in MODELS
    if name.startswith("BertFor") or name.endswith(("SequenceClassification", "ImageClassification"))
]

TRANSFORMERS = """
import json, sys
{imports}
import torch, transformers
from safetensors.torch import save_file

found = {{}}
for case in json.load(open(sys.argv[1])):
    batch = {{name: torch.tensor(value) for name, value in case["batch"].items()}}
    names = [case["name"]]
    names += ["AutoModel" + head for head in ("ForSequenceClassification", "ForImageClassification")
              if case["name"].endswith(head)]
    for name in names:
        model = getattr(transformers, name).from_pretrained(case["folder"])
        assert type(model).__name__ == case["name"] and not model.training
        with torch.no_grad():
            outputs = model(**batch)
        found |= {{f"{{case['name']}} {{key}}": value.clone(memory_format=torch.contiguous_format)
                  for key, value in outputs.items()
                  if isinstance(value, torch.Tensor)}}
assert ("ticketops" in sys.modules) == bool({imports!r})
save_file(found, sys.argv[2])
"""
RUNTIME = """
import json, sys
import numpy, onnxruntime
from safetensors.numpy import save_file

found = {}
for case in json.load(open(sys.argv[1])):
    session = onnxruntime.InferenceSession(case["folder"] + "/model.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64}
    inputs = {node.name: numpy.array(case["batch"][node.name], types[node.type]) for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    found |= {f"{case['name']} {key}": value for key, value in zip(names, session.run(names, inputs))}
assert not {"torch", "transformers", "ticketops"} & set(sys.modules)
save_file(found, sys.argv[2])
"""


def tokenizer_of(model):
    """One that knows every word of the sentences, and pads with the model's own padding id."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(model.config.pad_token_id, special.pop(0))
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES).lower())))
    assert len(special + words) <= model.config.vocab_size
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(special + words)})


def at_tokens(outputs, mask):
    """What stands at padding means nothing."""
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if mask is None:
        return found
    return {name: value[mask] if value.shape[: mask.ndim] == mask.shape else value for name, value in found.items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "names", "script", "tolerance"),
    [
        ("compact", MODELS, TRANSFORMERS.format(imports="import ticketops"), close),
        ("dense", MODELS, TRANSFORMERS.format(imports=""), close),
        ("onnx", ONNX, RUNTIME, {"rtol": 1e-4, "atol": 1e-4}),
    ],
)
def test_exports_compute_elsewhere_what_masks_compute_here(format, names, script, tolerance, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    cases, wanted = [], {}
    for name in names:
        model = make(name)
        if model.main_input_name == "pixel_values":
            tokenizer, batch = None, find_adapter(model)[0].inputs.sample(model, None)
        else:
            tokenizer = tokenizer_of(model)
            batch = dict(tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=24, return_tensors="pt"))
            assert (batch["input_ids"] != tokenizer.unk_token_id).all()
        if model.config.model_type in ("distilbert", "eurobert", "modernbert", "mpnet"):
            del batch["token_type_ids"]
        if name.endswith("ForMultipleChoice"):
            batch = {key: value[None] for key, value in batch.items()}
        folder = ticketops.export(model, tmp_path / name, format, ticket=TICKET, tokenizer=tokenizer)
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        with torch.no_grad():
            wanted[name] = mask, at_tokens(masked(copy.deepcopy(model), TICKET)(**batch), mask)
            shrunk = at_tokens(ticketops.shrink(model, TICKET)(**batch), mask)
        torch.testing.assert_close(shrunk, wanted[name][1], **close)
        inputs = {key: value.tolist() for key, value in batch.items()}
        cases.append({"name": name, "folder": str(folder), "batch": inputs})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    arguments = [sys.executable, "-c", script, tmp_path / "cases.json", tmp_path / "outputs.safetensors"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    for name, (mask, want) in wanted.items():
        got = {key.split()[1]: value for key, value in found.items() if key.split()[0] == name}
        torch.testing.assert_close(
            at_tokens(got, mask), want, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )

"""Damaged and hostile folders: 1,500 of them, of a fixed seed, each refused in one line or loaded as the same model."""

import json
import os
import random
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_config
from models.test_encoders import make
from models.test_shrink import TICKETS
from ticketops.errors import InputError, UnsupportedError

JUNK = [-1, 0, 1, True, 10**18, 10**4000, 1.5, 1e308, "", "../../etc/passwd", "0", [], {}, [0], {"0": 0}, None]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(hidden_size=16, intermediate_size=16))
    ticket = ticketops.Ticket(
        TICKETS["neither"].head_mask,
        TICKETS["neither"].ffn_mask,
        neuron_mask=torch.arange(16).expand(3, -1) % 3 > 0,
    )
    return ticketops.export(model, tmp_path_factory.mktemp("good") / "out", ticket=ticket)


@pytest.fixture
def sealed(good, tmp_path):
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def bad(sealed):
    """Without the checksums, which would tell any change, so that what comes after them is tested."""
    (sealed / "ticketops.json").unlink()
    return sealed


def refuse(folder):
    """Asserts that a folder is refused in one short line; returns it."""
    with pytest.raises((InputError, UnsupportedError)) as caught:
        ticketops.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    return str(caught.value)


def load_or_refuse(folder):
    """Returns the model, or None where the folder is refused in one short line."""
    try:
        return ticketops.load(folder)
    except (InputError, UnsupportedError) as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 800  # noqa: PT017
        return None


def header(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(text, data):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_damaged_weights_are_refused(sealed, good):
    """500 files, cut short or with flipped bits anywhere: the export's checksum knows each."""
    draw, data, tried = random.Random(0), (good / "model.safetensors").read_bytes(), 0
    for number in range(500):
        content = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if number % 4 == 0:
            del content[draw.randrange(len(content)) :]
        if bytes(content) != data:
            (sealed / "model.safetensors").write_bytes(content)
            refuse(sealed)
            tried += 1
    assert tried > 490
    print(f"{tried} damaged files of weights refused")


def test_forged_headers_are_refused(bad, good):
    """500 headers that a forger could write, without the checksum that would give them away."""
    draw, (head, data), counts = random.Random(1), header((good / "model.safetensors").read_bytes()), [0, 0]
    names = [name for name in head if name != "__metadata__"]
    dtypes = ["F64", "I64", "BOOL", "F8_E4M3", "U8", "F16", "BF16", "nonsense", 5, None]
    for _ in range(500):
        changed = json.loads(json.dumps(head))
        entry = changed[draw.choice(names)]
        kind = draw.randrange(5)
        if kind == 0:
            entry["dtype"] = draw.choice(dtypes)
        elif kind == 1:
            entry["shape"] = draw.choice([[], [2**40], [2**31, 2**31], [-1, 3], [0], [*entry["shape"][::-1], 1], "x"])
        elif kind == 2:
            entry["data_offsets"] = draw.choice([[0, 2**62], [-4, 0], [4, 0], [0, 4], ["a", "b"], [0]])
        elif kind == 3:
            one, other = draw.sample(names, 2)
            changed[one], changed[other] = changed[other], changed[one]
        else:
            changed[draw.choice(["../evil", "a" * 10**5, "", "\u0000", "bert"])] = changed.pop(draw.choice(names))
        (bad / "model.safetensors").write_bytes(with_header(changed, data))
        # Two tensors of one shape may change places: that is another model, and a sound one.
        counts[load_or_refuse(bad) is not None] += 1
    assert sum(counts) == 500
    assert counts[0] > 400
    print(f"500 forged headers: {counts[0]} refused, {counts[1]} sound")


def test_headers_that_lie_about_their_length_are_refused(bad, good):
    head, data = header((good / "model.safetensors").read_bytes())
    text = json.dumps(head).encode()
    for content in (
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + text + data,
        struct.pack("<Q", len(text) + 10**6) + text + data,
        with_header(b"[" * 10**6, data),
        with_header(b'{"a":' * 10**5, data),
        # The same name twice, first with the true shape.
        with_header(text[:-1] + b"," + text[1:], data),
        with_header(b"not json", data),
        data,
        with_header(text, data) + b"more",
        with_header(text, data[:-1]),
    ):
        (bad / "model.safetensors").write_bytes(content)
        assert load_or_refuse(bad) is None or content.count(text[1:]) == 1


def test_hostile_configurations_are_refused(bad, good):
    """Every key of config.json with each value of a list of junk: what the model hangs on is refused."""
    content = json.loads((good / "config.json").read_text())
    want = ticketops.load(good).state_dict()
    structure = {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "ticketops", "architectures"}
    tried = refused = 0
    for key in sorted(set(content) | {"pruned_heads", "auto_map", "quantization_config", "transformers_weights"}):
        for value in JUNK:
            if value == content.get(key) and type(value) is type(content.get(key)):
                continue
            (bad / "config.json").write_text(json.dumps(content | {key: value}))
            model = load_or_refuse(bad)
            tried += 1
            refused += model is None
            assert model is None or key not in structure, (key, value)
            if model is not None:
                assert all(torch.equal(want[name], tensor) for name, tensor in model.state_dict().items())
    assert tried > 400
    print(f"{tried} hostile values in config.json: {refused} refused, the others change no weight")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("null", "NoneType"),
        ('{"architectures": ["Trainer"]}', "names no model class"),
        ("\x00" * 9, "damaged"),
        ("1" * 5000, "larger than any"),
        ('{"layer_norm_eps": NaN}', "not finite"),
        ('{"layer_norm_eps": -Infinity}', "not finite"),
        ('{"layer_norm_eps": 1e999}', "not finite"),
        ('{"vocab_size": 100, "vocab_size": 99}', "'vocab_size' twice"),
        ('{"x": "' + "y" * 2**20 + '"}', "larger than"),
        ('{"hidden_size": 1e6}', "names no model class"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "ticketops.json"])
def test_hostile_json_is_refused(name, text, words, bad):
    (bad / name).write_text(text)
    said = refuse(bad)
    assert words in said or name == "ticketops.json"


def test_what_would_read_other_files_or_run_code_is_refused(bad, good):
    content = json.loads((good / "config.json").read_text())
    for key, value in (
        ("auto_map", {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("transformers_weights", "../other.safetensors"),
    ):
        (bad / "config.json").write_text(json.dumps(content | {key: value}))
        assert f'"{key}"' in refuse(bad)
    (bad / "config.json").write_text(json.dumps(content | {"_attn_implementation": "evil/kernel"}))
    assert ticketops.load(bad).config._attn_implementation in ("sdpa", "eager")
    (bad / "config.json").write_text(json.dumps(content | {"model_type": "evil", "auto_map": {}}))
    refuse(bad)
    (bad / "config.json").write_text(json.dumps(content))
    (bad / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    assert "names another model" in refuse(bad)
    (bad / "adapter_config.json").unlink()
    (bad / "model.safetensors").unlink()
    (bad / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    assert "only safetensors" in refuse(bad)
    assert not os.path.exists("pickled")


def test_hostile_tensors_are_refused(bad, good):
    weights, name = load_file(good / "model.safetensors"), "bert.encoder.layer.0.attention.self.query.weight"
    for changed, words in (
        ({name: torch.zeros(2, 2)}, "which its configuration does not make"),
        ({name: weights[name].long()}, "I64"),
        ({"extra": torch.zeros(1)}, "'extra'"),
    ):
        save_file(weights | changed, bad / "model.safetensors", {"format": "pt"})
        assert words in refuse(bad)
    save_file({key: value for key, value in weights.items() if key != name}, bad / "model.safetensors")
    assert "lack" in refuse(bad)


def test_weights_that_transformers_divides_are_checked_whole(tmp_path):
    """NomicBert's files have q, k and v in one weight, as large as the three together."""
    model = make("NomicBertForSequenceClassification")
    folder = ticketops.export(model, tmp_path / "out", ticket=TICKETS["uneven"])
    (folder / "ticketops.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.2." in name and "Wqkv" in name)
    for wrong in (tensors[name][:-1], tensors[name][:-3], torch.cat([tensors[name]] * 2), tensors[name][:, :-1]):
        save_file(tensors | {name: wrong.contiguous()}, folder / "model.safetensors", {"format": "pt"})
        assert f"Wqkv.weight' is F32 {list(wrong.shape)}" in refuse(folder)
    part = name.replace("encoder.layers", "layers").replace("attn.Wqkv", "self_attn.k_proj")
    save_file(tensors | {part: tensors[name][:12].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert "are one parameter twice" in refuse(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_or_refuse(folder) is not None


def test_hostile_indexes_are_refused(bad, good):
    name = "bert.encoder.layer.0.attention.self.query.weight"
    os.rename(bad / "model.safetensors", bad / "model-00001-of-00001.safetensors")
    index = bad / "model.safetensors.index.json"
    for escape in (
        "../other.safetensors",
        "/etc/passwd",
        5,
        None,
        "model.safetensors",
        "model-00001-of-00002.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": {name: escape}}))
        refuse(bad)
    for content in ({}, {"weight_map": []}, {"weight_map": {}}, [], {"weight_map": {name: {}}}):
        index.write_text(json.dumps(content))
        refuse(bad)
    with open(index, "wb") as file:
        file.truncate(2**40)
    assert "larger than" in refuse(bad)
    names = load_file(bad / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"metadata": {"total_size": 10**12}, "weight_map": weight_map}))
    assert ticketops.load(bad).state_dict().keys() == names.keys()


BOMBS = """
import json, resource, sys, pathlib
import torch, ticketops
from transformers import BertForSequenceClassification

folder = pathlib.Path(sys.argv[1])
ticketops.load(folder)
content = json.loads((folder / "config.json").read_text())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number, bomb in enumerate(json.loads(pathlib.Path(sys.argv[2]).read_text())):
    (folder / "config.json").write_text(json.dumps(content | bomb))
    try:
        ticketops.load(folder)
    except ticketops.errors.InputError as error:
        assert "\\n" not in str(error)
    else:
        raise AssertionError(bomb)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_shape_bombs_allocate_nothing(bad):
    record = {"heads": [[0]] * 1000, "ffns": []}
    huge = 9_999_000
    bombs = [
        {"vocab_size": huge, "hidden_size": huge, "num_attention_heads": 4},
        {"max_position_embeddings": huge, "vocab_size": huge},
        {"num_hidden_layers": 1000, "hidden_size": huge, "num_attention_heads": 1000, "ticketops": record},
        {"num_hidden_layers": 1000, "intermediate_size": huge, "ticketops": None},
        {"num_hidden_layers": huge, "ticketops": None},
        {"num_attention_heads": huge, "hidden_size": huge, "ticketops": None},
        {"type_vocab_size": huge, "num_labels": huge},
    ]
    (bad / "bombs.json").write_text(json.dumps(bombs))
    arguments = [sys.executable, "-c", BOMBS, bad, bad / "bombs.json"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 200_000, f"{grown} KiB of memory"

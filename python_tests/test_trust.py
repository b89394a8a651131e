"""Code that a model's folder brings is never run, and nobody is asked whether it may be."""

import ast
import json
import os
from pathlib import Path

import pytest
from searching.tiny import make_model, make_task
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import ticketops
from ticketops.cli import app

PACKAGE = Path(ticketops.__file__).parent
CODE = """
import pathlib
pathlib.Path(__file__).with_name("RAN").touch()
pathlib.Path({ran!r}).touch()
from transformers import *
class Evil(BertConfig): pass
class EvilTokenizer(BertTokenizerFast): pass
class EvilProcessor(ViTImageProcessor): pass
"""


def test_every_from_pretrained_of_the_package_refuses_code_and_downloads():
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                calls.append(path.name)
                # **LOCAL: local_files_only=True, trust_remote_code=False.
                spread = [getattr(word.value, "id", "") for word in node.keywords if word.arg is None]
                assert "LOCAL" in spread, f"{path}:{node.lineno}"
    assert len(calls) >= 6


@pytest.mark.parametrize(
    ("file", "auto"),
    [
        ("config.json", {"AutoConfig": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.EvilTokenizer", None]}),
        ("preprocessor_config.json", {"AutoImageProcessor": "evil.EvilProcessor"}),
    ],
)
def test_a_folder_with_code_is_refused_by_every_command(file: str, auto: dict, tmp_path: Path):
    ran = tmp_path / "ran"
    if file == "preprocessor_config.json":
        folder = tmp_path / "vit"
        config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ViTForImageClassification(config).save_pretrained(folder)
        (folder / file).write_text('{"image_processor_type": "EvilProcessor"}')
    else:
        folder = make_model(tmp_path / "bert")
    (folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    content = json.loads((folder / file).read_text())
    for key in ("model_type", "tokenizer_class"):
        if key in content:
            content[key] = "evil"
    (folder / file).write_text(json.dumps({**content, "auto_map": auto}))
    commands = [
        ["export", folder, "--output", tmp_path / "out"],
        ["doctor", "--model", folder],
        ["show", folder],
        ["search", "--model", folder, "--task", make_task(tmp_path / "task"), "--output", tmp_path / "run"],
    ]
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command], input="y\n" * 9)
        lines = [line for line in result.stderr.splitlines() if line != "loading model and data"]
        assert result.exit_code == 2, (command, result.output)
        assert len(lines) == 1
        assert f'{file} has "auto_map": it is made for custom code' in lines[0]
        assert "y/N" not in result.output
        assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_what_never_ends_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    folder = make_model(tmp_path / "bert")
    os.mkfifo(folder / "vocab.txt")
    for place in (tmp_path / "pipe", folder):
        for command in (["export", place, "--output", tmp_path / "out"], ["doctor", "--model", place], ["show", place]):
            result = CliRunner().invoke(app, [str(word) for word in command])
            assert result.exit_code == 2, (command, result.output)
            assert len(result.stderr.splitlines()) == 1

import os
from pathlib import Path

import pytest

from ticketops.errors import InputError
from ticketops.searching import SearchConfig
from ticketops.searching.yaml_file import read_yaml


def test_plain_values_are_read_as_they_look(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "rate: 1e-3\nother: 2.5e+3\nhalf: .5\ncount: 5\nminus: -3\nname: 2024-01-01\nquoted: '010'\nzero: 0\n"
        "levels: 0.1,0.3\nseeds: [0, 1]\nflag: true\nnothing:\nboundless: .inf\n"
    )
    assert read_yaml(tmp_path / "a.yaml") == {
        "rate": 1e-3,
        "other": 2500.0,
        "half": 0.5,
        "count": 5,
        "minus": -3,
        "name": "2024-01-01",
        "quoted": "010",
        "zero": 0,
        "levels": "0.1,0.3",
        "seeds": [0, 1],
        "flag": True,
        "nothing": None,
        "boundless": float("inf"),
    }


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "in line 2 the alias *a"),
        ("a: &a {x: 1}\nb: {<<: *a}", "the alias *a"),
        ("epochs: 1\nseeds: 2\nepochs: 3", "in line 3 the key 'epochs' twice"),
        ("a: {b: 1, b: 2}", "the key 'b' twice"),
        *((f"epochs: {number}", f"the number {number}") for number in ("010", "0o17", "0x1F", "0b11", "1:30", "1_000")),
        ("rate: 1:30.5", "the number 1:30.5"),
        ("rate: 1_0.5", "the number 1_0.5"),
        ("[" * 100_000, "lists or mappings in each other"),
        ("a: " + "{b: " * 20, "lists or mappings in each other"),
        ("- " * 1000 + "x", "lists or mappings in each other"),
        ("a: !!python/object/apply:os.system [true]", "the tag tag:yaml.org,2002:python/object"),
        ("a: !!int '010'", "the tag"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: [1", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("? [1, 2]\n: 3", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("x" * (2**20 + 1), "more than 1,048,576 bytes"),
    ],
)
def test_what_has_two_readings_or_grows_is_refused_in_one_line_with_the_file(text: str, words: str, tmp_path: Path):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        SearchConfig.from_yaml(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600


def test_what_is_no_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop", "missing", "", "x" * 300, "/dev/zero"):
        with pytest.raises(InputError, match="configuration file"):
            read_yaml(tmp_path / name)
    (tmp_path / "latin").write_bytes(b"task: caf\xe9")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read_yaml(tmp_path / "latin")

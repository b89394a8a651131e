import errno
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from ticketops.errors import InputError, StoreError
from ticketops.tickets import Importance, Ticket, storage

from .strategies import importances, tickets

Saved = Ticket | Importance
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


NEURON_TENSORS = {"neuron_sums": torch.zeros(2, 3).double(), "neuron_counts": torch.tensor([1, 2])}


def small_ticket() -> Ticket:
    head_mask = torch.tensor([[True, False], [True, True]])
    return Ticket(head_mask, torch.tensor([False, True]), {"kind": "winning", "sparsity": 0.25})


def small_importance() -> Importance:
    importance = Importance(2, 2, "token", metadata={"task": "rte"})
    for layer in range(2):
        importance.add_head(layer, None, torch.tensor([[0.5, 1.5], [layer, 2.0]]))
        importance.add_ffn(layer, None, torch.tensor([1.0, 2.0]))
    return importance


def same(a: Saved, b: Saved) -> bool:
    return a == b and dict(a.metadata) == dict(b.metadata)


@given(made=tickets())
@in_one_folder
def test_a_loaded_ticket_is_the_saved_one(tmp_path: Path, made: Ticket) -> None:
    made.save(tmp_path / "t.safetensors")
    assert same(Ticket.load(tmp_path / "t.safetensors"), made)


@given(made=importances())
@in_one_folder
def test_a_loaded_importance_is_the_saved_one(tmp_path: Path, made: Importance) -> None:
    made.save(str(tmp_path / "i.safetensors"))
    assert same(Importance.load(str(tmp_path / "i.safetensors")), made)


def test_a_loaded_importance_goes_on(tmp_path: Path) -> None:
    whole = Importance(1, 2, sequences_per_example=2)
    parts = [torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[-4.0, 1.0], [1.0, 2.0], [1.0, 1.0], [0.0, 7.0]])]
    first = Importance(1, 2, sequences_per_example=2, metadata={"epoch": 3})
    first.add_head(0, parts[0], None)
    first.save(tmp_path / "i.safetensors")
    loaded = Importance.load(tmp_path / "i.safetensors")
    loaded.add_head(0, parts[1], None)
    for part in parts:
        whole.add_head(0, part, None)
    assert loaded == whole
    assert loaded.metadata == {"epoch": 3}
    assert Importance.load(tmp_path / "i.safetensors") == first


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        small_ticket().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("make", [small_ticket, small_importance])
def test_every_truncation_is_refused(tmp_path: Path, make: Callable[[], Saved]) -> None:
    path, made = tmp_path / "whole", make()
    made.save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        (tmp_path / "part").write_bytes(content[:length])
        with pytest.raises(InputError, match="cannot load the"):
            type(made).load(tmp_path / "part")
    (tmp_path / "part").write_bytes(content + b"\0")
    with pytest.raises(InputError, match="cannot load the"):
        type(made).load(tmp_path / "part")


@pytest.mark.parametrize("make", [small_ticket, small_importance])
@given(flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4))
@settings(parent=in_one_folder, max_examples=200)
def test_damaged_bytes_are_refused(tmp_path: Path, make: Callable[[], Saved], flips: list[tuple[int, int]]) -> None:
    path, made = tmp_path / "damaged", make()
    made.save(path)
    content = bytearray(path.read_bytes())
    for position, change in flips:
        content[position % len(content)] ^= change
    path.write_bytes(content)
    load_or_refuse(path, made)


@pytest.mark.parametrize("make", [small_ticket, small_importance])
def test_every_single_damaged_byte_is_refused(tmp_path: Path, make: Callable[[], Saved]) -> None:
    path, made = tmp_path / "damaged", make()
    made.save(path)
    content = path.read_bytes()
    for position in range(len(content)):
        # One bit, to another letter or digit as often as not, and all bits.
        for change in (1, 255):
            path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
            load_or_refuse(path, made)


def load_or_refuse(path: Path, made: Saved) -> None:
    try:
        loaded = type(made).load(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert same(loaded, made)


@given(content=st.binary(max_size=200))
@in_one_folder
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any").write_bytes(content)
    with pytest.raises(InputError, match="cannot load the ticket"):
        Ticket.load(tmp_path / "any")


def rewritten(path: Path, *, seal: bool = True, tensors: dict[str, Any] | None = None, **changes: Any) -> None:
    """Writes a file that a forger could: everything consistent but for the one thing under test."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    description = json.loads(header["__metadata__"]["ticketops"]) | changes
    tensors = {**from_safetensors(content), **(tensors or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if seal:
        del description["sha256"]
        description["sha256"] = storage._seal(description, tensors)
    path.write_bytes(to_safetensors(tensors, {"ticketops": json.dumps(description)}))


def test_a_file_rewritten_without_a_change_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "t"
    small_ticket().save(path)
    rewritten(path)
    assert same(Ticket.load(path), small_ticket())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "ticketops.importance"}, "does not say that it holds a ticket"),
        ({"format": None}, "does not say that it holds a ticket"),
        ({"version": 2}, "format version 2, this ticketops reads 1"),
        ({"version": "1"}, "format version '1'"),
        ({"fields": {"metadata": {"kind": "losing"}}, "seal": False}, "checksum"),
        ({"fields": {"metadata": [1]}}, "metadata is list"),
        ({"fields": {}}, "not a ticket"),
        ({"fields": None}, "not a ticket"),
        ({"tensors": {"extra": torch.zeros(1)}}, "tensors"),
        ({"tensors": {"neuron_mask": torch.zeros(2, 4)}}, "tensors"),
        ({"tensors": {"neuron_mask": torch.ones(3, 4, dtype=torch.bool)}}, r"neuron_mask \[3, 4\]"),
        ({"tensors": {"ffn_mask": None}}, "tensors"),
        ({"tensors": {"ffn_mask": torch.ones(2)}}, "tensors"),
        ({"tensors": {"ffn_mask": torch.ones(2, 1, dtype=torch.bool)}}, "tensors"),
        ({"tensors": {"ffn_mask": torch.ones(3, dtype=torch.bool)}}, r"ffn_mask \[3\]"),
        ({"tensors": {"ffn_mask": torch.ones(0, dtype=torch.bool)}}, r"ffn_mask \[0\]"),
        ({"tensors": {"ffn_mask": torch.tensor([1, 3], dtype=torch.uint8).view(torch.bool)}}, "other than 0 and 1"),
    ],
)
def test_a_forged_ticket_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "t"
    small_ticket().save(path)
    rewritten(path, **changes)
    with pytest.raises(InputError, match=message):
        Ticket.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"granularity": "word", "sequences_per_example": 1, "metadata": {}}}, "granularity 'word'"),
        (
            {"fields": {"granularity": "batch", "sequences_per_example": 0, "metadata": {}}},
            "per_example is 0",
        ),
        ({"fields": {"granularity": "batch", "sequences_per_example": 1, "metadata": 5}}, "not a"),
        ({"fields": {"layers": 3}}, "not a"),
        ({"tensors": {"ffn_sums": torch.zeros(3, dtype=torch.float64)}}, "do not fit each other"),
        ({"tensors": {"head_counts": torch.tensor([1, 2, 3])}}, "do not fit each other"),
        ({"tensors": {"head_counts": torch.tensor([1, -2])}}, "do not fit each other"),
        ({"tensors": {"head_sums": torch.zeros(2, 2)}}, "tensors"),
        ({"tensors": {"neuron_counts": torch.tensor([1, 2])}}, "tensors"),
        ({"tensors": NEURON_TENSORS | {"neuron_counts": torch.tensor([1, -2])}}, "do not fit each other"),
        ({"tensors": NEURON_TENSORS | {"neuron_sums": torch.zeros(2, 0).double()}}, "neurons is 0"),
        ({"tensors": {"head_sums": torch.zeros(2, 0, dtype=torch.float64)}}, "heads is 0"),
    ],
)
def test_a_forged_importance_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "i"
    small_importance().save(path)
    rewritten(path, **changes)
    with pytest.raises(InputError, match=message):
        Importance.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", '{"x": ' + "9" * 5000 + "}", "null", ""])
def test_hostile_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_bytes(to_safetensors({"head_mask": torch.ones(1, 1)}, {"ticketops": text}))
    with pytest.raises(InputError, match="cannot load the ticket"):
        Ticket.load(tmp_path / "t")


def test_other_files_are_refused(tmp_path: Path) -> None:
    small_importance().save(tmp_path / "importance")
    with pytest.raises(InputError, match="does not say that it holds a ticket"):
        Ticket.load(tmp_path / "importance")
    (tmp_path / "weights").write_bytes(to_safetensors({"w": torch.ones(1)}, {"format": "pt"}))
    with pytest.raises(InputError, match="does not say that it holds a ticket"):
        Ticket.load(tmp_path / "weights")
    torch.save({"head_mask": torch.ones(1)}, tmp_path / "pickle")
    with pytest.raises(InputError, match="damaged or not a ticket"):
        Ticket.load(tmp_path / "pickle")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="1099511627776 bytes are too many"):
        Ticket.load(tmp_path / "huge")


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Ticket.load(tmp_path / "missing")
    with pytest.raises(InputError, match="not a file"):
        Ticket.load(tmp_path)
    with pytest.raises(InputError, match="not a file"):
        Ticket.load("/dev/zero")
    with pytest.raises(InputError, match="cannot load"):
        Ticket.load(tmp_path / ("x" * 5000))


def test_too_much_metadata_is_refused_when_saving(tmp_path: Path) -> None:
    full = Ticket.full(1, 1)
    talkative = Ticket(full.head_mask, full.ffn_mask, {"text": "x" * storage.MAX_BYTES})
    with pytest.raises(InputError, match="shorten its metadata"):
        talkative.save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_importance_metadata_that_is_not_json_is_refused_when_saving(tmp_path: Path) -> None:
    importance = small_importance()
    importance.metadata["x"] = object()
    with pytest.raises(InputError, match="metadata must be JSON"):
        importance.save(tmp_path / "i")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    small_ticket().save(path)

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="disk is full"):
        Ticket.full(2, 2).save(path)
    assert same(Ticket.load(path), small_ticket())
    assert list(tmp_path.iterdir()) == [path]


# One that lands in a destructor is swallowed, as Python does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_reading_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "ticket.safetensors"
    Ticket.full(2, 3).save(path)
    outcomes, left = [type(Ticket.load(path))], -1

    def interrupt(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    # Ctrl-C at every call that Python makes or serves on the way, until there is none left.
    while left < 0:
        left = len(outcomes)
        sys.setprofile(interrupt)
        try:
            outcomes.append(type(Ticket.load(path)))
        except BaseException as error:
            outcomes.append(type(error))
        finally:
            sys.setprofile(None)
    assert len(outcomes) > 100
    assert set(outcomes) == {KeyboardInterrupt, Ticket}

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ticketops.tasks import SequenceTask, load_task, tokenize, tokenized_splits
from ticketops.tasks import kept_rows as module

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"]
TASKS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"sentence": f"a {word} c", "label": n % 2} for n, word in enumerate(WORDS[4:])],
    "entities": [{"tokens": ["a", word], "ner_tags": ["O", "B-X"]} for word in WORDS[4:]],
    "choices": [
        {"question": f"a {word}", "ending0": f"a {word} b", "ending1": f"c {word}", "label": n % 2}
        for n, word in enumerate(WORDS[4:])
    ],
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", model_max_length=32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TICKETOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def task_of(folder: Path, kind: str = "classification") -> Any:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TASKS[kind]))
    return load_task(path)


def contents(splits: dict[str, datasets.Dataset]) -> dict[str, Any]:
    return {split: (rows.features, rows.to_dict()) for split, rows in splits.items()}


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("rows are tokenized again")


@pytest.mark.parametrize("kind", TASKS)
def test_rows_are_tokenized_once_and_mapped(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    task = task_of(tmp_path, kind)
    wanted = {
        split: tokenize(rows, task, tokenizer, 16, split != "train")
        for split, rows in (("train", task.train), ("validation", task.validation))
    }
    first = tokenized_splits(task, tokenizer, 16)
    assert all(rows.cache_files for rows in first.values())
    monkeypatch.setattr(module, "tokenize", refuse)
    # As in another process: the task is read anew, and the tokenizer has been used in between.
    tokenizer("a b c", truncation=True, max_length=3)
    again = tokenized_splits(task_of(tmp_path, kind), tokenizer, 16)
    assert contents(wanted) == contents(first) == contents(again)
    assert all(rows.cache_files for rows in again.values())


def test_other_rows_lengths_vocabularies_and_tasks_have_files_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path
):
    task = task_of(tmp_path)
    fewer = dataclasses.replace(task, train=task.train.select(range(5)))
    other = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace('"a"', '"z"'))
    renamed = PreTrainedTokenizerFast(tokenizer_object=other, pad_token="[PAD]", model_max_length=32)
    variants = [(task, tokenizer, 16), (task, tokenizer, 4), (fewer, tokenizer, 16), (task, renamed, 16)]
    for variant in variants:
        assert contents(tokenized_splits(*variant)) == contents(tokenized_splits(*variant))
    assert len(list(cache.iterdir())) == len(variants)


@pytest.mark.parametrize(
    "harm", ["flipped", "short", "empty", "gone", "pipe", "no note", "another note", "broken note"]
)
def test_damaged_rows_are_made_again(harm: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path):
    task = task_of(tmp_path)
    wanted = contents(tokenized_splits(task, tokenizer, 16))
    (file,) = cache.glob("*/train.arrow")
    note, content = file.with_suffix(".json"), file.read_bytes()
    if harm == "flipped":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif harm in ("short", "empty"):
        file.write_bytes(content[:-50] if harm == "short" else b"")
    elif harm in ("gone", "pipe"):
        file.unlink()
        if harm == "pipe":
            os.mkfifo(file)
    elif harm == "no note":
        note.unlink()
    else:
        note.write_text(json.dumps({"sha256": "0"}) if harm == "another note" else "{")
    assert contents(tokenized_splits(task, tokenizer, 16)) == wanted
    assert contents(tokenized_splits(task, tokenizer, 16)) == wanted


def test_without_a_place_to_write_rows_stay_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    task = task_of(tmp_path)
    wanted = contents(tokenized_splits(task, tokenizer, 16))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TICKETOPS_CACHE", str(tmp_path / "file"))
    assert contents(tokenized_splits(task, tokenizer, 16)) == wanted
    monkeypatch.setenv("TICKETOPS_CACHE", str(tmp_path / "full"))

    def full(*_: Any, file: Path | None = None, **__: Any) -> datasets.Dataset:
        if file is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return tokenize(*_, **__)

    monkeypatch.setattr(module, "tokenize", full)
    assert contents(tokenized_splits(task, tokenizer, 16)) == wanted


def test_tasks_in_python_are_encoded_every_time(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path):
    class Own(SequenceTask):
        word = "b"

        def encode(self, batch: Any, *arguments: Any) -> dict[str, Any]:
            return super().encode({**batch, "sentence": [self.word for _ in batch["sentence"]]}, *arguments)

    plain = task_of(tmp_path)
    own = Own(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    assert tokenized_splits(own, tokenizer, 16)["train"][0]["input_ids"] == [2, 5, 3]
    Own.word = "c"
    assert tokenized_splits(own, tokenizer, 16)["train"][0]["input_ids"] == [2, 6, 3]
    assert not cache.exists()


def test_the_oldest_rows_make_room(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    task = task_of(tmp_path)
    tokenized_splits(task, tokenizer, 16)
    (first,) = cache.iterdir()
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(module, "MOST_BYTES", 2.5 * size)
    tokenized_splits(task, tokenizer, 15)
    (second,) = {*cache.iterdir()} - {first}
    os.utime(second, (0, 0))
    os.utime(first, (1, 1))
    # Its use makes it the newest one.
    tokenized_splits(task, tokenizer, 16)
    tokenized_splits(task, tokenizer, 14)
    assert first.exists()
    assert not second.exists()
    assert len(list(cache.iterdir())) == 2

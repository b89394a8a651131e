"""Token classification: finds named entities by tags of words, such as B-PER, I-PER and O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from ticketops.errors import InputError, shown
from ticketops.tasks.columns import Files, Table, check_text
from ticketops.tasks.losses import ClassWeights, WeightedLoss, balanced_weights, read_weights
from ticketops.tasks.metrics import entity_counts, entity_scores
from ticketops.tasks.task import Task, check_fast
from ticketops.text import count

#: Accepted names of the column of words and of the column of their tags.
TOKEN_COLUMNS = ((("tokens",),), (("words",),))
TAG_COLUMNS = tuple(((name,),) for name in ("ner_tags", "tags", "ner", "labels", "label"))
# B begins an entity, I goes on, E or L ends it, S or U is one of a single word.
_PREFIXES = "BIELSU"
# What the loss leaves out, by its convention in torch and transformers.
_IGNORED = -100


@dataclass(frozen=True, eq=False)
class EntityTask(Task):
    """Named entities: the rows have a list of words in one text column, and in `label` a tag id for each word.

    The first token of a word predicts its tag. Words beyond `max_length`, and words of which the tokenizer leaves
    nothing, count as answered by O.
    """

    head: ClassVar[str] = "AutoModelForTokenClassification"
    gives_words: ClassVar[bool] = True
    takes_functions: ClassVar[bool] = True

    @property
    def num_labels(self) -> int:
        """Number of tags."""
        return len(self.labels)

    def loss_function(self, class_weights: ClassWeights | None) -> WeightedLoss | None:
        """Weighs tags; balanced by how many words have each."""
        if class_weights is None:
            return None
        tags = np.concatenate([np.asarray(row, np.int64) for row in self.train["label"][:]])
        return WeightedLoss(read_weights(class_weights, self.labels, balanced_weights(tags, self.num_labels)))

    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Tokenizes words; `labels` is the tag id at a word's first token, else -100. With `scored` also `words`, the
        number of the word that each token begins, else -1."""
        check_fast(tokenizer, self)
        (column,) = self.columns
        tokens = tokenizer(
            [list(words) for words in batch[column]], is_split_into_words=True, truncation=True, max_length=max_length
        )
        first = [_first_tokens(tokens.word_ids(row)) for row in range(len(indices))]
        labels = [
            [tags[word] if word >= 0 else _IGNORED for word in words]
            for words, tags in zip(first, batch["label"], strict=True)
        ]
        return {**tokens, "labels": labels, **({"words": first} if scored else {})}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pads labels with -100."""
        return DataCollatorForTokenClassification(tokenizer)

    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores the entities that logits [rows, tokens, num_labels] mark."""
        tags, predicted = self._tags(logits, inputs, rows)
        return {**entity_scores(tags, predicted), **self.own_scores(tags, predicted)}

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray | None:
        """Right, predicted and true entities of each row, [rows, 3]; None for a metric of the user's own."""
        return None if self.metric in self.functions else entity_counts(*self._tags(logits, inputs, rows))

    def _tags(
        self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset
    ) -> tuple[list[list[str]], list[list[str]]]:
        """The right and the predicted tag of each word."""
        self.check_finite(logits)
        best = logits.argmax(axis=-1)
        tags, predicted = [], []
        for row, (words, right) in enumerate(zip(inputs["words"][:], rows["label"][:], strict=True)):
            answers = ["O"] * len(right)
            for place, word in enumerate(words):
                if word >= 0:
                    answers[word] = self.labels[best[row, place]]
            tags.append([self.labels[tag] for tag in right])
            predicted.append(answers)
        return tags, predicted

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score of O for every word: 0, but by a metric of the user's own."""
        if self.metric not in self.functions:
            return 0.0
        rows = (self.validation if split is None else split)["label"][:]
        tags = [[self.labels[tag] for tag in right] for right in rows]
        return self.own_scores(tags, [["O"] * len(right) for right in rows])[self.metric]


def _first_tokens(word_ids: Sequence[int | None]) -> list[int]:
    """For each token, the number of the word that it begins; -1 for other tokens."""
    return [
        word if word is not None and (place == 0 or word != word_ids[place - 1]) else -1
        for place, word in enumerate(word_ids)
    ]


def has_tags(files: Files) -> bool:
    """True if the columns are those of tagged words: lists of words, and a column of tags.

    Args:
        files: the task's files.
    """
    words = any(isinstance(files.peek(name), list) for ((name,),) in TOKEN_COLUMNS)
    return words and any(isinstance(files.peek(name), list) for name in files.answered_by(TAG_COLUMNS))


def load_entities(files: Files) -> EntityTask:
    """Loads tagged words.

    Args:
        files: the task's files.

    Raises:
        InputError: a row's words and tags do not fit, or the tags follow no scheme.
    """
    (text,), (label,) = files.find("text", TOKEN_COLUMNS)[:1], files.find("label", TAG_COLUMNS)
    names = files.class_names(label)
    tables = files.tables([text], label)
    tagged = {split: _tagged(table, text, label, names) for split, table in tables.items()}
    found = {tag for _, tags in tagged.values() for row in tags or () for tag in row}
    # O first, then by kind, and by the places in an entity.
    order = sorted(found | {"O"}, key=lambda tag: (tag != "O", tag[2:], _PREFIXES.find(tag[0])))
    labels = names or tuple(order)
    if len(labels) < 2:
        raise InputError(f"column {label} marks no entity: give words with tags such as B-PER and I-PER")
    ids = {tag: number for number, tag in enumerate(labels)}
    tags_type = datasets.List(datasets.ClassLabel(names=list(labels)))
    splits = {}
    for split, (words, tags) in tagged.items():
        columns = {text: words} | ({"label": [[ids[tag] for tag in row] for row in tags]} if tags is not None else {})
        types = {text: datasets.List(datasets.Value("string")), "label": tags_type}
        splits[split] = datasets.Dataset.from_dict(
            columns, features=datasets.Features({name: types[name] for name in columns})
        )
    metrics = ("entity_f1", "entity_precision", "entity_recall")
    return files.task(EntityTask, splits, kind="token-classification", labels=labels, columns=(text,), metrics=metrics)


def _tagged(
    table: Table, text: str, label: str, names: tuple[str, ...] | None
) -> tuple[list[list[str]], list[list[str]] | None]:
    """Words and tags of each row; None in place of hidden tags."""

    def read_words(value: Any, where: Callable[[], str]) -> list[str]:
        if not isinstance(value, list | tuple) or not value:
            raise InputError(f"{where()}: column {text} holds {shown(value)}: give the list of the row's words")
        return [check_text(word, text, where) for word in value]

    def read_tags(value: Any, where: Callable[[], str]) -> list[str]:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where()}: column {label} holds {shown(value)}: give the list of the words' tags")
        return [_read_tag(tag, label, names, where) for tag in value]

    words = [read_words(value, where) for value, where in table.values(text)]
    if label not in table.columns:
        return words, None
    tags = [read_tags(value, where) for value, where in table.values(label)]
    for row, (one, other) in enumerate(zip(words, tags, strict=True)):
        if len(one) != len(other):
            found = f"{count(len(one), 'word')} with {count(len(other), 'tag')}"
            raise InputError(f"{table.where(row)}: {found}: give a tag for each word")
    return words, tags


def _read_tag(tag: Any, label: str, names: tuple[str, ...] | None, where: Callable[[], str]) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if names is None:
            raise InputError(
                f"{where()}: tag {tag} in column {label} is a number without a name: write tags such as "
                "B-PER, I-PER and O"
            )
        if not 0 <= tag < len(names):
            raise InputError(f"{where()}: tag {tag} in column {label} is none of the {len(names)} named: correct it")
        tag = names[tag]
    if not isinstance(tag, str):
        raise InputError(f"{where()}: tag {shown(tag)} in column {label} is no text: write tags such as B-PER and O")
    tag = tag.strip()
    if tag != "O" and not (tag[:1] and tag[0] in _PREFIXES and (len(tag) == 1 or (tag[1] == "-" and tag[2:]))):
        raise InputError(
            f"{where()}: tag {shown(tag)} in column {label} follows no scheme of entities: write B-PER for the first "
            "word of an entity, I-PER for the next ones and O outside (or IOBES, BILOU)"
        )
    return tag

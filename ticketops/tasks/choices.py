"""Multiple choice: finds the one of several texts that goes with a context, as SWAG, RACE and COPA ask for."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import DataCollatorForMultipleChoice, PretrainedConfig, PreTrainedTokenizerBase

from ticketops.errors import InputError, shown
from ticketops.tasks.columns import Files, Table, check_text, spellings
from ticketops.tasks.formats import Source
from ticketops.tasks.metrics import METRICS
from ticketops.tasks.task import Task
from ticketops.text import count

#: Accepted names of the columns of a context and, where there are two, of what begins each choice.
CONTEXT_COLUMNS = (
    (
        ("sent1", "sent2"),
        ("article", "question"),
        ("context", "question"),
        ("premise", "question"),
        ("premise",),
        ("ctx",),
        ("context",),
        ("question",),
        ("goal",),
        ("sentence",),
        ("text",),
    ),
)
CHOICE_COLUMNS = ("choices", "endings", "options")
ANSWER_COLUMNS = tuple(((name,),) for name in ("label", "answer", "answerkey", "answer_key"))
# Columns of one choice each: ending0, choice1, optionA, sol1.
_NUMBERED = re.compile(r"(ending|choice|option|answer|sol)[-_ ]?([0-9]|[a-h])", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ChoiceTask(Task):
    """Multiple choice: the rows have a context, perhaps a text that begins every choice, a list of choices in the last
    text column, and in `label` the number of the right one."""

    head: ClassVar[str] = "AutoModelForMultipleChoice"
    takes_functions: ClassVar[bool] = True

    @property
    def num_labels(self) -> int:
        """Number of choices of every row."""
        return len(self.train[0][self.columns[-1]])

    @property
    def segments(self) -> int:
        """2: a context and a choice."""
        return 2

    @property
    def sequences_per_example(self) -> int:
        """The choices of a row."""
        return self.num_labels

    def configure(self, config: PretrainedConfig) -> None:
        """Changes nothing: the head has one output, whatever the number of choices."""

    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Tokenizes the context with each choice: every argument is a list of `num_labels` lists."""
        context, *begins, choices = (batch[column] for column in self.columns)
        number = self.num_labels
        firsts = [text for text in context for _ in range(number)]
        seconds = [choice for row in choices for choice in row]
        if begins:
            seconds = [f"{begins[0][place // number]} {choice}" for place, choice in enumerate(seconds)]
        tokens = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
        grouped = {
            name: [values[place : place + number] for place in range(0, len(values), number)]
            for name, values in tokens.items()
        }
        return {**grouped, "labels": np.asarray(batch["label"], np.int64)}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForMultipleChoice:
        """Pads all choices of a batch to one length."""
        return DataCollatorForMultipleChoice(tokenizer)

    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores logits [rows, num_labels]."""
        self.check_finite(logits)
        return self._evaluate(np.asarray(inputs["labels"]), logits.argmax(axis=1))

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray:
        """The right place and the chosen one of each row, [rows, 2]."""
        return np.stack([np.asarray(inputs["labels"]), logits.argmax(axis=1)], axis=1)

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score of always choosing the place that is right most often."""
        labels = np.asarray((self.validation if split is None else split)["label"][:])
        return self._evaluate(labels, np.full_like(labels, np.bincount(labels).argmax()))[self.metric]

    def _evaluate(self, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        return {"accuracy": METRICS["accuracy"](labels, answers), **self.own_scores(labels, answers)}


def has_choices(files: Files) -> bool:
    """True if the columns are those of choices, a list or one column each, with one right answer.

    Args:
        files: the task's files.
    """
    listed = any(isinstance(files.peek(name), list | dict) for name in CHOICE_COLUMNS)
    return bool(files.answered_by(ANSWER_COLUMNS)) and (listed or len(_numbered(files.first)) > 1)


def load_choices(files: Files) -> ChoiceTask:
    """Loads choices with their contexts and right answers.

    Args:
        files: the task's files.

    Raises:
        InputError: a row has no choices, or more or fewer than others, or a right answer that is none of them.
    """
    texts, (label,) = files.find("text", CONTEXT_COLUMNS), files.find("label", ANSWER_COLUMNS)
    if len(texts) > 2:
        raise InputError(
            f"text columns {', '.join(texts)} for multiple choice: give the context and, if there is one, the text "
            "that begins every choice"
        )
    listed = [name for name in CHOICE_COLUMNS if spellings(name, files.first)][:1]
    columns = files.named("text", *listed) if listed else _numbered(files.first)
    if not columns:
        raise InputError(
            f"{files.first.path} has no choices: give a column {' or '.join(CHOICE_COLUMNS)} of lists, or columns "
            "choice1, choice2, ..."
        )
    tables = files.tables([*texts, *columns], label)
    read = {split: _read_choices(table, columns, bool(listed)) for split, table in tables.items()}
    number = len(read["train"][0][0])
    for split, rows in read.items():
        for row, (choices, _) in enumerate(rows):
            if len(choices) != number or number < 2:
                raise InputError(
                    f"{tables[split].where(row)}: {count(len(choices), 'choice')}, where the first training row has "
                    f"{number}: give every row the same number, two or more"
                )
    answers = {split: table.columns[label] for split, table in tables.items() if label in table.columns}
    base = _base([value for values in answers.values() for value in values], number)
    splits = {}
    for split, table in tables.items():
        found: dict[str, list[Any]] = {column: table.texts(column) for column in texts}
        found["choices"] = [choices for choices, _ in read[split]]
        if split in answers:
            found["label"] = [
                _right(value, row, base, label, where)
                for row, (value, where) in zip(read[split], table.values(label), strict=True)
            ]
        types = {column: datasets.Value("string") for column in texts} | {
            "choices": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
        }
        splits[split] = datasets.Dataset.from_dict(
            found, features=datasets.Features({name: types[name] for name in found})
        )
    return files.task(
        ChoiceTask, splits, kind="multiple-choice", labels=(), columns=(*texts, "choices"), metrics=("accuracy",)
    )


def _numbered(source: Source) -> tuple[str, ...]:
    """The columns of one choice each, in order: those of the name that most of them have."""
    groups: dict[str, list[str]] = {}
    for column in source.columns:
        if match := _NUMBERED.fullmatch(column):
            groups.setdefault(match[1].lower(), []).append(column)
    found = sorted(groups.values(), key=len)
    return tuple(sorted(found[-1] if found else [], key=str.lower))


#: The choices of a row, and what the row calls each, such as "A"; empty without such names.
_Choices = tuple[list[str], list[str]]


def _read_choices(table: Table, columns: Sequence[str], listed: bool) -> list[_Choices]:
    if not listed:
        return [(list(row), []) for row in zip(*map(table.texts, columns), strict=True)]

    def read(value: Any, where: Callable[[], str]) -> _Choices:
        names: Any = []
        # ARC and CommonsenseQA name their choices.
        if isinstance(value, Mapping):
            value, names = value.get("text"), value.get("label") or []
        if not isinstance(value, list | tuple):
            raise InputError(f"{where()}: column {columns[0]} holds {shown(value)}: give the list of the choices")
        return [check_text(choice, columns[0], where) for choice in value], [str(name) for name in names]

    return [read(value, where) for value, where in table.values(columns[0])]


def _base(answers: Sequence[Any], number: int) -> int:
    """The number of the first choice: 1 if answers count from 1, else 0."""
    numbers = {int(str(answer)) for answer in answers if str(answer).isdigit()}
    return int(0 not in numbers and number in numbers)


def _right(answer: Any, row: _Choices, base: int, label: str, where: Callable[[], str]) -> int:
    """The number of the right choice, from 0 on: by its name in the row, its number, its letter, or its text."""
    choices, names = row
    text = str(answer).strip()
    if text in names:
        return names.index(text)
    if text.isdigit() and 0 <= int(text) - base < len(choices):
        return int(text) - base
    if len(text) == 1 and text.isalpha() and ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    if choices.count(text) == 1:
        return choices.index(text)
    raise InputError(
        f"{where()}: answer {shown(answer)} in column {label} is none of the {len(choices)} choices: give its number, "
        "letter or text"
    )

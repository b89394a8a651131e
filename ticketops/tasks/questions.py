"""Extractive question answering: finds the words of a context that answer a question, as SQuAD asks for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ticketops.errors import InputError, shown, spelled
from ticketops.tasks.columns import Files
from ticketops.tasks.metrics import answer_scores, normalized, scores_of_answers
from ticketops.tasks.task import Task, check_fast
from ticketops.text import count

QUESTION_COLUMNS = ((("question", "context"),),)
ANSWER_COLUMNS = ((("answers",),), (("answer",),))
# Tokens of an answer at most, and the best starts and ends that are combined, as in SQuAD's baselines.
_LONGEST_ANSWER, _BEST = 30, 20


@dataclass(frozen=True, eq=False)
class QuestionTask(Task):
    """Extractive questions: the rows have a question, its context, and in `label` the right answers.

    `label` is {"text": answers, "start": the character at which each begins in the context}, without entries for a
    question that its context does not answer. A context that is longer than an input is cut into windows that overlap
    by a third of `max_length`; the answer is the best span of all windows.
    """

    head: ClassVar[str] = "AutoModelForQuestionAnswering"

    @property
    def num_labels(self) -> int:
        """2: the scores of a token as the first and as the last one of the answer."""
        return 2

    @property
    def grouped_by(self) -> tuple[str, ...]:
        """The context, so that no paragraph is both trained on and scored."""
        return self.columns[1:]

    def configure(self, config: PretrainedConfig) -> None:
        """Sets the width of the head's output."""
        config.num_labels = 2

    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Tokenizes questions with windows of their contexts; `start_positions` and `end_positions` are those of the
        first answer's tokens, 0 in a window without it. With `scored`, in place of these `row` and `offsets`: the
        question's number and each token's first and last character in the context, -1 outside of it."""
        check_fast(tokenizer, self)
        question, context = self.columns
        questions, contexts = [text.strip() for text in batch[question]], list(batch[context])
        stride = max_length // 3
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
        lengths = map(len, tokenizer(questions, add_special_tokens=False)["input_ids"])
        for row, length in zip(indices, lengths, strict=True):
            if length >= room:
                raise InputError(
                    f"the question of row {row + 1} of task {self.name} has {length} tokens, and "
                    f"{spelled('max_length')} {max_length} leaves {room - 1} beside a window of its context: give a "
                    "larger one"
                )
        tokens = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows, offsets = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
        spans = [
            [pair if part == 1 else (-1, -1) for pair, part in zip(pairs, tokens.sequence_ids(place), strict=True)]
            for place, pairs in enumerate(offsets)
        ]
        if scored:
            return {**tokens, "row": [indices[row] for row in rows], "offsets": spans}
        places = [_place(batch["label"][row], found) for row, found in zip(rows, spans, strict=True)]
        return {
            **tokens,
            "start_positions": [first for first, _ in places],
            "end_positions": [last for _, last in places],
        }

    def logits(self, predictions: Any) -> np.ndarray:
        """Scores of each token as first and as last one, [windows, tokens, 2]."""
        return np.stack(predictions[:2], axis=-1)

    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores the answers that logits [windows, tokens, 2] choose."""
        return answer_scores([label["text"] for label in rows["label"][:]], self.answers(logits, inputs, rows))

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray | None:
        """The metric of each question alone, [rows, 1]."""
        found = scores_of_answers([label["text"] for label in rows["label"][:]], self.answers(logits, inputs, rows))
        return None if self.metric not in found else np.asarray(found[self.metric])[:, None]

    def answers(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> list[str]:
        """Chooses the answer to each question: the span of the best sum of scores, over all windows.

        Args:
            logits: scores of each token as first and as last one, [windows, tokens, 2].
            inputs: the windows.
            rows: the questions.

        Returns:
            The answers; empty where "no answer" scores higher, in a task that has such questions.
        """
        self.check_finite(logits)
        (_, context), best = self.columns, [(-np.inf, "")] * len(rows)
        nothing = np.full(len(rows), np.inf)
        contexts = rows[context][:]
        for window, (row, offsets) in enumerate(zip(inputs["row"][:], inputs["offsets"][:], strict=True)):
            start, end = logits[window, : len(offsets), 0], logits[window, : len(offsets), 1]
            nothing[row] = min(nothing[row], start[0] + end[0])
            inside = np.array([first >= 0 for first, _ in offsets])
            firsts, lasts = (_highest(np.where(inside, scores, -np.inf)) for scores in (start, end))
            for first in firsts:
                for last in lasts:
                    score = start[first] + end[last]
                    if first <= last < first + _LONGEST_ANSWER and score > best[row][0]:
                        best[row] = score, contexts[row][offsets[first][0] : offsets[last][1]]
        return ["" if self._unanswerable and nothing[row] > score else text for row, (score, text) in enumerate(best)]

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score of one answer to every question: the most frequent one, or "no answer"."""
        rows = (self.validation if split is None else split)["label"][:]
        answers = [label["text"] for label in rows]
        frequent: dict[str, int] = {}
        for right in answers:
            for text in {normalized(answer) for answer in right}:
                frequent[text] = frequent.get(text, 0) + 1
        guesses = {"", max(frequent, key=lambda text: frequent[text], default="")}
        return max(answer_scores(answers, [guess] * len(rows))[self.metric] for guess in guesses)

    @property
    def _unanswerable(self) -> bool:
        """True if some training question has no answer, so that "no answer" is learned."""
        return any(not label["text"] for label in self.train["label"][:])


def _highest(scores: np.ndarray) -> np.ndarray:
    best = np.argsort(-scores, kind="stable")[:_BEST]
    return best[np.isfinite(scores[best])]


def _place(label: Mapping[str, Sequence[Any]], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of the first answer; (0, 0), the first special token, if the window lacks it."""
    if not label["text"]:
        return 0, 0
    start = label["start"][0]
    end = start + len(label["text"][0])
    inside = [place for place, (first, last) in enumerate(offsets) if first >= 0 and last > start and first < end]
    whole = inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def has_questions(files: Files) -> bool:
    """True if the columns are those of SQuAD: a question, its context, and answers that are texts.

    Args:
        files: the task's files.
    """
    asked = all(isinstance(files.peek(name), str) for name in QUESTION_COLUMNS[0][0])
    return asked and any(isinstance(files.peek(name), dict | list | str) for name in files.answered_by(ANSWER_COLUMNS))


def load_questions(files: Files) -> QuestionTask:
    """Loads questions with contexts and answers.

    Args:
        files: the task's files.

    Raises:
        InputError: a row has no question or context, or an answer that is not in its context.
    """
    texts, (label,) = files.find("text", QUESTION_COLUMNS), files.find("label", ANSWER_COLUMNS)
    if len(texts) != 2:
        raise InputError(
            f"text columns {', '.join(texts)} for question answering: give two, the question and its context"
        )
    splits = {}
    for split, table in files.tables(texts, label).items():
        columns: dict[str, list[Any]] = {column: table.texts(column) for column in texts}
        if label in table.columns:
            columns["label"] = [
                _read_answers(value, context, label, where)
                for context, (value, where) in zip(columns[texts[1]], table.values(label), strict=True)
            ]
        types = {column: datasets.Value("string") for column in texts} | {
            "label": {"text": datasets.List(datasets.Value("string")), "start": datasets.List(datasets.Value("int64"))}
        }
        splits[split] = datasets.Dataset.from_dict(
            columns, features=datasets.Features({name: types[name] for name in columns})
        )
    return files.task(
        QuestionTask, splits, kind="question-answering", labels=(), columns=texts, metrics=("f1", "exact_match")
    )


def _read_answers(value: Any, context: str, label: str, where: Callable[[], str]) -> dict[str, list[Any]]:
    """Texts and first characters of the answers: SQuAD's two layouts, or mere texts, which are searched for."""
    if isinstance(value, Mapping) and "text" in value:
        texts, starts = value["text"], value.get("answer_start")
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        texts, starts = [each.get("text") for each in value], [each.get("answer_start") for each in value]
    else:
        texts, starts = value, None
    texts = [texts] if isinstance(texts, str) else [] if texts is None else texts
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"{where()}: column {label} holds {shown(value)}: give the answers as SQuAD does, texts and their starts"
        )
    if starts is None or starts == [None] * len(texts):
        starts = [context.find(text) for text in texts]
    if not isinstance(starts, list) or len(starts) != len(texts):
        begins = count(len(starts), "start") if isinstance(starts, list) else shown(starts)
        raise InputError(f"{where()}: column {label} has {count(len(texts), 'answer')} with {begins}: correct it")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            place = f" at character {start}" if isinstance(start, int) and start >= 0 else ""
            raise InputError(f"{where()}: the answer {shown(text)} is not in its context{place}: correct it")
    return {"text": list(texts), "start": list(starts)}

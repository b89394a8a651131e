"""Metrics of tasks: each takes what is right and what a model answers; a higher value is better."""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ticketops.errors import InputError, shown

#: Takes labels and predictions: class ids [rows], multi-hot [rows, labels], or numbers [rows].
Metric = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(sklearn_metrics.accuracy_score(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    # `labels=[1]` keeps a split without the positive class at 0 rather than an error.
    return float(sklearn_metrics.f1_score(labels, predictions, labels=[1], average="macro", zero_division=0.0))


def _averaged_f1(average: str) -> Metric:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        return float(sklearn_metrics.f1_score(labels, predictions, average=average, zero_division=0.0))

    return score


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def _correlation(function: Callable[..., Any]) -> Metric:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        # scipy warns of nearly constant input, where the correlation may underflow to NaN; that counts as 0.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(function(labels, predictions).statistic)
        return value if np.isfinite(value) else 0.0

    return score


#: Metrics of whole texts, by name.
METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _averaged_f1("macro"),
    "micro_f1": _averaged_f1("micro"),
    "matthews_correlation": _matthews,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def own_metric(metric: Any) -> tuple[str, Metric]:
    """Reads a metric of the user's own.

    Args:
        metric: a function (labels, predictions) -> float; an object with `compute(predictions=, references=)`, as those
            of Hugging Face's evaluate; or {name: one of these}. Of a dictionary that it returns, the value of that name
            counts, or without a name the first one.

    Returns:
        Its name, and a function that calls it and raises InputError where it fails or returns no finite number.

    Raises:
        InputError: it is none of these, or has no name.
    """
    name: str | None = None
    if isinstance(metric, Mapping) and len(metric) == 1:
        ((name, metric),) = metric.items()
    compute = getattr(metric, "compute", None)
    if not callable(compute) and not callable(metric):
        raise InputError(
            f"metric {shown(metric)} is no metric: give a name, a function (labels, predictions) -> float, an object "
            "with compute(predictions=, references=), or {name: one of these}"
        )
    named = name is not None
    found = name if named else getattr(metric, "name" if callable(compute) else "__name__", type(metric).__name__)
    if not isinstance(found, str) or not found.strip() or found == "<lambda>":
        raise InputError("metric has no name: give it as {'its name': function}")

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        try:
            if callable(compute):
                value = compute(predictions=predictions, references=labels)
            else:
                value = metric(labels, predictions)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"metric {found} failed ({type(error).__name__}: {reason}): correct it") from error
        if isinstance(value, Mapping):
            if named and found not in value and len(value) > 1:
                raise InputError(f"metric {found} is none of what it returned ({', '.join(map(str, value))}): name one")
            value = value.get(found, next(iter(value.values()), None)) if named else next(iter(value.values()), None)
        try:
            number = value = value if isinstance(value, str | bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(number, str | bool) or not abs(number) <= 1e6:
            raise InputError(
                f"metric {found} returned {shown(value)}: return one finite number, at most a million, higher for "
                "better; also where all predictions are the same"
            )
        return number

    return found, score


def entity_scores(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores tags by the entities that they mark: an entity counts if its kind, its first and its last word are right.

    Args:
        tags: the right tags of each row's words, such as "B-PER", "I-PER" and "O"; also of the schemes IOB1, IOE, IOBES
            and BILOU.
        predicted: as many predicted tags.

    Returns:
        "entity_f1", "entity_precision" and "entity_recall" over the entities of all rows.

    Source: seqeval, which reads tags as the CoNLL-2000 evaluation script does.
    """
    from seqeval import metrics

    right, answers = _with_ends(tags), _with_ends(predicted)
    functions = {
        "entity_f1": metrics.f1_score,
        "entity_precision": metrics.precision_score,
        "entity_recall": metrics.recall_score,
    }
    return {name: float(function(right, answers, zero_division=0)) for name, function in functions.items()}


def entity_counts(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts the entities of each row, from which `entity_scores` are quotients of sums.

    Args:
        tags, predicted: as in `entity_scores`.

    Returns:
        Right, predicted and true entities, [rows, 3].
    """
    from seqeval.metrics.sequence_labeling import get_entities

    true, found = ([set(get_entities(row)) for row in _with_ends(rows)] for rows in (tags, predicted))
    counts = [(len(right & answers), len(answers), len(right)) for right, answers in zip(true, found, strict=True)]
    return np.asarray(counts, np.int64).reshape(-1, 3)


def _with_ends(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tags of BILOU in the letters of IOBES, by which alone seqeval knows the last and the single word of an entity."""
    return [[{"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in rows]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """An answer without case, punctuation, English articles and superfluous spaces, as SQuAD compares answers.

    Args:
        answer: the text.
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def answer_scores(answers: Iterable[Sequence[str]], predicted: Iterable[str]) -> dict[str, float]:
    """Scores extracted answers, each against the right answer of its question that it is nearest to.

    Args:
        answers: the right answers of each question; none for a question without an answer in its context.
        predicted: the predicted answer of each question; empty for "no answer".

    Returns:
        "f1" (over the words that an answer shares with a right one) and "exact_match", means over questions in [0, 1].

    Source: the evaluation script of SQuAD 2.0.
    """
    return {name: float(np.mean(values)) for name, values in scores_of_answers(answers, predicted).items()}


def scores_of_answers(answers: Iterable[Sequence[str]], predicted: Iterable[str]) -> dict[str, list[float]]:
    """Scores each extracted answer as `answer_scores` does.

    Args:
        answers, predicted: as in `answer_scores`.

    Returns:
        "f1" and "exact_match" of each question.
    """
    exact, overlap = [], []
    for right, text in zip(answers, predicted, strict=True):
        # Where normalization leaves nothing of any right answer, "no answer" is right.
        known = [answer for answer in right if normalized(answer)] or [""]
        exact.append(max(float(normalized(answer) == normalized(text)) for answer in known))
        overlap.append(max(_word_f1(normalized(answer).split(), normalized(text).split()) for answer in known))
    return {"f1": overlap, "exact_match": exact}


def _word_f1(right: Sequence[str], words: Sequence[str]) -> float:
    if not right or not words:
        return float(right == words)
    same = (Counter(right) & Counter(words)).total()
    return 2 * same / (len(right) + len(words))

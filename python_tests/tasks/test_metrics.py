"""Metrics by name and of one's own, thresholds, and losses that weigh classes."""

import dataclasses
import math
import types

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from ticketops.errors import InputError
from ticketops.tasks import EntityTask, SequenceTask, Task, load_task
from ticketops.tasks.losses import WeightedLoss
from ticketops.tasks.metrics import own_metric

from .test_task import make_task


def error_rate(labels, predictions):
    return float(np.mean(np.asarray(labels) != predictions))


class Compute:
    """A metric as those of evaluate are."""

    name = "glue"

    def compute(self, *, predictions, references):
        return {"hits": np.float64(np.mean(predictions == references)), "misses": np.mean(predictions != references)}


@pytest.mark.parametrize(
    ("metric", "name", "value"),
    [
        (error_rate, "error_rate", 0.25),
        ({"wrong": error_rate}, "wrong", 0.25),
        (Compute(), "glue", 0.75),
        ({"misses": Compute()}, "misses", 0.25),
        ({"count": lambda labels, predictions: torch.tensor(3)}, "count", 3.0),
    ],
)
def test_functions_and_objects_with_compute_score(metric, name: str, value: float):
    found, function = own_metric(metric)
    assert (found, function(np.array([0, 1, 1, 0]), np.array([0, 1, 1, 1]))) == (name, value)


def fails(labels, predictions):
    raise ZeroDivisionError("nothing\nto divide")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda labels, predictions: 1.0, "metric has no name: give it as {'its name': function}"),
        (3, "metric 3 is no metric: give a name, a function"),
        ({"nothing": lambda labels, predictions: None}, "metric nothing returned None: return one finite number"),
        (
            {"nan": lambda labels, predictions: np.float64("nan")},
            "metric nan returned nan: .* also where all predictions",
        ),
        ({"text": lambda labels, predictions: "0.5"}, "metric text returned '0.5'"),
        ({"huge": lambda labels, predictions: 1e9}, "metric huge returned 1000000000.0"),
        ({"empty": lambda labels, predictions: {}}, "metric empty returned None"),
        (fails, r"metric fails failed \(ZeroDivisionError: nothing to divide\): correct it"),
        ({"f1": Compute()}, r"metric f1 is none of what it returned \(hits, misses\): name one"),
    ],
)
def test_a_bad_metric_is_one_line_before_any_training(metric, message: str):
    data = datasets.Dataset.from_dict({"text": [f"text {row}" for row in range(8)], "label": [0, 1] * 4})
    with pytest.raises(InputError, match=message) as caught:
        load_task({"train": data, "validation": data}, metric=own_metric(metric))
    assert "\n" not in str(caught.value)


def test_a_metric_of_the_kind_selects_by_its_name():
    task = make_task(labels=(0, 1, 1)).with_metric("matthews_correlation")
    assert task.metrics == ("matthews_correlation", "accuracy", "f1")
    scores = task.compute(np.array([[2, 1], [0, 1], [3, 1]]), [0, 1, 1])
    assert scores["matthews_correlation"] == pytest.approx(matthews_corrcoef([0, 1, 1], [0, 1, 0]))
    assert task.majority() == 0.0
    assert make_task([0.5, 1], "regression", (), ("pearson",)).with_metric("spearman").metric == "spearman"


@pytest.mark.parametrize(
    ("task", "metric", "choices"),
    [
        (
            make_task(),
            "spearman",
            "accuracy, macro_f1, micro_f1, matthews_correlation, f1, or give a function in Python",
        ),
        (make_task((0, 1, 2), names="abc", metrics=("accuracy",)), "f1", "matthews_correlation, or give"),
        (make_task([0.5, 1], "regression", (), ("pearson",)), "accuracy", "pearson, spearman, or"),
    ],
)
def test_a_metric_that_does_not_suit_the_kind_names_those_that_do(task: Task, metric: str, choices: str):
    with pytest.raises(InputError, match=f"metric '{metric}' does not suit task toy .*: choose from .*{choices}"):
        task.with_metric(metric)


def test_functions_score_every_kind_but_questions():
    task = make_task(labels=(0, 1, 1)).with_metric(*own_metric(error_rate))
    assert task.compute(np.array([[2, 1], [0, 1], [3, 1]]), [0, 1, 1])["error_rate"] == pytest.approx(1 / 3)
    assert task.majority() == pytest.approx(1 / 3)
    # A function takes the place of a metric of its name.
    assert make_task().with_metric("accuracy", lambda labels, predictions: 7.0).majority() == 7.0
    mean = make_task([0.0, 1.0, 5.0], "regression", (), ("pearson",)).with_metric(
        "negative_error", lambda labels, predictions: -float(np.mean((labels - predictions) ** 2))
    )
    assert mean.majority() == pytest.approx(-np.var([0.0, 1.0, 5.0]))
    words = datasets.Dataset.from_dict({"tokens": [["Ann", "slept"]] * 4, "ner_tags": [["B-PER", "O"]] * 4})

    def right_tags(labels, predictions):
        assert labels[0] == ["B-PER", "O"]
        return float(np.mean(np.array(labels) == np.array(predictions)))

    entities = load_task({"train": words, "validation": words}, metric=("right_tags", right_tags))
    assert entities.majority() == 0.5
    assert entities.metrics == ("right_tags", "entity_f1", "entity_precision", "entity_recall")
    logits = np.zeros((4, 2, 2))
    logits[:, 0, entities.labels.index("B-PER")] = 1
    logits[:, 1, entities.labels.index("O")] = 1
    inputs = datasets.Dataset.from_dict({"words": [[0, 1]] * 4})
    assert (
        entities.score(logits, inputs, words.rename_column("ner_tags", "label").map(ids(entities)))["right_tags"] == 1
    )
    asked = {"question": ["who?"] * 8, "context": ["it was Ann"] * 8, "answers": [["Ann"]] * 8}
    questions = datasets.Dataset.from_dict(asked)
    with pytest.raises(InputError, match="takes no metric function: choose metric from f1, exact_match"):
        load_task({"train": questions, "validation": questions}, metric=own_metric(error_rate))


def ids(task: EntityTask):
    return lambda row: {"label": [task.labels.index(tag) for tag in row["label"]]}


def several(labels: list[list[str]]) -> SequenceTask:
    data = datasets.Dataset.from_dict({"text": [f"text {row}" for row in range(len(labels))], "label": labels})
    task = load_task({"train": data, "validation": data})
    assert isinstance(task, SequenceTask)
    return task


def test_the_threshold_decides_which_labels_are_predicted():
    data = several([["a"], ["b"], ["a", "b"], ["a"]])
    logits = np.full((1, 2), math.log(0.3 / 0.7))
    assert data.compute(logits, [[1, 1]])["micro_f1"] == 0
    rows = {"train": data.train, "validation": data.validation}
    lower = load_task(rows, threshold=0.25)
    assert lower.compute(logits, [[1, 1]])["micro_f1"] == 1
    assert load_task(dataclasses.replace(data, threshold=0.25), name="data").threshold == 0.25
    with pytest.raises(InputError, match=r"threshold 0.25 is for labels of a multi-label task, and data is class"):
        load_task(datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}), threshold=0.25)


def outputs(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": logits}


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0] * 6 + [1] * 2 + [2]
    loss = make_task(labels, names="abc", metrics=("accuracy",)).loss_function("balanced")
    assert loss.weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    # A class without rows.
    assert make_task([0, 0, 1], names="abc", metrics=("accuracy",)).loss_function("balanced").weights[2] == 1
    assert make_task().loss_function(None) is None
    assert several([["a"], ["a"], ["a", "b"], ["a"]]).loss_function("balanced").weights == pytest.approx([1, 3])


def test_the_loss_is_the_mean_of_weight_times_loss():
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 1, 2, -100, 1]), np.array([1, 2, 4], np.float32)
    each = functional.cross_entropy(logits, labels, weight=torch.tensor(weights), reduction="none")
    loss = WeightedLoss(weights)
    torch.testing.assert_close(loss(outputs(logits), labels), each.sum() / 4)
    # Two batches of one step, as a Trainer accumulates them.
    parts = [loss(outputs(logits[part]), labels[part], num_items_in_batch=4) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), each.sum() / 4)
    tokens = logits[None].expand(2, 5, 3)
    torch.testing.assert_close(loss(outputs(tokens), labels.expand(2, 5)), each.sum() / 4)
    equal = WeightedLoss(np.ones(3, np.float32))
    torch.testing.assert_close(equal(outputs(logits), labels), functional.cross_entropy(logits, labels))
    hot = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    torch.testing.assert_close(
        WeightedLoss(weights, several=True)(outputs(logits[:2]), hot),
        functional.binary_cross_entropy_with_logits(logits[:2], hot, pos_weight=torch.tensor(weights)),
    )


@pytest.mark.parametrize(
    ("task", "weights", "message"),
    [
        (make_task(), [1.0], r"class_weights has 1 numbers, and the task has 2 labels \(no, yes\): give one for each"),
        (make_task([0.5, 1], "regression", (), ("pearson",)), "balanced", "regression has no classes to weigh"),
        (
            types.SimpleNamespace(name="own", kind="ordinal"),
            "balanced",
            "given for task own, and ordinal has no classes",
        ),
    ],
)
def test_weights_without_classes_are_refused(task, weights, message: str):
    loss = task.loss_function if isinstance(task, Task) else lambda weights: Task.loss_function(task, weights)
    with pytest.raises(InputError, match=message):
        loss(weights)

import dataclasses
import warnings

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.tasks import SequenceTask
from ticketops.tasks.sampling import hold_out, spread, take
from ticketops.tasks.sequences import features


def rows(labels, kind="classification", names=("no", "yes")):
    texts = [f"text {i}" for i in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features(kind, names, ("text",)))


def make_task(labels=(0, 1, 1), kind="classification", names=("no", "yes"), metrics=("accuracy", "f1")):
    split = rows(list(labels), kind, names)
    return SequenceTask("toy", kind, tuple(names), ("text",), tuple(metrics), split, split, "validation")


def test_classification_metrics():
    task = make_task(metrics=("accuracy", "f1", "matthews_correlation"))
    logits = np.array([[2, 1], [0, 1], [3, 1], [0, 5.0]])
    scores = task.compute(logits, [0, 1, 1, 0])
    # true positives 1, false positives 1, false negatives 1, true negatives 1
    assert scores == {"accuracy": 0.5, "f1": 0.5, "matthews_correlation": 0.0}
    assert task.compute(logits, [0, 1, 0, 1]) == {"accuracy": 1.0, "f1": 1.0, "matthews_correlation": 1.0}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_metrics(shape):
    task = make_task([0.5, 1.5, 2.5], "regression", (), ("pearson", "spearman"))
    scores = task.compute(np.array([1.0, 2, 3, 10]).reshape(shape), np.array([1.0, 2, 3, 4]))
    assert scores["spearman"] == pytest.approx(1.0)
    # by hand: covariance 14 / sqrt(variance 5 * 50)
    assert scores["pearson"] == pytest.approx(14 / np.sqrt(250))
    assert task.num_labels == 1
    assert task.majority() == 0.0


def test_constant_predictions_score_zero_without_warnings():
    constant = np.tile([1.0, 0.0], (3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_task(metrics=("matthews_correlation", "f1")).compute(constant, [0, 1, 1]) == {
            "matthews_correlation": 0.0,
            "f1": 0.0,
        }
        task = make_task([0.5, 1.5, 2.5], "regression", (), ("pearson", "spearman"))
        assert task.compute(np.ones(3), [0.5, 1.5, 2.5]) == {"pearson": 0.0, "spearman": 0.0}
        assert task.compute(np.array([1, 1, 1 + 1e-16]), [0.5, 1.5, 2.5])["pearson"] == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_predictions_are_refused(bad):
    with pytest.raises(InputError, match=r"1 of 3 predictions .* row 1: the training diverged"):
        make_task().compute(np.array([[0, 1], [bad, 1], [0, 1]]), [0, 1, 1])


@pytest.mark.parametrize(("shape", "count"), [((3, 3), 3), ((2, 2), 3), ((3,), 3), ((0, 2), 0)])
def test_predictions_of_the_wrong_shape_are_refused(shape, count):
    with pytest.raises(InputError, match=r"do not fit task toy: give \[rows, 2\]"):
        make_task().compute(np.zeros(shape), np.zeros(count, dtype=int))


def test_majority_is_the_most_frequent_validation_label():
    task = make_task([1, 1, 1, 0])
    assert task.majority() == 0.75
    assert task.majority(rows([0, 0, 1])) == pytest.approx(2 / 3)
    assert make_task([1, 1, 0], metrics=("matthews_correlation",)).majority() == 0.0


def test_fingerprint_follows_the_rows_and_their_roles():
    task = make_task()
    assert task.fingerprint == make_task().fingerprint
    others = [
        dataclasses.replace(task, train=rows([0, 1, 0])),
        dataclasses.replace(task, train=rows([0, 1])),
        dataclasses.replace(task, report=task.validation),
        dataclasses.replace(task, metrics=("f1",)),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert dataclasses.replace(task, name="other").fingerprint == task.fingerprint


def test_describe_is_one_line():
    task = dataclasses.replace(make_task(), report=rows([1]))
    assert task.describe() == (
        "toy: 3 training and 3 validation rows (validation), 1 report rows, 2 labels (no, yes), metrics accuracy, f1, "
        "majority accuracy 0.667"
    )


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=60), seed=st.integers(0, 5), data=st.data())
def test_subsets_are_nested_and_stratified(labels, seed, data):
    split = rows(labels, names=("a", "b", "c"))
    count = data.draw(st.integers(1, len(labels)))
    order = spread(split, seed)
    assert sorted(order) == list(range(len(labels)))
    for label in set(labels):
        share = labels.count(label) / len(labels)
        assert abs(sum(labels[i] == label for i in order[:count]) - share * count) <= 1.5
    small, large = take(split, count, seed), take(split, len(labels), seed)
    assert len(small) == count
    assert set(small["text"]) <= set(large["text"])
    assert large["text"][:] == split["text"][:]


def test_subsets_differ_by_seed():
    split = rows([0, 1] * 50)
    assert take(split, 10, 0)["text"][:] == take(split, 10, 0)["text"][:]
    assert take(split, 10, 0)["text"][:] != take(split, 10, 1)["text"][:]


def test_hold_out_never_splits_a_text():
    texts = [f"text {i % 20}" for i in range(60)]
    split = datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 30})
    rest, held = hold_out(split, ("text",), 10, seed=0)
    assert len(rest) + len(held) == 60
    assert len(held) >= 10
    assert not set(rest["text"]) & set(held["text"])

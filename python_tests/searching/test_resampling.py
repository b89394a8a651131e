import itertools

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from ticketops.searching.resampling import HALVINGS, can_resample, halvings, resampled
from ticketops.tasks.metrics import METRICS, entity_counts, entity_scores


def results_of(form: str, generator: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    if form == "classes":
        labels = generator.integers(0, classes, rows)
        return np.stack(
            [labels, np.where(generator.random(rows) < 0.7, labels, generator.integers(0, classes, rows))], 1
        )
    if form == "several":
        return generator.integers(0, 2, (rows, 2, classes)).astype(np.float32)
    numbers = generator.standard_normal((rows, 2))
    numbers[:, 1] += 3 + numbers[:, 0]
    return numbers


CASES = [
    *(("classes", metric, 2) for metric in ("accuracy", "f1", "macro_f1", "micro_f1", "matthews_correlation")),
    *(("classes", metric, 5) for metric in ("accuracy", "macro_f1", "micro_f1", "matthews_correlation")),
    *(("several", metric, classes) for metric in ("accuracy", "macro_f1", "micro_f1") for classes in (1, 4)),
    ("numbers", "pearson", 0),
]


@pytest.mark.parametrize(("form", "metric", "classes"), CASES)
def test_scores_of_some_rows_are_those_of_the_metric(form: str, metric: str, classes: int):
    generator = np.random.default_rng(len(metric) + classes)
    models = [results_of(form, generator, 60, classes) for _ in range(3)]
    # Whole, halves, few rows, and rows that are drawn several times.
    few, again = (generator.multinomial(count, [1 / 60] * 60, 5) for count in (4, 60))
    weights = np.concatenate([np.ones((1, 60)), halvings(60)[:5], few, again])
    assert all(can_resample(metric, results) for results in models)
    found = resampled(metric, models, weights)
    for (model, results), (choice, weight) in itertools.product(enumerate(models), enumerate(weights)):
        chosen = np.repeat(results, weight.astype(int), axis=0)
        want = METRICS[metric](chosen[:, 0], chosen[:, 1])
        assert found[model, choice] == pytest.approx(want, abs=2e-5), (model, choice)


def test_spearmans_correlation_is_that_of_ranks_among_all_rows():
    results = results_of("numbers", np.random.default_rng(0), 200, 0)
    found = resampled("spearman", [results], np.concatenate([np.ones((1, 200)), halvings(200)]))[0]
    assert found[0] == pytest.approx(METRICS["spearman"](results[:, 0], results[:, 1]), abs=1e-6)
    halves = [METRICS["spearman"](results[half, 0], results[half, 1]) for half in halvings(200)]
    assert found[1:] == pytest.approx(halves, abs=0.03)


def test_metrics_without_a_spread_are_0_as_the_metrics_themselves():
    constant = np.stack([np.arange(6.0), np.full(6, 0.3)], axis=1)
    assert resampled("pearson", [constant], np.ones((1, 6))) == 0.0
    same = np.zeros((6, 2), int)
    assert resampled("matthews_correlation", [same], np.ones((1, 6)))[0, 0] == matthews_corrcoef(*same.T) == 0.0
    assert resampled("f1", [same], np.ones((1, 6))) == 0.0


def test_entities_are_counted_row_by_row():
    tags = [["B-PER", "I-PER", "O"], ["B-LOC", "O"], ["O", "O"], ["S-ORG", "U-ORG"]]
    predicted = [["B-PER", "I-PER", "B-LOC"], ["B-PER", "O"], ["O", "O"], ["S-ORG", "O"]]
    counts = entity_counts(tags, predicted)
    assert counts.tolist() == [[1, 2, 1], [0, 1, 1], [0, 0, 0], [1, 1, 2]]
    for rows in ([0, 1, 2, 3], [0, 1], [2], [3, 3, 0]):
        want = entity_scores([tags[row] for row in rows], [predicted[row] for row in rows])
        for metric, value in want.items():
            weights = np.bincount(rows, minlength=4)[None]
            assert resampled(metric, [counts], weights)[0, 0] == pytest.approx(value), (rows, metric)


def test_means_and_what_is_not_known():
    assert resampled("exact_match", [np.array([[1.0], [0.0], [0.5]])], np.array([[1, 1, 0], [0, 0, 2]])).tolist() == [
        [0.5, 0.5]
    ]
    assert not can_resample("my_metric", np.zeros((3, 2)))
    assert not can_resample("pearson", np.zeros((3, 2, 4)))
    assert resampled("accuracy", [], np.ones((2, 3))).shape == (0, 2)


def test_halves_are_the_same_for_all_models():
    first = halvings(7)
    assert (first == halvings(7)).all()
    assert first.shape == (HALVINGS, 7)
    assert set(first.sum(axis=1)) == {3}
    assert len(np.unique(halvings(40), axis=0)) == HALVINGS

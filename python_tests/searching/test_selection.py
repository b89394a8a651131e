import math

import pytest

from ticketops.searching import select
from ticketops.searching.statistics import Spread


def record(kind: str, sparsity: float, seed: int, score: float, report_score: float | None = None) -> dict:
    return {
        "kind": kind,
        "sparsity": sparsity,
        "seed": seed,
        "heads_pruned": 0,
        "ffns_pruned": 0,
        "weights_remaining": 1 - sparsity,
        "weights_remaining_encoder": 1 - sparsity,
        "score": score,
        "report_score": report_score,
    }


def test_best_mean_of_the_winning_levels_is_super_and_gains_are_paired_by_seed():
    records = [record("full", 0.0, 0, 0.80), record("full", 0.0, 1, 0.70)]
    records += [record("winning", 0.1, 0, 0.83), record("winning", 0.1, 1, 0.75)]
    records += [record("winning", 0.3, 0, 0.99), record("winning", 0.3, 1, 0.50)]
    records += [record("random", 0.1, 0, 0.95), record("random", 0.1, 1, 0.95)]
    selection = select(records, [0, 1])
    assert selection.super_level is not None
    assert selection.super_level.sparsity == 0.1
    assert selection.complete
    assert selection.gains == pytest.approx({0: 0.03, 1: 0.05})
    # Paired: the seeds' own spread of 0.07 does not enter.
    assert Spread.of(selection.gains.values()).std == pytest.approx(0.02 / math.sqrt(2))


def test_the_best_of_several_levels_is_corrected_for_all_of_them():
    def records(levels: int) -> list[dict]:
        found = []
        for seed, gain in enumerate((0.01, 0.02, 0.03)):
            found.append(record("full", 0.0, seed, 0.8))
            found += [record("winning", 0.1 * (n + 1), seed, 0.8 + gain if n == 0 else 0.7) for n in range(levels)]
        return found

    alone, several = (select(records(levels), range(3)).comparison for levels in (1, 4))
    assert alone is not None
    assert several is not None
    assert (alone.tried, several.tried) == (1, 4)
    assert several.low < alone.low


def test_ties_go_to_the_sparser_level():
    selection = select([record("winning", s, 0, 0.8) for s in (0.1, 0.3, 0.2)], [0])
    assert selection.super_level is not None
    assert selection.super_level.sparsity == 0.3


def test_report_scores_do_not_select():
    records = [
        record("full", 0.0, 0, 0.8, 0.7),
        record("winning", 0.1, 0, 0.9, 0.5),
        record("winning", 0.3, 0, 0.8, 0.9),
    ]
    selection = select(records, [0])
    assert selection.super_level is not None
    assert selection.super_level.sparsity == 0.1
    assert (selection.split, selection.gains) == ("report", pytest.approx({0: -0.2}))


def test_levels_that_lack_seeds_compete_only_among_themselves():
    records = [record("winning", 0.1, 0, 0.8), record("winning", 0.1, 1, 0.8), record("winning", 0.3, 0, 0.9)]
    complete = select(records, [0, 1])
    assert complete.super_level is not None
    assert (complete.super_level.sparsity, complete.complete) == (0.1, True)
    partial = select(records, [0, 1, 2])
    assert partial.super_level is not None
    assert (partial.super_level.sparsity, partial.complete) == (0.3, False)


def test_nothing_yet():
    selection = select([], [0])
    assert (selection.full, selection.super_level, selection.gains) == (None, None, {})
    assert (selection.comparison, selection.comparisons) == (None, {})

"""Successive halving: every level trains with one seed, the better half of the levels with two, a quarter with four.

A level is a sparsity. Its winning tickets decide by their mean score on the validation rows; random and losing ones go
with them.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016.
"""

import statistics
from collections.abc import Mapping, Sequence

from ticketops.searching.plan import Trial


def judges(trial: Trial, plan: Sequence[Trial]) -> list[str]:
    """Names of the trials that must have ended before it is known whether a trial is trained.

    Args:
        trial: of the search.
        plan: all trials of the search.
    """
    if trial.kind == "full":
        return []
    seeds = _seeds(plan)
    before = max((stage for stage in _stages(seeds) if stage <= seeds.index(trial.seed)), default=0)
    return [each.id for each in plan if each.kind == "winning" and each.seed in seeds[:before]]


def dropped(plan: Sequence[Trial], ended: Mapping[str, float | None]) -> set[Trial]:
    """Finds the trials whose level has dropped out before their seed.

    Args:
        plan: all trials of the search.
        ended: name -> score on the validation rows of each trial that has ended; None if it failed.

    Returns:
        Those trials, as far as the trials that have ended decide; the rest is not decided yet.
    """
    seeds = _seeds(plan)
    winning = {(trial.sparsity, trial.seed): trial.id for trial in plan if trial.kind == "winning"}
    levels = sorted({sparsity for sparsity, _ in winning})
    gone: set[Trial] = set()
    for stage in _stages(seeds):
        names = {level: [winning[level, seed] for seed in seeds[:stage]] for level in levels}
        if not all(name in ended for of_level in names.values() for name in of_level):
            break
        scores = {level: [ended[name] for name in of_level] for level, of_level in names.items()}
        means = {level: _mean(of_level) for level, of_level in scores.items()}
        # Of equal levels the sparser one stays, as in the choice of the super ticket.
        best = sorted(levels, key=lambda level: (means[level], level))[len(levels) // 2 :]
        out = {*levels} - {*best}
        gone |= {
            trial
            for trial in plan
            if trial.kind != "full" and trial.sparsity in out and seeds.index(trial.seed) >= stage
        }
        levels = sorted(best)
    return gone


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known else float("-inf")


def _seeds(plan: Sequence[Trial]) -> list[int]:
    return list(dict.fromkeys(trial.seed for trial in plan))


def _stages(seeds: Sequence[int]) -> list[int]:
    """Numbers of seeds after which half of the levels drop out: 1, 2, 4, ..."""
    return [2**power for power in range(len(seeds)) if 2**power < len(seeds)]

"""The order in which batches of several tasks train one model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ticketops.searching.sharing_plan import Mixing


@dataclass(frozen=True, eq=False)
class Step:
    """One training step.

    Attributes:
        task: index of the step's task.
        rows: numbers of the step's rows in that task's training split, int64 [at most batch_size].
    """

    task: int
    rows: np.ndarray


def make_schedule(rows: Sequence[int], batch_size: int, epochs: int, mixing: Mixing, seed: int) -> list[Step]:
    """Draws the task and the rows of every step of a multi-task training.

    Under each rule, an epoch has as many steps as all tasks together have batches, and each task's number of steps is
    exact rather than random. A task's rows are shuffled and used once before they are shuffled again, also across
    epochs; the last batch of such a pass may be smaller.

    Args:
        rows: number of training rows of each task.
        batch_size: maximum number of rows in a step.
        epochs: number of epochs.
        mixing: "proportional": steps in proportion to the tasks' batches, so that an epoch sees every row once;
            "uniform": equally many steps per task; "annealed": in proportion to batches ** power, where the power falls
            linearly over the epochs from 1 to 0.2 (0.6 if there is only one epoch).
        seed: seed of all shuffling.

    Returns:
        The steps in order.

    Source: proportional and the interleaving, arXiv 1901.11504 (MT-DNN); annealed, arXiv 1902.02671 (PALs).
    """
    generator = np.random.default_rng(seed)
    batches = [math.ceil(count / batch_size) for count in rows]
    streams = [_stream(count, batch_size, generator) for count in rows]
    schedule = []
    for epoch in range(epochs):
        counts = share_steps(batches, _power(mixing, epoch, epochs))
        order = generator.permutation(np.repeat(np.arange(len(rows)), counts))
        schedule += [Step(int(task), next(streams[task])) for task in order]
    return schedule


def share_steps(batches: Sequence[int], power: float) -> list[int]:
    """Divides an epoch's steps among tasks, in proportion to batches ** power.

    Args:
        batches: number of batches of each task.
        power: exponent; 1 returns `batches` unchanged.

    Returns:
        Number of steps of each task; the sum is that of `batches`, and none is 0 for a power in [0, 1].
    """
    weights = np.asarray(batches, dtype=np.float64) ** power
    ideal = weights * (sum(batches) / weights.sum())
    counts = np.floor(ideal + 1e-9).astype(int)
    # Steps left over by rounding down go to the largest remainders.
    for task in np.argsort(counts - ideal, kind="stable")[: sum(batches) - counts.sum()]:
        counts[task] += 1
    return [int(count) for count in counts]


def _power(mixing: Mixing, epoch: int, epochs: int) -> float:
    if mixing == "annealed":
        return 1.0 - 0.8 * (epoch / (epochs - 1) if epochs > 1 else 0.5)
    return {"proportional": 1.0, "uniform": 0.0}[mixing]


def _stream(rows: int, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields batches of one task without end."""
    while True:
        order = generator.permutation(rows)
        yield from (order[start : start + batch_size] for start in range(0, rows, batch_size))

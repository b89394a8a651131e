"""In which order the batches of several tasks train one model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ticketops.searching.sharing_plan import Mixing


@dataclass(frozen=True, eq=False)
class Step:
    """One training step.

    Attributes:
        task: place of its task in the list of tasks.
        rows: numbers of its rows in that task's training split [at most a batch], int64.
    """

    task: int
    rows: np.ndarray


def make_schedule(rows: Sequence[int], batch_size: int, epochs: int, mixing: Mixing, seed: int) -> list[Step]:
    """Draws the tasks and rows of every step of a multi-task training.

    An epoch has as many steps as all tasks have batches, under every rule, and shares them out exactly rather than by
    chance. A task's rows come in shuffled passes that go on from epoch to epoch, so that none returns before all others
    of its task have had their turn; a pass's last batch may be smaller.

    Args:
        rows: training rows of each task.
        batch_size: rows a step at most.
        epochs: how many.
        mixing: "proportional" to the tasks' batches, so that an epoch sees every row once; "uniform", equally many
            steps a task; "annealed" from the first towards the second: in proportion to the number of batches to the
            power of 1, falling by equal steps to 0.2 in the last epoch (0.6 where there is only one).
        seed: of all shuffling.

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
    """Shares an epoch's steps out among tasks.

    Args:
        batches: of each task.
        power: shares are in proportion to the number of batches to this power; 1 gives `batches` itself.

    Returns:
        Steps of each task; their sum is that of `batches`, and none is 0 for a power in [0, 1].
    """
    weights = np.asarray(batches, dtype=np.float64) ** power
    ideal = weights * (sum(batches) / weights.sum())
    counts = np.floor(ideal + 1e-9).astype(int)
    # The largest remainders get what rounding down has left over.
    for task in np.argsort(counts - ideal, kind="stable")[: sum(batches) - counts.sum()]:
        counts[task] += 1
    return [int(count) for count in counts]


def _power(mixing: Mixing, epoch: int, epochs: int) -> float:
    if mixing == "annealed":
        return 1.0 - 0.8 * (epoch / (epochs - 1) if epochs > 1 else 0.5)
    return {"proportional": 1.0, "uniform": 0.0}[mixing]


def _stream(rows: int, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of one task without end."""
    while True:
        order = generator.permutation(rows)
        yield from (order[start : start + batch_size] for start in range(0, rows, batch_size))

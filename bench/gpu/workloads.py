"""Sequence lengths of the benchmarks: fixed ones, and the distributions of real tasks."""

from dataclasses import dataclass

import torch

from bench.gpu.measure import Setting
from ticketops.ops import Sequences

#: The 0, 5, 10, ..., 100 % quantiles of the lengths, in word pieces, of two GLUE training sets (bert-base-uncased,
#: special tokens included). `task_lengths` truncates them to MAX_LENGTH, as in fine-tuning. "mnli-assumed" is not
#: measured: it is a log-normal distribution with median 36 and sigma 0.45.
QUANTILES = {
    "sst2": (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 66),
    "rte": (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 135, 157, 289),
    "mnli-assumed": (11, 17, 20, 23, 25, 27, 28, 30, 32, 34, 36, 38, 40, 43, 46, 49, 53, 57, 64, 76, 116),
}
MAX_LENGTH = 128


@dataclass(frozen=True)
class Workload:
    """Sequences to measure on.

    Attributes:
        name: name in the results.
        lengths: number of tokens of each sequence.
    """

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def width(self) -> int:
        return max(self.lengths)

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width

    def sequences(self, device: str) -> Sequences:
        packed = Sequences.from_lengths(list(self.lengths))
        return Sequences(packed.starts.to(device), packed.lengths.to(device), packed.max_length)

    def real(self, device: str) -> torch.Tensor:
        """Returns the mask of the padded batch: bool [B, S], True for real tokens."""
        return torch.arange(self.width, device=device) < torch.tensor(self.lengths, device=device)[:, None]


def task_lengths(task: str, batch: int, seed: int = 0) -> tuple[int, ...]:
    """Draws the sequence lengths of a batch from a task's distribution.

    Args:
        task: a key of QUANTILES.
        batch: number of sequences.
        seed: seed of the random numbers.

    Returns:
        The number of tokens of each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor(QUANTILES[task], dtype=torch.float64)
    place = torch.rand(batch, generator=generator, dtype=torch.float64) * (len(steps) - 1)
    below = place.long()
    lengths = steps[below] + (place - below) * (steps[below + 1] - steps[below])
    return tuple(lengths.round().long().clamp(max=MAX_LENGTH).tolist())


def tasks(setting: Setting) -> list[str]:
    """Returns the keys of QUANTILES to measure. Tiny batches are the same for every task."""
    return list(QUANTILES)[: 1 if setting.tiny else None]


def workloads(setting: Setting) -> list[Workload]:
    """Returns the workloads of the attention benchmark, of 4k to 64k tokens."""
    if setting.tiny:
        return [Workload("2 x 4", (4, 4)), Workload("ragged", (5, 2))]
    some = []
    for tokens in (4096, 16384, 65536):
        some += [
            Workload(f"{tokens // length} x {length}", (length,) * (tokens // length)) for length in (64, 128, 256, 512)
        ]
        for task in QUANTILES:
            mean = sum(task_lengths(task, 4096)) / 4096
            batch = round(tokens / mean)
            some.append(Workload(f"lengths of {task}, batch {batch}", task_lengths(task, batch)))
    return some

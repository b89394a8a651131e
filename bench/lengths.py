"""Sequence lengths of the benchmarks: the distributions of real tasks, and even ones."""

import torch

#: The 0, 5, 10, ..., 100 % quantiles of the lengths, in word pieces, of two GLUE training sets (bert-base-uncased,
#: special tokens included). `draw` truncates them, as in fine-tuning. "mnli-assumed" is not
#: measured: it is a log-normal distribution with median 36 and sigma 0.45.
QUANTILES = {
    "sst2": (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 66),
    "rte": (13, 29, 33, 37, 40, 43, 45, 47, 50, 53, 56, 59, 62, 67, 72, 85, 103, 120, 135, 157, 289),
    "mnli-assumed": (11, 17, 20, 23, 25, 27, 28, 30, 32, 34, 36, 38, 40, 43, 46, 49, 53, 57, 64, 76, 116),
}
#: Longest row, in tokens.
MAX_LENGTH = 128


def draw(task: str, rows: int, seed: int = 0, longest: int = MAX_LENGTH) -> tuple[int, ...]:
    """Draws the sequence lengths of a batch from a task's distribution.

    Args:
        task: a key of QUANTILES, or the number of tokens that every row has, such as "512".
        rows: number of sequences.
        seed: seed of the random numbers.
        longest: number of tokens that a task's rows are truncated to.

    Returns:
        The number of tokens of each sequence.
    """
    if task not in QUANTILES:
        return (int(task),) * rows
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor(QUANTILES[task], dtype=torch.float64)
    place = torch.rand(rows, generator=generator, dtype=torch.float64) * (len(steps) - 1)
    below = place.long()
    lengths = steps[below] + (place - below) * (steps[below + 1] - steps[below])
    return tuple(lengths.round().long().clamp(max=longest).tolist())


def rows_of(task: str, tokens: int, longest: int = MAX_LENGTH) -> int:
    """Returns how many rows of a task, truncated to `longest` tokens, have about a number of tokens together."""
    many = draw(task, 4096, longest=longest)
    return max(1, round(tokens * len(many) / sum(many)))

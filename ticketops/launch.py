"""Which of the processes that torchrun or accelerate launch has started this one is. Imports no torch."""

import os


def processes() -> int:
    """Number of processes that were started to train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Number of this one among them, from 0."""
    return int(os.environ.get("RANK") or 0) if processes() > 1 else 0


def follows() -> bool:
    """True in all of them but the first one, which leads."""
    return rank() > 0

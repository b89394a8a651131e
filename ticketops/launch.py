"""Which of the processes that torchrun or accelerate launch has started this one is. Imports no torch."""

import os


def processes() -> int:
    """Number of processes that were started to train together; 1 where no launcher has started this one."""
    # Others set WORLD_SIZE, too; the launchers say which process is which.
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Number of this one among them, from 0."""
    return int(os.environ.get("RANK") or 0) if processes() > 1 else 0


def follows() -> bool:
    """True in all of them but the first one, which leads."""
    return rank() > 0

"""How many structures a sparsity prunes."""

import math

from ticketops.errors import InputError


def level_counts(sparsity: float, layers: int, heads: int, neurons: int | None = None) -> tuple[int, int]:
    """Computes the number of structures that a sparsity prunes: that share of heads and of FFNs, rounded down.

    Args:
        sparsity: share to prune, in [0, 1).
        layers: number of encoder layers.
        heads: number of heads per layer.
        neurons: number of neurons per FFN, to prune single neurons instead of whole FFNs; else None.

    Returns:
        Numbers of heads and of FFNs (with `neurons`: of neurons) to prune.

    Raises:
        InputError: the sparsity is outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is outside [0, 1); use for example 0.3 to prune 30 %")

    def floor(structures: int) -> int:
        # Rounded first, because 0.29 * 100 is 28.999999999999996 where 29 is meant.
        return math.floor(round(float(sparsity) * structures, 6))

    return floor(layers * heads), floor(layers * (neurons or 1))

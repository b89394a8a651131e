"""How near a result must be where exact equality is not promised: in roundings of its dtype, one rule for all tests."""

import torch


def roundings(relative: float, absolute: float | None = None, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Bounds for torch.testing.assert_close.

    Sums in another order, and products by another library or instruction set, differ by some roundings. Each must allow
    one at least: numbers that were computed in float32 differ by 1.2e-7, in whatever dtype they are kept afterwards.

    Args:
        relative: roundings of the value itself.
        absolute: roundings of the terms that it is a sum of, times their size; None for the same as `relative`.
        dtype: in which the result was computed.

    Returns:
        rtol and atol.
    """
    eps = torch.finfo(dtype).eps
    return {"rtol": relative * eps, "atol": (relative if absolute is None else absolute) * eps}

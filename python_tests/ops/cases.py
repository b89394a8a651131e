"""Inputs, backends and bounds that the tests of all ops share."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ticketops.ops import Sequences, backends, cuda_extension, memory

#: Empty, single, prime and long sequences, in no order.
RAGGED = [3, 0, 1, 61, 16, 17, 0, 128, 37, 513]
SHORT = [5, 0, 1, 13, 8]


def need(backend: str, op: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Skips a test where a backend cannot run."""
    if backend not in backends.BACKENDS[device]:
        pytest.skip(f"{backend} does not serve {device}")
    refusal = backends._module(op, backend).refusal(torch.device(device), dtype)
    if refusal is not None:
        pytest.skip(f"{backend}: {refusal}")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills new tensors with NaN, so that an element nobody wrote shows."""
    places: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (memory, "from_dlpack")]
    originals = [getattr(module, name) for module, name in places]

    def poison(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def created(*args, **kwargs):
            x = create(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return created

    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, poison(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def padded_sequences(lengths: list[int]) -> tuple[Sequences, int]:
    """Sequences with rows of no sequence before, between and behind them, and the number of rows."""
    starts, row = [], 2
    for n in lengths:
        starts.append(row)
        row += n + 3
    make = lambda numbers: torch.tensor(numbers, dtype=torch.int32)  # noqa: E731
    return Sequences(make(starts), make(lengths), max(lengths, default=0)), row


def packed_sequences(lengths: list[int]) -> tuple[Sequences, int]:
    """Sequences one behind the other, and the number of rows."""
    return Sequences.from_lengths(lengths), sum(lengths)


def with_holes(sequences: Sequences, rows: int, share: float = 0.4) -> Sequences:
    """The same sequences, with this share of their rows as holes; as in a mask, none is first or last."""
    real = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) > share
    for start, end in sequences.spans():
        if end > start:
            real[[start, end - 1]] = True
    return dataclasses.replace(sequences, real=real.to(sequences.starts.device))


def strided(x: Tensor) -> Tensor:
    """The same values [T, H, D] as a view into a wider tensor, as q, k and v lie in a fused projection."""
    wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 5), float("nan"), dtype=x.dtype)
    view = wide[:, :, 2:-3]
    view.copy_(x)
    return view


def assert_as_good(
    got: Tensor, plain: Tensor, exact: Tensor, factor: float, what: str, terms: Tensor | None = None
) -> None:
    """Checks that a result is as near to float64 as plain PyTorch of the same dtype gets.

    Args:
        got: the result under test.
        plain: the reference backend's in the same dtype.
        exact: the reference backend's in float64.
        factor: 2 for forward passes, 3 for gradients.
        what: for the message.
        terms: for a sum of terms of both signs, the sum of their absolute values.
    """
    assert torch.isfinite(got).all(), f"{what}: not finite"
    assert got.shape == exact.shape, what
    if not exact.numel():
        return
    error, bound = ((x.double() - exact).abs().max().item() for x in (got, plain))
    # A few roundings of the largest value, which plain PyTorch may happen to escape.
    largest = (exact if terms is None else terms).abs().max().item()
    floor = 4 * torch.finfo(got.dtype).eps * largest
    assert error <= factor * bound + floor, f"{what}: error {error:.3g}, plain PyTorch {bound:.3g}, floor {floor:.3g}"


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Collects the names of the kernels that are launched."""
    names: list[str] = []
    run = cuda_extension.run

    def counted(kernel, *args):
        names.append(kernel.__name__)
        run(kernel, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_extension, "run", counted)
        yield names

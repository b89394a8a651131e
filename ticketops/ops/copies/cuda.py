"""Gathering and scattering slices on the GPU, one launch for a whole table of copies: csrc/cuda/copies.cu."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ticketops.errors import UnsupportedError
from ticketops.ops import cuda_extension as cuda
from ticketops.ops.copies import Slices, reference

#: The kernel divides with 32-bit integers.
_MOST_VECTORS = 2**31
_DENSE = torch.contiguous_format


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why this kernel cannot serve a device, or None. It serves any dtype, as plain bytes."""
    return cuda.refusal(device)


@torch.no_grad()
def gather(slices: list[Slices], out: list[Tensor]) -> None:
    """See ticketops.ops.copies.gather."""
    copies = [copy if copy.is_contiguous() else torch.empty_like(copy, memory_format=_DENSE) for copy in out]
    _run(slices, copies, scatter=False)
    for target, copy in zip(out, copies, strict=True):
        if copy is not target:
            target.copy_(copy)
        else:
            # The kernel writes without autograd's knowledge, so report the write.
            torch.autograd.graph.increment_version(target)


@torch.no_grad()
def scatter(slices: list[Slices], values: list[Tensor]) -> None:
    """See ticketops.ops.copies.scatter."""
    _run(slices, [value.contiguous() for value in values], scatter=True)
    for each in slices:
        torch.autograd.graph.increment_version(each.tensor)


def prepared(slices: list[Slices], parts: list[Tensor], back: bool) -> Callable[[], None]:
    """See ticketops.ops.copies.reference.prepared. The table of copies is rebuilt at each run."""
    return partial(scatter if back else gather, slices, parts)


def _run(slices: list[Slices], parts: list[Tensor], scatter: bool) -> None:
    table: list[list[int]] = []
    blocks = 0
    device = slices[0].tensor.device
    # Keeps the tensors whose addresses are in the table alive until the kernel is queued.
    alive: list[Tensor] = []
    for each, part in zip(slices, parts, strict=True):
        if not part.numel():
            continue
        row = _row(each, part, scatter)
        if row is None:
            # The slices are not contiguous blocks, or the tensor is too large for the kernel.
            if scatter:
                reference.scatter([each], [part])
            else:
                reference.gather([each], [part])
            continue
        # Checked again: a prepared copy may run long after its tensors were checked.
        for name, x in (("a tensor", each.tensor), ("its slices", part), ("their index", each.index)):
            cuda.checked(name, x, device, x.dtype, *x.shape)
        index = each.index.contiguous()
        alive.append(index)
        table.append([*row[:2], index.data_ptr(), *row[2:], blocks])
        blocks += -(-row[4] // cuda.kernels.block_vectors)
    if not table:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Replays of the graph would read the table's memory after it has been freed and used for something else.
        raise UnsupportedError(
            "slices of weights cannot be copied while a CUDA graph is captured, as for a ticket that is applied an "
            "optimizer's step copies them: capture forward and backward passes, and step outside the graph"
        )
    on_host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    copied = on_host.to(device, non_blocking=True)
    on_device = cuda.checked("the table", copied, device, torch.int64, len(table), _FIELDS)
    cuda.run(cuda.kernels.copy_table, device, on_device.data_ptr(), len(table), blocks)


#: Number of fields in struct Copy, csrc/cuda/kernels.h.
_FIELDS = 12


def _row(slices: Slices, part: Tensor, scatter: bool) -> list[int] | None:
    """Returns a row of the table, without its index and first block; None if the kernel does not support this copy."""
    tensor, dim = slices.tensor, slices.dim
    if not tensor.is_contiguous() or tensor.layout != torch.strided:
        return None
    slice_bytes = math.prod(tensor.shape[dim:]) // slices.groups * tensor.element_size()
    whole_bytes, part_bytes = slices.groups * slice_bytes, len(slices.index) * slice_bytes
    rows = math.prod(tensor.shape[:dim])
    ends = [(part.data_ptr(), part_bytes), (tensor.data_ptr(), whole_bytes)]
    if not scatter:
        ends.reverse()
    (source, source_row), (target, target_row) = ends
    width = math.gcd(16, source, target, slice_bytes)
    width = 4 if width == 8 else width
    vectors = rows * part_bytes // width
    if vectors >= _MOST_VECTORS:
        return None
    slice_vectors = slice_bytes // width
    row_vectors = len(slices.index) * slice_vectors
    return [
        source,
        target,
        int(scatter),
        width,
        vectors,
        row_vectors,
        slice_vectors,
        source_row,
        target_row,
        slice_bytes,
    ]

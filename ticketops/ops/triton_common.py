"""Code that the Triton backends of all ops share: the check of device and dtype, the launch of kernels, and device
functions for dropout and for rows outside all sequences."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import private
from ticketops.ops.triton_configs import Tile

#: Triton reads TRITON_INTERPRET when a kernel is decorated, so later changes of the variable have no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret
#: Set explicitly, because Triton's default for fusing multiply and add differs between versions.
FP_FUSION = True
#: Pointers to a number for each row, sequence or call. Their alignment gains nothing, and specialising on it would
#: compile kernels twice.
UNALIGNED = ["p_starts", "p_lengths", "p_seed", "p_real", "p_mean", "p_rstd"]
#: The oldest GPUs with bfloat16 tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)

_Recorder = Callable[[Any, Tile, dict[str, Any]], None]
_recorder: ContextVar[tuple[tuple[int, int], _Recorder] | None] = ContextVar("recorder", default=None)


@cache
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why the Triton kernels cannot serve a device and dtype.

    Args:
        device: device of the tensors.
        dtype: dtype of the tensors.

    Returns:
        The reason, or None if they can.
    """
    if dtype == torch.float64:
        return "its kernels sum in float32, which is too coarse for float64"
    if INTERPRETED:
        return "Triton's interpreter multiplies bfloat16 blocks wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"Triton serves {device.type} only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
    if capability(device) < OLDEST_CAPABILITY:
        return "its kernels need compute capability 8.0 or newer, this GPU has {}.{}".format(*capability(device))
    return None


@cache
def _device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_CAPABILITY


def capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability that launches on a device are configured for.

    Args:
        device: device of the tensors; one that is not a GPU counts as the oldest supported GPU.

    Returns:
        Major and minor number.
    """
    recording = _recorder.get()
    return _device_capability(device) if recording is None else recording[0]


def product_precision(dtype: torch.dtype) -> str:
    """Returns the `input_precision` for `tl.dot`: "tf32" for float32 if torch.backends.cuda.matmul.fp32_precision is
    "tf32", else "ieee".

    Args:
        dtype: dtype of the factors.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@contextmanager
def recorded_launches(target: tuple[int, int], recorder: _Recorder) -> Iterator[None]:
    """Passes every launch to a function instead of the GPU, so that kernels can be compiled for a GPU that this machine
    does not have.

    Args:
        target: compute capability to choose tiles for, e.g. (9, 0).
        recorder: called with the kernel, its tile and its arguments by name.
    """
    token = _recorder.set((target, recorder))
    try:
        yield
    finally:
        _recorder.reset(token)


def compile_options(tile: Tile) -> dict[str, Any]:
    """Returns a tile's options for Triton's compiler, by Triton's names.

    Args:
        tile: tile with the number of warps, pipeline stages and registers.
    """
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": FP_FUSION}
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


def cdiv(size: int, block: int) -> int:
    """Returns size / block rounded up. triton.cdiv takes 7 us, as long as the kernels of a small batch."""
    return -(-size // block)


class Part:
    """A part of a tensor as an argument of a kernel. Unlike a view, it takes no call of torch to make.

    Args:
        whole: the tensor.
        first: number of elements in front of the part.
        shape: the part's shape.
        strides: its strides; None for those of a contiguous tensor.
    """

    __slots__ = ("_strides", "device", "dtype", "first", "shape", "whole")

    def __init__(self, whole: Tensor, first: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None):
        self.whole, self.first, self.shape = whole, first, shape
        self.device, self.dtype = whole.device, whole.dtype
        self._strides = strides

    def data_ptr(self) -> int:
        """Returns the address of the first element."""
        return self.whole.data_ptr() + self.first * self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        """Returns the strides in elements."""
        if self._strides is None:
            self._strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return self._strides

    def view(self) -> Tensor:
        """Returns the part as a tensor."""
        return self.whole.as_strided(self.shape, self.stride(), self.whole.storage_offset() + self.first)

    def contiguous(self) -> Tensor:
        """Returns the part as a contiguous tensor."""
        return self.view().contiguous()


def clear(*tensors: Tensor | Part) -> None:
    """Fills tensors with zeros."""
    for x in tensors:
        (x if isinstance(x, Tensor) else x.view()).zero_()


def thirds(qkv: Tensor, shape: tuple[int, int, int]) -> tuple[Part, Part, Part]:
    """Returns queries, keys and values.

    Args:
        qkv: contiguous [T, 3 * H * D].
        shape: T, H and D.
    """
    _, heads, size = shape
    width = heads * size
    q, k, v = (Part(qkv, i * width, shape, (3 * width, size, 1)) for i in range(3))
    return q, k, v


def transposed(x: Tensor) -> Tensor:
    """Returns a matrix transposed, in one call of torch; `x.t()` makes three of them.

    Args:
        x: [N, C].
    """
    rows, columns = x.shape
    stride, step = x.stride()
    return x.as_strided((columns, rows), (step, stride))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x weight^T + bias, in fewer calls of torch than `functional.linear`.

    Args:
        x: [T, C].
        weight: [N, C].
        bias: [N]; None for none.
    """
    weight = transposed(weight)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.view() if isinstance(x, Part) else x for name, x in arguments.items()}


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Launches a kernel over a flat grid on the device of its tensors, without waiting for it. The tensors must be
    strided and on one device, which every op checks (`registration.check_devices`): the kernel only sees addresses.

    Triton's own launch of a compiled kernel takes longer than the kernels of a small batch: 130 us with thirty
    arguments, where `aten::empty` takes 5 (bench/results/first-look-nvidia-h200.md). Most of it is spent on inspecting
    each argument. This function caches compiled kernels by what Triton specialises on, and launches them directly.

    Args:
        kernel: a function decorated with triton.jit.
        programs: number of programs in the grid, which has one axis, because the other two end at 65535.
        tile: tile with the number of warps, pipeline stages and registers.
        arguments: the kernel's arguments by name; a tensor may be a `Part`.
    """
    recording = _recorder.get()
    if recording is not None:
        recording[1](kernel, tile, _as_tensors(arguments))
        return
    if INTERPRETED:
        kernel[(programs,)](**_as_tensors(arguments), **compile_options(tile))
        return
    plan = _plans.get(kernel.fn) or _plan(kernel)
    values = plan.ordered(arguments)
    addresses = list(values)
    kinds: list[Any] = []
    tensor: Any = None
    for place, aligned in plan.pointers:
        if values[place] is None:
            kinds.append(None)
            continue
        tensor = values[place]
        addresses[place] = address = tensor.data_ptr()
        kinds.append(tensor.dtype)
        if aligned and address % 16:
            kinds.append(place)
    device = tensor.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, tile, **arguments)
        return
    key = (kernel.fn, device.index, tile, plan.others(values), *kinds)
    # Only Triton's own launch calls the hooks of profilers.
    watched = private.follows_launches()
    compiled = None if watched else _launched.get(key)
    if compiled is None:
        asked = (kernel.fn, device.index, tile, plan.asked(values), *kinds)
        compiled = None if watched else _compiled.get(asked)
        if len(_launched) >= MOST_LAUNCHED:
            _launched.clear()
        if compiled is None:
            compiled = kernel[(programs,)](**_as_tensors(arguments), **compile_options(tile))
            if private.can_launch(compiled):
                _launched[key] = _compiled[asked] = compiled
            return
        _launched[key] = compiled
    private.launch_compiled(compiled, programs, private.raw_stream(device.index), addresses)


@dataclass(frozen=True)
class _Plan:
    """Positions of a kernel's arguments by their kind, worked out once per kernel.

    Attributes:
        ordered: returns the values of a dict of arguments in the kernel's order.
        pointers: for each tensor, its position and True if Triton specialises on 16-byte alignment of its address.
        others: selects the arguments that are not tensors from the ordered ones.
        constants: selects the kernel's constexpr arguments from the ordered ones.
        numbers: positions of arguments that are neither tensors nor constexpr.
    """

    ordered: Callable[[dict[str, Any]], tuple[Any, ...]]
    pointers: list[tuple[int, bool]]
    others: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    constants: Callable[[tuple[Any, ...]], Any]
    numbers: list[int]

    def asked(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the properties of non-tensor arguments that Triton specialises kernels on: the values of constants,
        the types of numbers, and for an integer if it is 1, a multiple of 16, and within 32 or 64 bits."""
        found = [self.constants(values)]
        for place in self.numbers:
            value = values[place]
            found.append(type(value))
            if type(value) is int:
                found.append((value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31, value < 1 << 63))
        return tuple(found)


def _plan(kernel: Any) -> _Plan:
    names = [parameter.name for parameter in kernel.params]
    are_pointers = [name.startswith("p_") for name in names]
    pointers = [
        (place, not parameter.do_not_specialize_on_alignment)
        for place, parameter in enumerate(kernel.params)
        if are_pointers[place]
    ]
    others = [place for place, is_pointer in enumerate(are_pointers) if not is_pointer]
    constants = [place for place in others if kernel.params[place].is_constexpr]
    numbers = [place for place in others if place not in constants]
    plan = _Plan(itemgetter(*names), pointers, itemgetter(*others), itemgetter(*constants), numbers)
    _plans[kernel.fn] = plan
    return plan


#: Plans by the kernel's Python function.
_plans: dict[Any, _Plan] = {}
#: Compiled kernels by everything that Triton specialises on.
_compiled: dict[tuple[Any, ...], Any] = {}
#: Compiled kernels by the values of all arguments, a cache in front of `_compiled` with a cheaper key. All layers of a
#: model launch with equal values, so only the first launch for each batch size looks into `_compiled`.
_launched: dict[tuple[Any, ...], Any] = {}
MOST_LAUNCHED = 4096


@triton.jit
def mix(x):
    """Scrambles uint32 words as ticketops.ops.dropout does."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(p_seed, i_row, o_rows, i_head, heads):
    """Part of the dropout hash that depends on the rows i_row + o_rows and the head: uint32, shaped as `o_rows`."""
    seed = tl.load(p_seed)
    first = ((seed + i_row * heads + i_head) & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(o_rows.to(tl.uint32) * heads + first) ^ high


@triton.jit
def dropout_keeps(b_rows, o_columns, threshold):
    """Dropout mask, True if kept, from the result of `dropout_rows` and column numbers; the shapes broadcast."""
    word = mix(b_rows + o_columns.to(tl.uint32) * 0x9E3779B9)
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def owned_rows(p_starts, p_lengths, batch, tokens, i_b):
    """Rows [first, last) that sequence i_b is responsible for: its own tokens and the rows outside all sequences that
    follow it; the first sequence also gets those before it. Every row has exactly one owner, whatever the order of
    the sequences in memory."""
    SCAN: tl.constexpr = 256
    start = tl.load(p_starts + i_b)
    length = tl.load(p_lengths + i_b)
    earliest = tokens
    following = tokens
    for i in range(0, batch, SCAN):
        o_b = i + tl.arange(0, SCAN)
        b_lengths = tl.load(p_lengths + o_b, mask=o_b < batch, other=0)
        b_starts = tl.load(p_starts + o_b, mask=b_lengths > 0, other=tokens)
        earliest = tl.minimum(earliest, tl.min(b_starts, 0))
        following = tl.minimum(following, tl.min(tl.where(b_starts > start, b_starts, tokens), 0))
    first = tl.where(start == earliest, 0, start)
    # An empty sequence owns nothing, unless all are empty: then sequence 0 owns all rows.
    alone = (earliest == tokens) & (i_b == 0)
    first = tl.where(length > 0, first, 0)
    last = tl.where(length > 0, following, tl.where(alone, tokens, 0))
    return first, last


@triton.jit
def zero_rows(p_x, first, last, width, stride, i_part, parts):
    """Writes zeros to rows [first, last) of a [T, width] matrix. The rows are shared among `parts` programs; this is
    number i_part."""
    BLOCK: tl.constexpr = 1024
    b_zero = tl.zeros([BLOCK], dtype=p_x.dtype.element_ty)
    begin = (first + i_part).to(tl.int64) * stride
    end = last.to(tl.int64) * stride
    for i_row in range(begin, end, parts * stride):
        for i in range(0, width, BLOCK):
            o_x = i + tl.arange(0, BLOCK)
            tl.store(p_x + i_row + o_x, b_zero, mask=o_x < width)


@triton.jit
def owned_gaps(p_starts, p_lengths, batch, tokens, i_b):
    """Rows outside all sequences that sequence i_b owns, as two runs: [first, second) and [third, last)."""
    first, last = owned_rows(p_starts, p_lengths, batch, tokens, i_b)
    length = tl.load(p_lengths + i_b)
    # All rows that an empty sequence owns are outside sequences.
    start = tl.where(length > 0, tl.load(p_starts + i_b), last)
    return first, start, start + length, last


@triton.jit
def zero_gaps(p_x, first, second, third, last, width, stride, i_part, parts):
    """Writes zeros to the rows that `owned_gaps` returned."""
    zero_rows(p_x, first, second, width, stride, i_part, parts)
    zero_rows(p_x, third, last, width, stride, i_part, parts)

"""What the Triton backends of all ops share: when they can serve, how a kernel is launched, and the device functions
for dropout and for rows that belong to no sequence."""

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

from ticketops.ops import private
from ticketops.ops.registration import check_devices
from ticketops.ops.triton_configs import Tile

#: Triton reads TRITON_INTERPRET where a kernel is decorated, so it is fixed once this module is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
#: Contraction into fused multiply-adds is pinned, since Triton's default for it changes between versions.
FP_FUSION = True
#: Arguments read element by element, whose alignment would only have kernels compiled twice.
UNALIGNED = ["p_starts", "p_lengths", "p_seed"]
#: The oldest GPUs with bfloat16 tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)

_Recorder = Callable[[Any, Tile, dict[str, Any]], None]
_recorder: ContextVar[tuple[tuple[int, int], _Recorder] | None] = ContextVar("recorder", default=None)


@cache
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why the Triton kernels cannot serve a device and dtype.

    Args:
        device: where the tensors lie.
        dtype: their dtype.

    Returns:
        The reason, or None where they can.
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
    """The compute capability that a launch on a device is configured for.

    Args:
        device: where the tensors lie; anything but a GPU counts as the oldest supported one.

    Returns:
        Major and minor number.
    """
    recording = _recorder.get()
    return _device_capability(device) if recording is None else recording[0]


def product_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 in float32, unless torch.backends.cuda.matmul.fp32_precision is "tf32".

    Args:
        dtype: of the factors.

    Returns:
        The dot's input_precision.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@contextmanager
def recorded_launches(target: tuple[int, int], recorder: _Recorder) -> Iterator[None]:
    """Hands every launch to a function instead of the GPU, so that kernels can be compiled for a GPU that is not there.

    Args:
        target: the compute capability to configure for.
        recorder: gets the kernel, its tile and its arguments by name.
    """
    token = _recorder.set((target, recorder))
    try:
        yield
    finally:
        _recorder.reset(token)


def compile_options(tile: Tile) -> dict[str, Any]:
    """What Triton's compiler is told besides the kernel's own constants.

    Args:
        tile: gives warps, stages and the limit of registers.

    Returns:
        The options by Triton's names.
    """
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": FP_FUSION}
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


def cdiv(size: int, block: int) -> int:
    """How many blocks hold a size. Triton's own takes 7 us, which kernels of a small batch take, too."""
    return -(-size // block)


def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
    """Launches a kernel over a flat grid on the device of its tensors, without waiting for it.

    Triton's own way to a compiled kernel takes longer than the kernels of a small batch: 130 us for one of thirty
    arguments where `aten::empty` takes 5 (bench/results/first-look-nvidia-h200.md), most of it on looking at each
    argument anew. Here a kernel that was launched with such arguments before is called at once.

    Args:
        kernel: a function decorated with triton.jit.
        programs: size of the grid; one flat axis, because the others end at 65535.
        tile: gives warps and stages.
        arguments: the kernel's arguments by name.

    Raises:
        InputError: a tensor that lies on another device than the first, or has no memory that a kernel could read.
    """
    recording = _recorder.get()
    if recording is not None:
        recording[1](kernel, tile, arguments)
        return
    if INTERPRETED:
        _check(kernel, arguments)
        kernel[(programs,)](**arguments, **compile_options(tile))
        return
    plan = _plans.get(kernel.fn) or _plan(kernel)
    values = plan.ordered(arguments)
    addresses = list(values)
    kinds: list[Any] = []
    device: Any = None
    for place, aligned in plan.pointers:
        tensor = values[place]
        if tensor is None:
            kinds.append(None)
            continue
        # Every time: a module may have been moved since it was launched first, and an address says nothing of that.
        if device is None:
            device = tensor.device
        if tensor.device != device or tensor.layout is not torch.strided:
            _check(kernel, arguments)
        address = tensor.data_ptr()
        addresses[place] = address
        kinds.append(tensor.dtype)
        if aligned and address % 16:
            kinds.append(place)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, tile, **arguments)
        return
    key = (kernel.fn, device.index, tile, plan.others(values), *kinds)
    # A profiler that is to be told of launches hooks into Triton's own way.
    watched = private.follows_launches()
    compiled = None if watched else _launched.get(key)
    if compiled is None:
        asked = (kernel.fn, device.index, tile, plan.asked(values), *kinds)
        compiled = None if watched else _compiled.get(asked)
        if len(_launched) >= MOST_LAUNCHED:
            _launched.clear()
        if compiled is None:
            compiled = kernel[(programs,)](**arguments, **compile_options(tile))
            if private.can_launch(compiled):
                _launched[key] = _compiled[asked] = compiled
            return
        _launched[key] = compiled
    private.launch_compiled(compiled, programs, private.raw_stream(device.index), addresses)


def _check(kernel: Any, arguments: dict[str, Any]) -> None:
    names = (name.removeprefix("p_") for name in arguments)
    check_devices(f"the Triton kernel {getattr(kernel.fn, '__name__', '')}", names, arguments.values())


@dataclass(frozen=True)
class _Plan:
    """How a kernel's arguments are looked at.

    Attributes:
        ordered: takes them by name, gives them in their order.
        pointers: the place of each tensor, and whether it matters that it begins at a multiple of 16 bytes.
        others: takes them in their order, gives those that are no tensors.
        constants: takes them in their order, gives those that are the kernel's constants.
        numbers: the places of what is neither.
    """

    ordered: Callable[[dict[str, Any]], tuple[Any, ...]]
    pointers: list[tuple[int, bool]]
    others: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    constants: Callable[[tuple[Any, ...]], Any]
    numbers: list[int]

    def asked(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What Triton asks of arguments that are no tensors: constants, and of each number its type and, of an integer,
        whether it is 1, a multiple of 16, and within 32 or 64 bits."""
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


#: By a kernel's function.
_plans: dict[Any, _Plan] = {}
#: Compiled kernels by all that Triton compiles a kernel anew for.
_compiled: dict[tuple[Any, ...], Any] = {}
#: The same by the values of all numbers, which takes less time to ask: the layers of a model launch the same again and
#: again, and only the first launch of a batch of another size looks into `_compiled`.
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
    """The part of a dropout word that depends on the row i_row + o_rows and the head: uint32, shaped as `o_rows`."""
    seed = tl.load(p_seed)
    first = ((seed + i_row * heads + i_head) & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(o_rows.to(tl.uint32) * heads + first) ^ high


@triton.jit
def dropout_keeps(b_rows, o_columns, threshold):
    """Which weights are kept, from `dropout_rows` and column numbers of shapes that broadcast."""
    word = mix(b_rows + o_columns.to(tl.uint32) * 0x9E3779B9)
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def owned_rows(p_starts, p_lengths, batch, tokens, i_b):
    """The rows [first, last) that sequence i_b answers for: its own, those of no sequence behind it, and for the first
    sequence those before it. Every row has one owner, in whatever order the sequences lie."""
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
    """Writes zeros to rows [first, last) of a [T, width] matrix; part i_part of `parts` does its share."""
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
    """The rows of no sequence that sequence i_b owns, as two runs: [first, second) and [third, last)."""
    first, last = owned_rows(p_starts, p_lengths, batch, tokens, i_b)
    length = tl.load(p_lengths + i_b)
    # An empty sequence that owns rows has all of them to clear.
    start = tl.where(length > 0, tl.load(p_starts + i_b), last)
    return first, start, start + length, last


@triton.jit
def zero_gaps(p_x, first, second, third, last, width, stride, i_part, parts):
    """Writes zeros to the rows that `owned_gaps` gave."""
    zero_rows(p_x, first, second, width, stride, i_part, parts)
    zero_rows(p_x, third, last, width, stride, i_part, parts)

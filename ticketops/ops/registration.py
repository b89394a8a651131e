"""Registration of ops with torch: a schema, one implementation for all devices, a fake for tracing and an autograd
formula; and the checks that each call of an op needs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import private

_library = torch.library.Library("ticketops", "FRAGMENT")
#: Argument types that cannot intercept an op's call, as a tensor subclass can.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype})


def _no_second_derivative(name: str) -> Callable:
    def refuse(ctx, *gradients):
        raise UnsupportedError(f"{name} has no second derivative: take gradients without create_graph=True")

    return refuse


def refuse_batched(subject: str, *gradients: Tensor | None, otherwise: str = "revert() the model for it") -> None:
    """Refuses gradients that stand for several, as under `torch.autograd.grad(is_grads_batched=True)`.

    Args:
        subject: what has no backward pass for them, and its verb.
        gradients: of its results; None for none.
        otherwise: what to do where they are needed.

    Raises:
        UnsupportedError: a gradient stands for several.
    """
    if any(gradient is not None and private.is_batched(gradient) for gradient in gradients):
        raise UnsupportedError(
            f"{subject} no backward pass for several gradients at once, as under is_grads_batched=True or "
            f"vectorize=True: take them one by one, or {otherwise}"
        )


def _formula(name: str, backward: Callable, setup_context: Callable) -> tuple[Callable, Callable]:
    """Wraps an op's autograd formula, so that it runs only if some output has a gradient; outputs without one have
    None."""

    def setup(ctx, inputs, output):
        # Outputs that only the backward pass reads have no gradient: do not fill tensors of zeros for them.
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def gradients(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(f"{name} has", *gradients)
        return backward(ctx, *gradients)

    return gradients, setup


def is_watched(*arguments: object) -> bool:
    """True if a compiler, tracer, torch.func transform or dispatch mode is active, or if an argument is a tensor
    subclass or a meta tensor. Then the op must go through torch's dispatcher; otherwise its implementation may be
    called directly.

    Args:
        arguments: the op's arguments.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or private.has_modes()
        or private.in_transform()
        or private.in_forward_ad()
        or not _PLAIN.issuperset(map(type, arguments))
        or any(isinstance(x, Tensor) and x.is_meta for x in arguments[:1])
    )


def _refuse_transforms(name: str, arguments: tuple[object, ...]) -> None:
    """Refuses torch.func transforms and forward-mode differentiation, which kernels that take addresses cannot
    support."""
    if private.in_transform():
        raise UnsupportedError(
            f"{name} does not run under torch.func's transforms (vmap, grad, jvp, ...): take gradients with backward() "
            "or use the stock model"
        )
    if private.in_forward_ad() and any(isinstance(x, Tensor) and private.has_tangent(x) for x in arguments):
        raise UnsupportedError(
            f"{name} has no forward-mode derivative: take gradients with backward(), or use the stock model"
        )


def check_devices(op: str, names: Iterable[str], arguments: Iterable[object]) -> None:
    """Checks that all tensors of a call are strided and on one device. Every call needs this check: a module may have
    been moved since the last one, and the kernels only see addresses.

    Args:
        op: name of the op, for the message.
        names: names of the arguments.
        arguments: the arguments, in the same order; non-tensors are ignored.

    Raises:
        InputError: a tensor is on another device than the first one, or not strided (sparse, for example).
    """
    device, first = None, ""
    for name, x in zip(names, arguments, strict=True):
        if not isinstance(x, Tensor):
            continue
        if device is None:
            device, first = x.device, name
        if x.device != device:
            raise InputError(
                f"{op} needs all its tensors on one device, got {first} on {device} and {name} on {x.device}: move the "
                "module and its inputs to one"
            )
        if x.layout is not torch.strided:
            kind = str(x.layout).removeprefix("torch.")
            raise InputError(f"{op} needs {name} as a dense, strided tensor, got a {kind} one: convert it first")


def _differentiable(
    name: str, below: Callable, backward: Callable, setup_context: Callable, only_first: bool = False
) -> Callable:
    """Makes a function differentiable, as torch.library.register_autograd does, but without reading the op's schema at
    every call, which takes longer than an op of forty arguments itself.

    Args:
        name: name of the op.
        below: computes the op's results from its arguments.
        backward: autograd formula.
        setup_context: saves what `backward` needs.
        only_first: True gives autograd the first result alone.
    """

    def forward(ctx, *arguments):
        output = below(*arguments)
        setup_context(ctx, arguments, output)
        return without_base(output[0]) if only_first else output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    formula: Any = type(name, (torch.autograd.Function,), methods)

    def call(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return private.apply(formula, *arguments)
        return below(*arguments)[0] if only_first else below(*arguments)

    return call


def without_base(x: Any) -> Any:
    """Returns a tensor that is no view in autograd's eyes. torch forbids in-place changes of a view that was made in an
    autograd.Function, but users change the results of ops in place."""
    if not isinstance(x, Tensor) or x._base is None:
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _without_views(function: Callable) -> Callable:
    """Wraps a function so that none of its results is a view in autograd's eyes."""

    def call(*arguments):
        results = function(*arguments)
        if isinstance(results, Tensor):
            return without_base(results)
        return tuple(map(without_base, results))

    return call


def _without_shared_memory(function: Callable) -> Callable:
    """Wraps a function so that no two of its results share memory: later ones are copied. None becomes an empty tensor,
    and an empty tensor that is there several times becomes several."""

    def call(*arguments):
        results, found = function(*arguments), set()
        for x in results:
            if x is None or not x.numel():
                yield results[0].new_empty(0) if x is None else x.new_empty(x.shape)
                continue
            storage = x.untyped_storage().data_ptr()
            yield x.clone() if storage in found or x.storage_offset() else x
            found.add(storage)

    return lambda *arguments: tuple(call(*arguments))


def define(
    schema: str,
    forward: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    *,
    shares: bool = False,
    only_first: bool = False,
) -> Callable[..., Any]:
    """Registers an op as torch.ops.ticketops.<name>.

    Args:
        schema: name, arguments and results of the op, in torch's schema language.
        forward: computes the results; chooses the backend.
        fake: returns empty results of the right shapes and dtypes, for torch.compile.
        backward: the autograd formula. None for an op that is itself a backward pass: differentiating it is refused.
        setup_context: saves what `backward` needs.
        shares: True if several results may be parts of one tensor. torch allows this for gradients, but not for the
            results of a registered op, so a dispatched call copies them. Others may be None there: those of a
            dispatched call are empty.
        only_first: True if callers get the first result alone, and the others are for `setup_context`.

    Returns:
        A function that calls the op with positional arguments. It bypasses torch's dispatcher unless `is_watched`: on a
        CPU the dispatcher takes as long as the kernels of a small layer.
    """
    name = schema.partition("(")[0]
    below = forward
    if backward is not None:
        # Gradients may be views: they are computed without a gradient mode.
        forward = _without_views(forward)
    computed = _without_shared_memory(forward) if shares else forward

    def implementation(*arguments):
        # Compiled code comes here without a call of ours.
        check_devices(name, names, arguments)
        return computed(*arguments)

    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ticketops::{name}", fake, lib=_library)
    if backward is None or setup_context is None:
        backward, setup_context = _no_second_derivative(name), lambda ctx, inputs, output: None
    else:
        backward, setup_context = _formula(name, backward, setup_context)
    op = getattr(torch.ops.ticketops, name).default
    names = [argument.name for argument in op._schema.arguments]

    def dispatched(*arguments):
        with private.below_autograd():
            return op(*arguments)

    if private.can_dispatch_below_autograd():
        _library.impl(name, _differentiable(name, dispatched, backward, setup_context), "Autograd")
    else:
        torch.library.register_autograd(f"ticketops::{name}", backward, setup_context=setup_context, lib=_library)
    direct = _differentiable(name, below if only_first else forward, backward, setup_context, only_first)

    def call(*arguments):
        if not is_watched(*arguments):
            check_devices(name, names, arguments)
            return direct(*arguments)
        if not torch.compiler.is_compiling():
            check_devices(name, names, arguments)
            _refuse_transforms(name, arguments)
        return op(*arguments)[0] if only_first else op(*arguments)

    return call


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating-point tensors to autocast's dtype if autocast is on, as torch does for matrix products.

    Args:
        tensors: the op's inputs. float64 stays float64, as in torch.

    Returns:
        The inputs, cast if needed.
    """
    device = tensors[0].device.type
    # torch has no autocast for the meta device.
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def same_dtype(op: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Checks that an op's floating-point inputs have one supported dtype and are on one device.

    Args:
        op: name of the op, for the message.
        dtypes: dtypes that the op supports.
        tensors: the inputs by name.

    Raises:
        UnsupportedError: the dtype of the inputs is not supported.
        InputError: the inputs differ in dtype or device.
    """
    (first, tensor), *others = tensors.items()
    if tensor.dtype not in dtypes:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UnsupportedError(f"{op} does not support {first} of dtype {tensor.dtype}: use {supported}")
    for name, other in others:
        if other.dtype != tensor.dtype or other.device != tensor.device:
            raise InputError(
                f"{op} needs one dtype and device for all inputs, got {first}: {tensor.dtype} on {tensor.device} and "
                f"{name}: {other.dtype} on {other.device}"
            )

"""How an op enters torch: one schema, one implementation for all devices, one fake for tracing, one autograd
formula."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import private

_library = torch.library.Library("ticketops", "FRAGMENT")
#: Types of an op's arguments behind which nobody can watch.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype})


def _no_second_derivative(name: str) -> Callable:
    def refuse(ctx, *gradients):
        raise UnsupportedError(f"{name} has no second derivative: take gradients without create_graph=True")

    return refuse


def _formula(backward: Callable, setup_context: Callable) -> tuple[Callable, Callable]:
    """The autograd formula of an op, which is asked only where some output has a gradient; others are None."""

    def setup(ctx, inputs, output):
        # Zero gradients of outputs that only serve the backward pass would be written for nothing.
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def gradients(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    return gradients, setup


def is_watched(*arguments: object) -> bool:
    """True if something follows which ops are called: a compiler, a tracer, a transform, a dispatch mode, or a tensor
    of another class or without values. Then the registered op must run; otherwise its implementation may be called as
    it is.

    Args:
        arguments: of the op.
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
    """Refuses what an op of addresses cannot follow."""
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
    """Checks that all tensors of a call lie on one device and have memory that a kernel can read. Every call needs it:
    a module may have been moved since the last one, and the kernels get addresses, which say nothing of that.

    Args:
        op: the op's name, for the message.
        names: of the arguments.
        arguments: in the same order; those that are no tensors are passed over.

    Raises:
        InputError: a tensor on another device than the first, or of a layout that is not strided.
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


def _differentiable(name: str, below: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """An op for autograd, on top of what computes its results: what torch.library.register_autograd makes, without its
    look at the schema in each call, which for an op of forty arguments takes longer than the op."""

    def forward(ctx, *arguments):
        output = below(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    formula: Any = type(name, (torch.autograd.Function,), methods)

    def call(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return formula.apply(*arguments)
        return below(*arguments)

    return call


def _own(function: Callable) -> Callable:
    """The same with results that autograd takes for tensors of their own: a view made inside an autograd.Function
    refuses to be changed in place, as users change what torch's own ops return."""

    def whole(x: object) -> object:
        if not isinstance(x, Tensor) or x._base is None:
            return x
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    def call(*arguments):
        results = function(*arguments)
        return whole(results) if isinstance(results, Tensor) else tuple(map(whole, results))

    return call


def _apart(function: Callable) -> Callable:
    """The same with results in memory of their own."""

    def call(*arguments):
        results, found = function(*arguments), set()
        for x in results:
            storage = x.untyped_storage().data_ptr()
            yield x.clone() if x.numel() and (storage in found or x.storage_offset()) else x
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
) -> Callable[..., Any]:
    """Registers an op as torch.ops.ticketops.<name>.

    Args:
        schema: name, arguments and results in torch's schema language.
        forward: computes the results; backends are chosen inside.
        fake: the results' shapes and dtypes without computing, for torch.compile.
        backward: the autograd formula; None for an op that is itself a backward pass, whose differentiation is refused.
        setup_context: stores what `backward` needs.
        shares: several results may be parts of one tensor, which torch allows gradients, but not an op's results: where
            somebody watches they are copied.

    Returns:
        The op with all its arguments in their order, called past torch's dispatcher where nobody watches: on a CPU its
        ways there and back take as long as a small layer's kernels.
    """
    name = schema.partition("(")[0]
    forward = _own(forward)
    _library.define(schema)
    _library.impl(name, _apart(forward) if shares else forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ticketops::{name}", fake, lib=_library)
    if backward is None or setup_context is None:
        backward, setup_context = _no_second_derivative(name), lambda ctx, inputs, output: None
    else:
        backward, setup_context = _formula(backward, setup_context)
    op = getattr(torch.ops.ticketops, name).default

    def dispatched(*arguments):
        with private.below_autograd():
            return op(*arguments)

    if private.can_dispatch_below_autograd():
        _library.impl(name, _differentiable(name, dispatched, backward, setup_context), "Autograd")
    else:
        torch.library.register_autograd(f"ticketops::{name}", backward, setup_context=setup_context, lib=_library)
    direct = _differentiable(name, forward, backward, setup_context)

    names = [argument.name for argument in op._schema.arguments]

    def call(*arguments):
        if not is_watched(*arguments):
            check_devices(name, names, arguments)
            return direct(*arguments)
        if not torch.compiler.is_compiling():
            check_devices(name, names, arguments)
            _refuse_transforms(name, arguments)
        return op(*arguments)

    return call


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts floating tensors to autocast's dtype where autocast is on, as torch's own matrix products do.

    Args:
        tensors: the op's inputs; float64 is left alone, as autocast does.

    Returns:
        The inputs, cast where needed.
    """
    device = tensors[0].device.type
    # On the meta device there is none to ask for.
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def same_dtype(op: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Checks that an op's floating inputs have one supported dtype and one device.

    Args:
        op: the op's name, for the message.
        dtypes: what the op supports.
        tensors: the inputs by name.

    Raises:
        UnsupportedError: an unsupported dtype.
        InputError: inputs that differ in dtype or device.
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

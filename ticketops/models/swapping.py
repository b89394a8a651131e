"""Classes that stand in for stock ones: a patched module has another class and goes by its stock class's name."""

import functools
import sys
from typing import Any

from torch import nn


class Swapped:
    """What all stand-ins have in common: they look like their stock classes to whoever asks for a name.

    transformers, accelerate and FSDP find classes by name, to save a configuration, to capture outputs, to wrap layers.
    """

    _ticketops_mixin: type
    _ticketops_stock: type[nn.Module]
    _ticketops_stock_forward: Any

    @classmethod
    def is_altered(cls) -> bool:
        """True if somebody has replaced the stock class's forward since it was swapped first."""
        return cls._ticketops_stock.forward is not cls._ticketops_stock_forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Somebody makes another model of a patched model's class. It is not patched.
        self.__class__ = self._ticketops_stock  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle finds the class by its two parts, since its name leads to the stock class.
        parts: Any = super().__reduce_ex__(protocol)
        _, _, *state = parts
        return _new, (self._ticketops_mixin, self._ticketops_stock), *state


def _new(mixin: Any, stock: Any) -> nn.Module:
    kind = stand_in(mixin, stock)
    module: nn.Module = kind.__new__(kind)
    return module


@functools.cache
def stand_in(mixin: Any, stock: Any) -> type[nn.Module]:
    """Makes the class that replaces a stock one.

    Args:
        mixin: what it does differently; its methods call `super()` for what the stock class does.
        stock: a class of transformers or torch.

    Returns:
        A subclass of both under the stock class's name. Its forward has the stock signature, which transformers reads.
    """
    namespace: dict[str, Any] = {
        "__doc__": mixin.__doc__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "_ticketops_mixin": mixin,
        "_ticketops_stock": stock,
        "_ticketops_stock_forward": stock.forward,
    }

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    ours = mixin.forward
    namespace["forward"] = forward
    return type(stock.__name__, (Swapped, mixin, stock), namespace)


def stock_class(module: nn.Module) -> type[Any]:
    """The class that a module had before it was patched; its class where it is not.

    Args:
        module: of any class.
    """
    kind = type(module)
    return kind._ticketops_stock if issubclass(kind, Swapped) else kind


def unsharded_class(kind: type) -> type:
    """The class that a module had before FSDP's fully_shard put a class of its own over it.

    Args:
        kind: of any module.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return next(each for each in kind.__mro__[1:] if not issubclass(each, fsdp.FSDPModule))

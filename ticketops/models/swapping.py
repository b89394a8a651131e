"""Subclasses of stock classes for patched modules, which keep the stock class's name."""

import functools
import sys
from typing import Any

from torch import nn


class Swapped:
    """Base of all these subclasses.

    They have the names of their stock classes, because transformers, accelerate and FSDP find classes by name when they
    save a configuration, capture outputs or wrap layers.
    """

    _ticketops_mixin: type
    _ticketops_stock: type[nn.Module]
    _ticketops_stock_forward: Any

    @classmethod
    def is_altered(cls) -> bool:
        """Returns True if the stock class's forward was replaced after the subclass was made."""
        return cls._ticketops_stock.forward is not cls._ticketops_stock_forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A new instance, e.g. type(patched_model)(config), is not patched.
        self.__class__ = self._ticketops_stock  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles refer to the class by mixin and stock class, because its name is the stock class's.
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
        mixin: class with the changed methods, which call `super()` for the stock behaviour.
        stock: class of transformers or torch.

    Returns:
        A subclass of both with the stock class's name. Its forward has the stock signature, which transformers
        inspects.
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
    """Returns the stock class of a patched module; the class of any other module.

    Args:
        module: patched or stock module.
    """
    kind = type(module)
    return kind._ticketops_stock if issubclass(kind, Swapped) else kind


def unsharded_class(kind: type) -> type:
    """Returns the class that a module had before FSDP's fully_shard replaced it with a subclass.

    Args:
        kind: class of a module.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return next(each for each in kind.__mro__[1:] if not issubclass(each, fsdp.FSDPModule))

"""Lets transformers' own `from_pretrained` make shrunk models, without importing transformers.

Here one method of a few classes learns about the record in a configuration. transformers' register_patch_mapping, the
other way, is not used: it holds for every model that is made afterwards, takes names for regular expressions (so
"BertEncoder" would stand for MobileBertEncoder and for bert_generation's BertEncoder too), gives models other classes
than the stock ones, and its per-layer sizes would have to repeat what the record says.
"""

import functools
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from ticketops.architectures import ARCHITECTURES

#: Modeling module -> the names of its class that holds the list of layers, and of its bare model.
_CLASSES = {each.module: (each.stack, f"{each.prefix}Model") for each in ARCHITECTURES}


class _Finder(MetaPathFinder):
    """Waits for transformers to import one of the modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _CLASSES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            _teach_after_import(spec.loader)
        return spec


def _teach_after_import(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _teach(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _teach(module: ModuleType) -> None:
    """Has the module's encoder take the shapes that a configuration records, and its stock models tell of a ticket that
    was applied to what they load."""
    encoder, base = (getattr(module, name) for name in _CLASSES[module.__name__])
    make = encoder.__init__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(self, config, *args, **kwargs)
        # The second is what transformers 4.x wrote after prune_heads, and transformers 5 ignores.
        if getattr(config, "ticketops", None) is not None or getattr(config, "pruned_heads", None):
            from ticketops.models.shrink import narrow

            narrow(self, config)
        if getattr(config, "ticketops_applied", None) is not None:
            warnings.warn(
                "this model was saved with a ticket applied, and stock code computes all of it: ticketops.patch(model) "
                "applies the ticket again",
                stacklevel=2,
            )

    encoder.__init__ = __init__
    load = base._load_from_state_dict

    @functools.wraps(load)
    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, metadata: Any, *args: Any) -> None:
        load(self, state_dict, prefix, metadata, *args)
        # A patched model sees to it itself.
        if "ticketops_applied" in metadata and not hasattr(self, "_ticketops"):
            warnings.warn(
                "these weights were saved with a ticket applied, which a stock model does not take: call "
                "ticketops.patch(model) before load_state_dict",
                stacklevel=2,
            )

    base._load_from_state_dict = _load_from_state_dict


def install() -> None:
    """Lets transformers load shrunk models, imported or not; called by `import ticketops`."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _CLASSES:
        if name in sys.modules:
            _teach(sys.modules[name])

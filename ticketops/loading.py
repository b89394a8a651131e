"""Makes transformers' `from_pretrained` load shrunk models, without importing transformers.

The constructors of a few classes are wrapped, so that they apply the record in a configuration. transformers'
register_patch_mapping is not used, because it affects every model that is made afterwards, interprets names as regular
expressions ("BertEncoder" would also match MobileBertEncoder and bert_generation's BertEncoder), replaces stock
classes, and needs per-layer sizes that would duplicate the record.
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

#: Modeling module -> names of its class with the list of layers, and of its bare model.
_CLASSES = {each.module: (each.stack, f"{each.prefix}Model") for each in ARCHITECTURES}


class _Finder(MetaPathFinder):
    """Import hook that wraps the classes when transformers imports one of the modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _CLASSES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            _wrap_after_import(spec.loader)
        return spec


def _wrap_after_import(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _wrap_classes(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _wrap_classes(module: ModuleType) -> None:
    """Wraps the module's encoder, so that it is built with the shapes in its configuration's record, and its bare
    model, so that a stock model warns if it loads weights to which a ticket was applied."""
    encoder, base = (getattr(module, name) for name in _CLASSES[module.__name__])
    make = encoder.__init__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(self, config, *args, **kwargs)
        # transformers 4.x wrote `pruned_heads`; transformers 5 ignores it.
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
        # A patched model handles the metadata itself.
        if "ticketops_applied" in metadata and not hasattr(self, "_ticketops"):
            warnings.warn(
                "these weights were saved with a ticket applied, which a stock model does not take: call "
                "ticketops.patch(model) before load_state_dict",
                stacklevel=2,
            )

    base._load_from_state_dict = _load_from_state_dict


def install() -> None:
    """Makes transformers load shrunk models, whether it is already imported or not. `import ticketops` calls it."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _CLASSES:
        if name in sys.modules:
            _wrap_classes(sys.modules[name])

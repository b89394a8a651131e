"""Floor 3: the search for super tickets: configuration, plan, trials, store, selection. Imports lazily."""

import importlib
from typing import Any

_HOMES = {
    "RECIPES": "plan",
    "SearchConfig": "plan",
    "Trial": "plan",
    "make_plan": "plan",
    "run_search": "run",
    "Selection": "selection",
    "select": "selection",
    "Setting": "setting",
    "Store": "store",
    "Listener": "trial",
    "ShareConfig": "sharing_plan",
    "ShareTrial": "sharing_plan",
    "TransferConfig": "transfer_plan",
    "run_share": "sharing",
    "run_transfer": "transfer",
    "run_trial": "trial",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # The command line reads the configuration's help from here, and should not wait for torch to do so.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""The verb of the public face that takes more than one floor: search, then report."""

import dataclasses
from typing import Any

from ticketops.reporting import report
from ticketops.searching.plan import SearchConfig
from ticketops.searching.run import SearchResult, run_search
from ticketops.searching.trial import Listener


def search(config: SearchConfig | None = None, *, listener: Listener | None = None, **fields: Any) -> SearchResult:
    """Finds the super ticket of a model on a task, and writes the report; what an output folder has is not done again.

    Args:
        config: the search; or else its fields:
        listener: hears about trials and steps.
        fields: of `SearchConfig`, the flags of `ticketops search`: model, task, output, sparsities, kinds, seeds, ...

    Returns:
        Records, the super ticket, its gain over the full model, and the report's path.

    Raises:
        InputError: a field, the model or the task is bad.
        StoreError: the output folder cannot be used; finished trials stay.
        TicketopsError: training diverged.

    Source: arXiv 2105.12002.
    """
    if config is None:
        config = SearchConfig.from_dict(fields, source="search()")
    elif fields:
        config = SearchConfig.from_dict({**config.to_dict(), **fields}, source="search()")
    result = run_search(config, listener)
    return dataclasses.replace(result, report_path=report(result.folder))

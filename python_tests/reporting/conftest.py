import importlib
from pathlib import Path

import pytest
from markupsafe import Markup

from ticketops.files import write_atomically
from ticketops.reporting import page_figures


@pytest.fixture
def real_figures() -> None:
    """Asked for by tests that look at figures: see `undrawn`."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws nothing in tests of texts and tables: figures take most of a report's time."""
    if "real_figures" in request.fixturenames:
        return

    def figure(path: Path, *_: object) -> None:
        write_atomically(path, b"no figure")

    for name in ("search", "sharing", "transfer"):
        monkeypatch.setattr(importlib.import_module(f"ticketops.reporting.{name}"), "figure", figure)
    for name in ("phase", "importance", "arms", "overlaps", "profiles", "ladder"):
        monkeypatch.setattr(page_figures, name, lambda *_: Markup(""))

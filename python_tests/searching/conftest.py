from pathlib import Path

import pytest

from ticketops.searching import SearchConfig, Setting

from .tiny import FIELDS, make_model, make_pairs, make_task


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model and task of a search that takes seconds."""
    root: Path = tmp_path_factory.mktemp("tiny")
    return {"model": str(make_model(root / "model")), "task": str(make_task(root / "task"))}


@pytest.fixture(scope="session")
def setting(inputs: dict[str, str]) -> Setting:
    return Setting.load(SearchConfig(**inputs, **FIELDS))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second task, of another kind, for the same model."""
    return str(make_pairs(tmp_path_factory.mktemp("tiny") / "pairs"))

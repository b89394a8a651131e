import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """The folder of GLUE task folders: TICKETOPS_TEST_DATA, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TICKETOPS_TEST_DATA") or beside) / "glue"
    if not folder.is_dir():
        pytest.skip(f"no GLUE files in {folder}")
    return folder

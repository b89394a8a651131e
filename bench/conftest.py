from pathlib import Path

import pytest
import transformers

from bench import step


def pytest_addoption(parser):
    parser.addoption("--data", type=Path, default=None, help="folder with task folders; default: the demo task")
    parser.addoption("--task", default="demo", help="task folder or name")
    parser.addoption("--dtype", choices=("fp32", "bf16"), default="fp32")


@pytest.fixture(scope="session")
def setup(request):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    option = request.config.getoption
    return step.load(option("--data"), option("--task"), dtype=option("--dtype"), batches=2)

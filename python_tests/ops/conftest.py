import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Kernels divide their work among threads, so here there are two of them; elsewhere one is enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("TICKETOPS_TEST_THREADS", "2")))
    yield
    torch.set_num_threads(before)

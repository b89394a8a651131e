"""A random walk over what users do to models: a patched one does the same as its stock twin, or refuses by name."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import walking
from ticketops.ops import memory


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written is not a number."""
    take = memory.from_dlpack
    monkeypatch.setattr(memory, "from_dlpack", lambda capsule: take(capsule).fill_(float("nan")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_at_random(walks, length, seed=None):
    counts = Counter()

    @settings(max_examples=walks, suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False)
    @given(
        st.sampled_from(walking.STARTS),
        st.sampled_from([(True, None), (True, 16), (False, None)]),
        st.lists(
            st.tuples(st.sampled_from(sorted(walking.OPERATIONS)), st.integers(0, 999)), min_size=1, max_size=length
        ),
    )
    def walk(name, packing, steps):
        walking.walk(name, *packing, steps, counts)

    walk()
    return counts


def test_each_operation_by_itself():
    assert len(walking.OPERATIONS) >= 40


def test_a_walk(record_property):
    counts = steps_at_random(40, 12)
    record_property("counts", counts.most_common())
    assert counts["steps"] > 100

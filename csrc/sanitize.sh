#!/bin/sh
# Runs the native kernels' tests, including the fuzzing of shapes, lengths and strides, on an extension built with
# AddressSanitizer and UndefinedBehaviorSanitizer. Tensors are allocated with malloc, so that an access outside a tensor
# is detected. WIDE=ON compiles the AVX-512 kernels for AVX2 and tests them.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
test -x "$python" || python=$(command -v python)
PATH=$(dirname "$python"):$PATH
build=build/sanitize

"$python" -m pip install --quiet cmake ninja pybind11

cmake -S . -B $build -G Ninja -DTICKETOPS_SANITIZE=ON -DTICKETOPS_WIDE="${WIDE:-OFF}" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
cmake --build $build

# Leaks are not checked, because the interpreter does not free all memory at exit.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
"$python" - "$@" <<PYTHON
import sys

import ticketops

ticketops.__path__.insert(0, "$build")
from ticketops import _native

assert "sanitize" in _native.__file__, _native.__file__

import pytest

names = ("attention_backends", "copies", "embedding", "ffn_backends", "layer", "memory", "residual")
tests = [f"python_tests/ops/test_{name}.py" for name in names]
sys.exit(pytest.main([*tests, "-q", "-k", "native or copies or embedding or layer or memory or sums_of", "-p", "no:cacheprovider", *sys.argv[1:]]))
PYTHON

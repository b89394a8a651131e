#!/bin/sh
# Runs the CUDA kernels' tests on their CPU emulation, built first with AddressSanitizer and UndefinedBehaviorSanitizer,
# then with ThreadSanitizer. There each thread of a block is a CPU thread, so a missing barrier is a data race.
set -eu
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python
test -x "$python" || python=$(command -v python)
PATH=$(dirname "$python"):$PATH

run() {
  build=build/emulated-$1
  cmake -S csrc/cuda -B "$build" -G Ninja -DTICKETOPS_EMULATE=ON -DTICKETOPS_SANITIZE="$2" \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
  cmake --build "$build"
  # Leaks are not checked, because the interpreter does not free all memory at exit. Races in libraries that are not
  # instrumented are ignored.
  TICKETOPS_TEST_EMULATED="$build" OMP_NUM_THREADS=1 TICKETOPS_TEST_THREADS=1 \
  LD_PRELOAD="$(c++ -print-file-name="lib$3.so") $(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" \
  "$python" -m pytest -q -s -p no:cacheprovider python_tests/ops/test_cuda.py -k "$4"
}

run address address,undefined asan emulated
# Under ThreadSanitizer the gradient checks are slow. They launch the same kernels as the other tests.
run thread thread tsan "emulated and not gradients"

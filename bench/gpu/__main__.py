"""python -m bench.gpu [STAGE ...] [--tiny] [--output DIR] [--limit SECONDS]

Checks and measures on a GPU, in stages that each end within 8 minutes on an H200, need no network and can be repeated
alone. In their order, which gives the most first:

  smoke      builds the extensions, and runs every kernel once on small ragged shapes
  step       fine-tuning steps of BERT-base beside transformers
  graphs     the tests of CUDA graphs
  tests      all tests marked gpu
  sanitizer  compute-sanitizer on the smoke stage's kernels, where it is installed
  attention, ffn, residual
             the ops beside their rivals
  encoders   steps of BERT-large and of other encoders
  sharing    steps of several tasks with a ticket each
  shrunk     models shrunk to tickets
  tiles      every candidate tile of every Triton kernel

The benchmarks are runs of `pytest bench` and `pytest bench/models.py` with the options in BENCHES. A stage writes
<device>-<stage>.json, a benchmark row by row as it comes. Without a stage, all run one after the other,
each in a process of its own. At the end, <device>.json says which stages are green, and holds ratios and targets: only
where smoke, tests and sanitizer were green at the same commit, and only of results that were checked. Ratios are
medians over turns. `--tiny` runs the same code on tiny shapes in Triton's interpreter on the CPU and reports no ratios;
it is the default without a GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_BASE = ("--channels", "768", "--layers", "12")
_KERNELS, _MODELS = "bench/test_kernels.py", "bench/models.py"
_TOKENS = ("--tokens", "4096,16384,65536", *_BASE)
#: What pytest runs in a benchmark, and its options, in the order in which they give the most.
BENCHES: dict[str, tuple[str, ...]] = {
    "step": (f"{_KERNELS}::test_step", "-k", "backward", "--rows", "32", "--lengths", "rte,sst2", *_BASE),
    # Some rivals have no dropout.
    "attention": (
        *(f"{_KERNELS}::test_attention", "--dropout", "0"),
        *("--lengths", "64,128,256,512,sst2,rte,mnli-assumed", *_TOKENS),
    ),
    "ffn": (f"{_KERNELS}::test_ffn", "--lengths", "128", *_TOKENS),
    "residual": (f"{_KERNELS}::test_residual", "--lengths", "128", *_TOKENS),
    "encoders": (f"{_MODELS}::test_encoders", f"{_MODELS}::test_bert_large", "--rows", "32"),
    "sharing": (f"{_MODELS}::test_sharing", "--rows", "32", "--lengths", "rte,sst2,mnli-assumed", *_BASE),
    "shrunk": (f"{_MODELS}::test_shrunk", "--rows", "1,8,32,128", "--lengths", "32,128,512", *_BASE),
}
#: In the order in which they give the most.
STAGES = ("smoke", "step", "graphs", "tests", "sanitizer", *list(BENCHES)[1:], "tiles")
#: Without these being green, no ratio is reported.
CHECKS = ("smoke", "tests", "sanitizer")
_TOOLS = ("memcheck", "racecheck")
_PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def _arguments() -> argparse.Namespace:
    more = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages to run (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in Triton's interpreter on the CPU")
    parser.add_argument("--output", type=Path, help="folder for the results (default: bench/results; tiny: build/gpu)")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds that a stage may take (default: 480)")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    return options


def _has_gpu() -> bool:
    # In a separate process, because this one must set TRITON_INTERPRET before it imports Triton.
    command = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str], **variables: str) -> dict[str, Any]:
    """Runs a command in the repository; returns whether it passed, and its last line."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        print("\n".join(lines[-200:]), file=sys.stderr)
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else f"exit code {done.returncode}"}


def _smoke(tiny: bool) -> dict[str, Any]:
    if tiny:
        return {"passed": None, "summary": "not run: no GPU"}
    built = _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"])
    if not built["passed"]:
        return built
    return _run([sys.executable, "-m", "bench.gpu.small_step"])


def _graphs(tiny: bool) -> dict[str, Any]:
    some = ["-k", "importance"] if tiny else ["-m", "gpu", "python_tests/models/test_graphs_gpu.py"]
    return _run([*_PYTEST, "python_tests/models/test_encoder_graphs.py", *some])


def _tests(tiny: bool) -> dict[str, Any]:
    some = ["python_tests/ops/test_triton.py", "-k", "of_nothing"] if tiny else ["python_tests", "-m", "gpu"]
    # Most of the tests' time is compilation of kernels, so run them on all cores if pytest-xdist is installed.
    workers = ["-n", "auto"] if not tiny and importlib.util.find_spec("xdist") else []
    return _run([*_PYTEST, *workers, *some])


def _sanitizer(tiny: bool) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer")
    if tiny or program is None:
        return {"passed": None, "summary": f"not run: {'no GPU' if tiny else 'compute-sanitizer is not on the PATH'}"}

    def checked(tool: str) -> dict[str, Any]:
        step = [sys.executable, "-m", "bench.gpu.small_step"]
        # Allocate each tensor separately, so that memcheck detects accesses outside it.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return _run([program, "--tool", tool, "--error-exitcode", "1", *step], **caching)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(_TOOLS, pool.map(checked, _TOOLS), strict=True))
    passed = all(each["passed"] for each in found.values())
    return {"passed": passed, "summary": "; ".join(f"{tool}: {each['summary']}" for tool, each in found.items())}


def _tiles(tiny: bool, folder: Path) -> dict[str, Any]:
    if tiny:
        return {"passed": None, "summary": "not run: no GPU"}
    return _run([sys.executable, "-m", "bench.gpu.tiles", "--output", str(folder)])


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how many times as fast ticketops is as each contender, and its floor's share of its time, where its
    results are right."""
    kept = ("bench", "workload", "tokens", "pass", "contender")
    return [
        {**{key: row[key] for key in kept}, "against": rival, "ratio": ratio}
        for row in rows
        if row["contender"].startswith("ticketops") and row["ms"] is not None and row["gate"] == "green"
        for rival, ratio in row["vs"].items()
    ]


#: Targets on an H100: name, benchmark, substring of the workloads' names, rivals, least ratio, contender. The ratio is
#: that to the fastest rival in the same turns; that of the floor is its share of the contender's time.
_RIVALS = ("sdpa", "sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn", "flex", "varlen", "flash-attn")
_PADDED, _PACKED = _RIVALS[:6], _RIVALS[6:]
_COMPILED = ("compile", "reduce-overhead")
_PLAIN, _IMPORTANCE, _GRAPHS = "ticketops", "ticketops, importance", "ticketops, graphs"
Target = tuple[str, str, str, tuple[str, ...], float, str]


def _of_steps(name: str, bench: str, part: str) -> Iterator[Target]:
    """Yields the targets of a training step's wall clock, with importance, as a loop calls it and in CUDA graphs."""
    for how, whose in (("", _IMPORTANCE), (", in CUDA graphs", _GRAPHS)):
        yield f"{name}{how}: transformers + sdpa", bench, part, ("sdpa",), 3.0, whose
        yield f"{name}{how}: transformers + the better torch.compile", bench, part, _COMPILED, 1.5, whose
        yield f"{name}{how}: at most 3 times the floor", bench, part, ("floor",), 1 / 3, whose


TARGETS: tuple[Target, ...] = (
    ("attention, even lengths: the best other", "attention", " x ", _RIVALS, 1.0, _IMPORTANCE),
    ("attention, real lengths: the best on packed", "attention", "lengths of", _PACKED, 1.0, _IMPORTANCE),
    ("attention, real lengths: the best on padded", "attention", "lengths of", _PADDED, 1.5, _IMPORTANCE),
    ("attention: importance costs at most 2 %", "attention", "", (_PLAIN,), 0.98, _IMPORTANCE),
    ("attention: half of the heads, within 15 % of half", "attention", "", (_PLAIN,), 1.74,
     "ticketops, half the heads masked"),
    ("FFN: cuBLAS + unfused", "ffn", "", ("eager",), 1.15, _IMPORTANCE),
    ("FFN: torch.compile", "ffn", "", _COMPILED, 1.15, _IMPORTANCE),
    *_of_steps("step", "step", ""),
    *_of_steps("step of BERT-large", "bert-large", ""),
    ("encoders: transformers", "encoders", "", ("sdpa",), 3.0, _IMPORTANCE),
    ("encoders: flash-deberta", "encoders", "deberta", ("flash-deberta",), 1.0, _IMPORTANCE),
    ("sharing: another ticket every step costs at most 3 %", "sharing", "",
     ("ticketops, one ticket for all tasks",), 0.97, _PLAIN),
)  # fmt: skip


def _verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each target with the measured ratio of every workload, and whether all of them reach it."""
    verdicts = []
    for name, bench, part, rivals, least, whose in TARGETS:
        found: dict[str, list[float]] = {}
        for each in _ratios(rows):
            place = f"{each['workload']}, {each['tokens']} tokens"
            if (each["bench"], each["pass"], each["contender"]) == (bench, "forward+backward", whose) and (
                part in place and each["against"] in rivals
            ):
                found.setdefault(place, []).append(each["ratio"])
        ratios = {place: min(each) for place, each in found.items()}
        reached = all(ratio >= least for ratio in ratios.values()) if ratios else None
        verdicts.append({"target": name, "least": least, "reached": reached, "ratios": ratios})
    return verdicts


class _Rows:
    """A plugin of pytest that hands on each row as its test ends.

    Args:
        keep: takes a row.
    """

    def __init__(self, keep: Callable[[dict[str, Any]], None]) -> None:
        self._keep = keep

    def pytest_runtest_logreport(self, report: Any) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "row":
                self._keep(value)


def _bench(name: str, tiny: bool, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs one of BENCHES in this process. A row that is red, or a failure of ticketops, makes it red."""
    import pytest

    count, wrong = 0, []

    def counted(row: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if row["gate"] != "green" and (row["ms"] is not None or row["contender"].startswith("ticketops")):
            wrong.append(f"{row['workload']}, {row['contender']}: {row.get('note', row['gate'])}")
        keep(row)

    places, options = [each for each in BENCHES[name] if each.startswith("bench/")], ["-q", "-p", "no:cacheprovider"]
    options += [str(ROOT / place) for place in places] + [each for each in BENCHES[name] if each not in places]
    options += ["--rootdir", str(ROOT), "--benchmark-quiet", *["--tiny"] * tiny]
    code = pytest.main(options, plugins=[_Rows(counted)])
    found = "; ".join(wrong) or (f"{count} rows, all results checked" if code == 0 else f"pytest ended with {code!r}")
    return {"passed": code == 0, "summary": found}


def measure_stage(name: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Runs one stage in this process, and writes its file.

    Args:
        name: of the stage.
        tiny: tiny shapes in Triton's interpreter.
        folder: for the results.

    Returns:
        What the file holds.
    """
    from bench.gpu import machine
    from ticketops.files import write_atomically

    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"stage": name, "passed": None, "summary": "not at its end"}
    record["machine"] = machine.machine("fp32" if tiny else "bf16")
    path = folder / f"{machine.stem(record['machine']['device'])}-{name}.json"

    def keep(row: dict[str, Any] | None = None) -> None:
        rows.extend([] if row is None else [row])
        found = record | ({"rows": rows} if name in BENCHES else {})
        write_atomically(path, json.dumps(found, indent=1) + "\n")

    keep()
    start = time.monotonic()
    if name in BENCHES:
        record |= _bench(name, tiny, keep)
    elif name == "tiles":
        record |= _tiles(tiny, folder)
    else:
        record |= {"smoke": _smoke, "graphs": _graphs, "tests": _tests, "sanitizer": _sanitizer}[name](tiny)
    record["seconds"] = round(time.monotonic() - start, 1)
    keep()
    return record


def merge(tiny: bool, folder: Path) -> dict[str, Any]:
    """Says of all stages that have run whether they are green, and reports ratios where checks were.

    Args:
        tiny: tiny shapes in Triton's interpreter.
        folder: of the results.

    Returns:
        What <device>.json holds.
    """
    from bench.gpu import machine, plots
    from ticketops.files import write_atomically

    place = machine.machine("fp32" if tiny else "bf16")
    stem = machine.stem(place["device"])
    paths = {name: folder / f"{stem}-{name}.json" for name in STAGES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    # What another commit's kernels did says nothing of these.
    found = {name: each for name, each in found.items() if each["machine"] == place}
    fields = ("passed", "summary", "seconds")
    stages = {name: {field: each.get(field) for field in fields} for name, each in found.items()}
    record: dict[str, Any] = {"machine": place, "stages": stages}
    rows = [row for each in found.values() for row in each.get("rows", ())]
    if missing := [name for name in CHECKS if name not in found or not found[name]["passed"]]:
        record["ratios_withheld"] = f"not green at this commit: {', '.join(missing)}"
    if tiny:
        record["ratios_withheld"] = "these are timings of Triton's interpreter, not of a GPU"
    if "ratios_withheld" not in record:
        record |= {"ratios": _ratios(rows), "targets": _verdicts(rows)}
    write_atomically(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    for path in plots.draw(rows, place["device"], folder, stem):
        print(path)
    print(folder / f"{stem}.json")
    return record


def _in_time(command: list[str], limit: float) -> int | None:
    """Runs a command, and ends it with all that it has started after `limit` seconds; returns None then, else its exit
    code."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """The command behind `make gpu`.

    Returns:
        The exit code: 0, or 1 if a stage is red or did not come to its end.
    """
    options = _arguments()
    if not options.tiny and not _has_gpu():
        print(
            "no CUDA GPU was found: running --tiny, in Triton's interpreter; its timings are meaningless",
            file=sys.stderr,
        )
        options.tiny = True
    if options.tiny:
        os.environ["TICKETOPS_BACKEND"] = "triton"
        # Triton reads it when a kernel is decorated, so the imports must follow.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # The default backends of a GPU: Triton, and the CUDA C++ kernels if they are built.
        os.environ.pop("TICKETOPS_BACKEND", None)
        os.environ.pop("TRITON_INTERPRET", None)
    # Timings of the interpreter do not belong in bench/results.
    folder = (options.output or ROOT / ("build/gpu" if options.tiny else "bench/results")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if len(options.stages) == 1:
        record = measure_stage(options.stages[0], options.tiny, folder)
        print(f"{record['stage']}: {record['summary']} ({record['seconds']} s)", flush=True)
        return int(record["passed"] is False)
    failed = False
    for name in options.stages or STAGES:
        command = [sys.executable, "-m", "bench.gpu", name, "--output", str(folder), *["--tiny"] * options.tiny]
        code = _in_time(command, options.limit)
        failed |= code != 0
        if code is None:
            print(f"{name}: stopped after {options.limit:.0f} s; what it measured until then is kept", file=sys.stderr)
    merge(options.tiny, folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

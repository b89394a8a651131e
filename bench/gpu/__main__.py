"""python -m bench.gpu [STAGE ...] [--tiny] [--output DIR] [--limit SECONDS]

Checks and measures on a GPU, in stages that each end within 8 minutes on an H200, need no network and can be repeated
alone. In their order, which gives the most first:

  smoke      builds the extensions, and runs every kernel once on small ragged shapes
  step       fine-tuning steps of BERT-base beside transformers
  graphs     the tests of CUDA graphs
  tests      all tests marked gpu
  sanitizer  compute-sanitizer on the smoke stage's kernels, where it is installed
  attention, ffn, residual, encoders, sharing, shrunk
             benchmarks beside their rivals
  tiles      every candidate tile of every Triton kernel

A stage writes <device>-<stage>.json, a benchmark row by row as it comes. Without a stage, all run one after the other,
each in a process of its own. At the end, <device>.json says which stages are green, and holds ratios and targets: only
where smoke, tests and sanitizer were green at the same commit, and only of workloads whose results were checked.
`--tiny` runs the same code on tiny shapes in Triton's interpreter on the CPU and reports no ratios; it is the default
without a GPU.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("step", "attention", "ffn", "residual", "encoders", "sharing", "shrunk")
#: In the order in which they give the most.
STAGES = ("smoke", "step", "graphs", "tests", "sanitizer", *BENCHES[1:], "tiles")
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
    """Returns the speed-up of ticketops over each contender, for workloads whose gate is green."""
    ratios = []
    for row in rows:
        if row["contender"] != "ticketops" or row["ms"] is None or row["gate"] != "green":
            continue
        place = {key: row[key] for key in ("bench", "workload", "tokens", "pass")}
        for other in rows:
            same = all(other[key] == value for key, value in place.items())
            if same and other is not row and other["ms"] is not None:
                ratios.append({**place, "against": other["contender"], "ratio": other["ms"] / row["ms"]})
    return ratios


#: Targets on an H100: name, benchmark, pass, substring of the workloads' names, rivals, least ratio, contender. The
#: ratio is the fastest rival's time divided by the contender's.
_RIVALS = ("sdpa math", "sdpa flash", "sdpa efficient", "sdpa cudnn", "flex", "torch varlen", "flash-attn")
_PADDED, _PACKED = _RIVALS[:5], _RIVALS[5:]
_WHOLE = "forward+backward"
_GRAPHS = "ticketops, graphs"
_COMPILED = ("transformers, torch.compile", "transformers, reduce-overhead")
TARGETS: tuple[tuple[str, str, str, str, tuple[str, ...], float, str], ...] = (
    ("attention, even lengths: the best other", "attention", _WHOLE, " x ", _RIVALS, 1.0, "ticketops"),
    ("attention, real lengths: the best on packed", "attention", _WHOLE, "lengths of", _PACKED, 1.0, "ticketops"),
    ("attention, real lengths: the best on padded", "attention", _WHOLE, "lengths of", _PADDED, 1.5, "ticketops"),
    ("attention: importance costs at most 2 %", "attention", _WHOLE, "", ("ticketops without importance",), 0.98,
     "ticketops"),
    ("attention: half of the heads, within 15 % of half", "attention", _WHOLE, "", ("ticketops",), 1.74,
     "ticketops, half the heads masked"),
    ("FFN: cuBLAS + unfused", "ffn", _WHOLE, "", ("torch",), 1.15, "ticketops"),
    ("FFN: torch.compile", "ffn", _WHOLE, "", ("torch.compile",), 1.15, "ticketops"),
    ("step: transformers + sdpa", "step", "step", "", ("transformers",), 3.0, _GRAPHS),
    ("step: transformers + the better torch.compile", "step", "step", "", _COMPILED, 1.5, _GRAPHS),
    ("encoders: transformers", "encoders", "step", "", ("transformers",), 3.0, "ticketops"),
    ("encoders: flash-deberta", "encoders", "step", "deberta", ("flash-deberta",), 1.0, "ticketops"),
    ("sharing: another ticket every step costs at most 3 %", "sharing", "step", "",
     ("ticketops, one ticket for all tasks",), 0.97, "ticketops"),
)  # fmt: skip


def _verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each target with the measured ratio of every workload, and whether all of them reach it."""
    verdicts = []
    for name, bench, kind, part, others, least, whose in TARGETS:
        times: dict[str, dict[str, float]] = {}
        for row in rows:
            if (row["bench"], row["pass"]) == (bench, kind) and row["ms"] is not None and row["gate"] == "green":
                times.setdefault(f"{row['workload']}, {row['tokens']} tokens", {})[row["contender"]] = row["ms"]
        ratios = {
            place: min(found[other] for other in others if other in found) / found[whose]
            for place, found in times.items()
            if part in place and whose in found and any(other in found for other in others)
        }
        reached = all(ratio >= least for ratio in ratios.values()) if ratios else None
        verdicts.append({"target": name, "least": least, "reached": reached, "ratios": ratios})
    return verdicts


def measure_stage(name: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Runs one stage in this process, and writes its file.

    Args:
        name: of the stage.
        tiny: tiny shapes in Triton's interpreter.
        folder: for the results.

    Returns:
        What the file holds.
    """
    import torch

    from bench.gpu import measure
    from ticketops.files import write_atomically

    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"stage": name, "passed": None, "summary": "not at its end"}

    def keep(row: dict[str, Any] | None = None) -> None:
        rows.extend([] if row is None else [row])
        found = record | ({"rows": rows} if name in BENCHES else {})
        write_atomically(folder / f"{stem}-{name}.json", json.dumps(found, indent=1) + "\n")

    dtype, device = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
    setting = measure.Setting(device, dtype, tiny=tiny, keep=keep)
    record["machine"] = measure.machine(setting)
    stem = measure.stem(record["machine"]["device"])
    start = time.monotonic()
    if name in BENCHES:
        importlib.import_module(f"bench.gpu.{name}").rows(setting)
        red = sorted({f"{row['workload']}: {row['gate']}" for row in rows if row["gate"] != "green"})
        record |= {"passed": not red, "summary": "; ".join(red) or f"{len(rows)} rows, all results checked"}
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
    import torch

    from bench.gpu import measure, plots
    from ticketops.files import write_atomically

    setting = measure.Setting(*(("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)), tiny=tiny)
    machine = measure.machine(setting)
    stem = measure.stem(machine["device"])
    paths = {name: folder / f"{stem}-{name}.json" for name in STAGES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    # What another commit's kernels did says nothing of these.
    found = {name: each for name, each in found.items() if each["machine"] == machine}
    fields = ("passed", "summary", "seconds")
    stages = {name: {field: each.get(field) for field in fields} for name, each in found.items()}
    record: dict[str, Any] = {"machine": machine, "stages": stages}
    rows = [row for each in found.values() for row in each.get("rows", ())]
    if missing := [name for name in CHECKS if name not in found or not found[name]["passed"]]:
        record["ratios_withheld"] = f"not green at this commit: {', '.join(missing)}"
    if tiny:
        record["ratios_withheld"] = "these are timings of Triton's interpreter, not of a GPU"
    if "ratios_withheld" not in record:
        record |= {"ratios": _ratios(rows), "targets": _verdicts(rows)}
    write_atomically(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    for path in plots.draw(rows, machine["device"], folder, stem):
        print(path)
    print(folder / f"{stem}.json")
    return record


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
        try:
            failed |= subprocess.run(command, cwd=ROOT, timeout=options.limit).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {options.limit:.0f} s; what it measured until then is kept", file=sys.stderr)
            failed = True
    merge(options.tiny, folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

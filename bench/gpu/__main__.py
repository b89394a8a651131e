"""python -m bench.gpu [--tiny] [--output DIR] [--only attention,ffn,projection,residual,step,sharing,shrunk]

Runs the tests that need a GPU, compute-sanitizer if it is installed, and the benchmarks. Writes <device>.json (with
--only: <device>-<benchmarks>.json) and charts. Ratios are reported only if the tests and the workload's correctness
gate are green. `--tiny` runs the same code on tiny shapes in Triton's interpreter on the CPU and reports no ratios; it
is the default without a GPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_TOOLS = ("memcheck", "racecheck")
BENCHES = ("attention", "ffn", "projection", "residual", "step", "sharing", "shrunk")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in Triton's interpreter on the CPU")
    parser.add_argument("--output", type=Path, help="folder for the results (default: bench/results; tiny: build/gpu)")
    parser.add_argument("--only", default=",".join(BENCHES), help="names of benchmarks, separated by commas")
    parser.add_argument(
        "--skip-tests", action="store_true", help="skip tests and sanitizer; no ratios are reported then"
    )
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(BENCHES)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {', '.join(BENCHES)}")
    return options


def _has_gpu() -> bool:
    # In a separate process, because this one must set TRITON_INTERPRET before it imports Triton.
    command = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str], root: Path, **variables: str) -> tuple[bool, str]:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | variables)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        print("\n".join(lines[-200:]), file=sys.stderr)
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _tests(tiny: bool, root: Path) -> dict[str, Any]:
    some = ["python_tests/ops/test_triton.py", "-k", "of_nothing"] if tiny else ["python_tests", "-m", "gpu"]
    # Most of the tests' time is compilation of kernels, so run them on all cores if pytest-xdist is installed.
    workers = ["-n", "auto"] if not tiny and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *some]
    passed, summary = _run(command, root)
    return {"passed": passed, "summary": summary}


def _sanitizer(tiny: bool, root: Path) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer")
    if tiny or program is None:
        return {"note": "not run: " + ("no GPU" if tiny else "compute-sanitizer is not on the PATH")}

    def checked(tool: str) -> dict[str, Any]:
        step = [sys.executable, "-m", "bench.gpu.small_step"]
        # Allocate each tensor separately, so that memcheck detects accesses outside it.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        passed, summary = _run([program, "--tool", tool, "--error-exitcode", "1", *step], root, **caching)
        return {"passed": passed, "summary": summary}

    with ThreadPoolExecutor() as pool:
        return dict(zip(_TOOLS, pool.map(checked, _TOOLS), strict=True))


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
_REPLAYED = "ticketops, reduce-overhead"
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
    ("step: transformers + sdpa", "step", "step", "", ("transformers",), 3.0, _REPLAYED),
    ("step: transformers + torch.compile", "step", "step", "", ("transformers, torch.compile",), 1.5, _REPLAYED),
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


def main() -> int:
    """The command behind `make gpu`.

    Returns:
        The exit code: 0, or 1 if a test, the sanitizer or a gate is red.
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
    import torch

    from bench.gpu import measure, plots
    from ticketops.files import write_atomically

    setting = (
        measure.Setting("cpu", torch.float32, tiny=True)
        if options.tiny
        else measure.Setting("cuda", torch.bfloat16, tiny=False)
    )
    record: dict[str, Any] = {"machine": measure.machine(setting)}
    if options.skip_tests:
        record["tests"] = {"passed": False, "summary": "not run: --skip-tests"}
    else:
        print("testing", flush=True)
        with ThreadPoolExecutor() as pool:
            sanitizer = pool.submit(_sanitizer, options.tiny, measure.ROOT)
            record["tests"] = _tests(options.tiny, measure.ROOT)
            record["sanitizer"] = sanitizer.result()
    rows: list[dict[str, Any]] = []
    for name in BENCHES:
        if name in options.only:
            print(f"measuring {name}", flush=True)
            rows += importlib.import_module(f"bench.gpu.{name}").rows(setting)
    record["rows"] = rows
    verdicts = [verdict for verdict in record.get("sanitizer", {}).values() if isinstance(verdict, dict)]
    sanitized = all(verdict["passed"] for verdict in verdicts)
    if options.tiny:
        record["ratios_withheld"] = "these are timings of Triton's interpreter, not of a GPU"
    elif not (record["tests"]["passed"] and sanitized):
        record["ratios_withheld"] = "the tests or the sanitizer are red, or the tests were not run"
    else:
        record["ratios"] = _ratios(rows)
        record["targets"] = _verdicts(rows)
    # Timings of the interpreter do not belong in bench/results.
    folder = options.output or measure.ROOT / ("build/gpu" if options.tiny else "bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    device = record["machine"]["device"]
    some = [] if set(options.only) == set(BENCHES) else options.only
    stem = "-".join([measure.stem(device), *some])
    write_atomically(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    for path in plots.draw(rows, device, folder, stem):
        print(path)
    red = [f"{row['bench']} {row['workload']}: {row['gate']}" for row in rows if row["gate"] != "green"]
    for line in sorted(set(red)):
        print(line, file=sys.stderr)
    print(f"{folder / stem}.json: tests {record['tests']['summary']}")
    failed = not (record["tests"]["passed"] or options.skip_tests)
    return int(bool(red) or failed or not sanitized)


if __name__ == "__main__":
    sys.exit(main())

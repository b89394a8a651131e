"""Options of `pytest bench`, and how contenders that run in turns reach pytest-benchmark."""

import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers

from bench import contenders, lengths, step
from bench.contenders import DEVICE, DTYPES, OURS, Machine, Shape, Sharing, Shrunk, Step

#: Sequences a second of one of eight H200 in MLPerf Training 4.0.
PUBLISHED = {"published_sequences_per_second": 996}
#: What --tiny chooses.
TINY = {
    "lengths": "rte",
    "rows": "2",
    "tokens": None,
    "max_length": 5,
    "channels": 32,
    "heads": 2,
    "layers": 1,
    "rounds": 1,
}
_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ticketops")
    group.addoption("--dtype", default="bf16" if DEVICE.type == "cuda" else "fp32", help="fp32, bf16 or fp32,bf16")
    known = ", ".join(lengths.QUANTILES)
    group.addoption("--lengths", default="rte", help=f"tasks whose lengths rows have ({known}), or tokens of every row")
    group.addoption("--rows", default="16", help="rows of each batch, such as 16,32 (default: 16)")
    group.addoption("--tokens", help="tokens of each batch, such as 4096,16384, in place of its rows")
    group.addoption("--max-length", type=int, default=lengths.MAX_LENGTH, help="most tokens of a task's row")
    group.addoption("--channels", type=int, default=384, help="hidden size (default: 384)")
    group.addoption("--heads", type=int, default=12, help="attention heads (default: 12)")
    group.addoption("--layers", type=int, default=6, help="layers of the model of a step (default: 6)")
    group.addoption("--dropout", type=float, default=0.1, help="of those contenders that have it (default: 0.1)")
    group.addoption(
        "--compile",
        action="store_true",
        default=DEVICE.type == "cuda",
        help="also measure rivals under torch.compile, which takes minutes on a CPU (default: on a GPU)",
    )
    group.addoption(
        "--rounds",
        type=int,
        default=5,
        help="least number of turns of each contender; short ones go on for a second (default: 5)",
    )
    group.addoption("--tiny", action="store_true", help="sizes at which all of this only shows that it runs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []
    for name, value in TINY.items() if config.getoption("--tiny") else ():
        setattr(config.option, name, value)
    for name in ("max_length", "channels", "heads", "layers", "rounds"):
        if (value := config.getoption(name)) < 1:
            raise pytest.UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if config.getoption("--channels") % config.getoption("--heads"):
        raise pytest.UsageError("--channels must be a multiple of --heads")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A function compiled for many shapes; past the limit its times would be those of code that is not compiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass(frozen=True)
class Workload:
    """Rows to measure on.

    Attributes:
        task: key of bench.lengths.QUANTILES, or the number of tokens of every row.
        rows: number of rows.
        longest: most tokens of a task's row.
    """

    task: str
    rows: int
    longest: int = lengths.MAX_LENGTH

    @property
    def name(self) -> str:
        """Name in the results."""
        return f"{self.rows} x {self.task}" if self.task.isdecimal() else f"lengths of {self.task}, batch {self.rows}"

    def draw(self, seed: int = 0) -> tuple[int, ...]:
        """Draws the tokens of each row."""
        return lengths.draw(self.task, self.rows, seed, self.longest)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise pytest.UsageError(f"{option} {text}: it must be positive numbers, separated by commas")
    return [int(part) for part in parts]


def _workloads(config: pytest.Config) -> list[Workload]:
    option = config.getoption
    tasks, longest = option("--lengths").split(","), option("--max-length")
    if unknown := [each for each in tasks if each not in lengths.QUANTILES and not (each.isdecimal() and int(each))]:
        raise pytest.UsageError(
            f"--lengths {','.join(unknown)}: choose from {', '.join(lengths.QUANTILES)} and numbers of tokens"
        )
    by_tokens = option("--tokens") is not None
    sizes = _numbers("--tokens", option("--tokens")) if by_tokens else _numbers("--rows", option("--rows"))
    return [
        Workload(task, lengths.rows_of(task, size, longest) if by_tokens else size, longest)
        for size in sizes
        for task in tasks
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        some = _workloads(metafunc.config)
        metafunc.parametrize("workload", some, ids=[f"{each.rows}x{each.task}" for each in some])
    if "dtype" in metafunc.fixturenames:
        dtypes = metafunc.config.getoption("--dtype").split(",")
        if unknown := set(dtypes) - set(DTYPES):
            raise pytest.UsageError(f"--dtype {','.join(sorted(unknown))}: choose from {', '.join(DTYPES)}")
        metafunc.parametrize("dtype", dtypes)


_times: deque[float] = deque()


def replayed() -> float:
    """A timer for pytest-benchmark, under which each round takes what it took when the contenders ran in turns."""
    return _times.popleft()


class Groups:
    """Measures each group of contenders once, when its first contender is asked for.

    Args:
        config: with the options.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._option = config.getoption
        self._machines: dict[str, Machine] = {}
        self._known: dict[Any, dict[str, Any]] = {}
        # One at a time, since each holds its tensors or models.
        self._problem: tuple[Any, Any, dict[str, str]] = (None, None, {})

    def __call__(self, name: str, workload: Workload, dtype: str, kind: str) -> dict[str, Any]:
        """Returns seconds of each turn, verdicts and failures by contender, and facts about the group.

        Args:
            name: key of OPS, or "step", "sharing", "shrunk", "bert-large" or a key of bench.step.BASE_SIZED.
            workload: rows to measure on.
            dtype: "fp32" or "bf16".
            kind: one of PASSES.
        """
        key = (name, workload, dtype)
        if (*key, kind) not in self._known:
            if key != self._problem[0]:
                self._problem = (None, None, {})
                torch._dynamo.reset()
                torch.manual_seed(0)
                self._problem = (key, self._make(*key), {})
            self._known[*key, kind] = self._measured(dtype, kind)
        return self._known[*key, kind]

    def _make(self, name: str, workload: Workload, dtype: str) -> Any:
        option = self._option
        channels, tiny, compiles = option("--channels"), option("--tiny"), option("--compile")
        shape = Shape(
            workload.draw(), channels, option("--heads"), 4 * channels, option("--layers"), option("--dropout")
        )
        batches = [workload.draw(seed) for seed in range(3)]
        if name in contenders.OPS:
            return contenders.make(name, shape, DTYPES[dtype], compiles)
        if name == "shrunk":
            return Shrunk(shape)
        if name == "sharing":
            return Sharing(shape.config(), batches, dtype, shape=shape)
        if name == "bert-large" and not tiny:
            shape = replace(shape, channels=1024, heads=16, neurons=4096, layers=24)
        if name in ("step", "bert-large"):
            return Step(shape.config(), batches, dtype, compiles, shape)
        return Step(contenders.base_sized(name, tiny), batches, dtype)

    def _measured(self, dtype: str, kind: str) -> dict[str, Any]:
        _, problem, verdicts = self._problem
        clock = kernel_seconds if problem.kernels and DEVICE.type == "cuda" else step.seconds
        least, seconds = (1, 0.0) if self._option("--benchmark-disable") else (self._option("--rounds"), 1.0)
        seconds = 0.0 if self._option("--tiny") else seconds
        machine = self._machines.setdefault(dtype, Machine(DTYPES[dtype]))
        runs, failures = {}, {}
        for name in problem.names(kind):
            # Kernels of others refuse shapes and machines with exceptions of any class, and warn about every reason.
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    # Before any step, which moves the weights.
                    if name not in verdicts:
                        verdicts[name] = problem.verdict(name)
                    run = problem.run(name, kind)
                    for _ in range(0 if self._option("--tiny") else problem.warmups):
                        run()
                runs[name] = run
            except Exception as error:
                first = (str(error).strip().splitlines() or ["no message"])[0]
                failures[name] = f"{type(error).__name__}: {first[:160]}"
        times = in_turns(runs, machine.runs, least, seconds, clock)
        rates = machine.rates(times)
        info: dict[str, Any] = {"operations_per_second": rates.operations, "bytes_per_second": rates.elements}
        if (shape := problem.shape) is not None:
            info |= {"tokens": shape.tokens, "padded_tokens": shape.real.numel(), "channels": shape.channels}
        if parts := problem.work.get(kind):
            parts = [(part.operations, part.elements * problem.element_size) for part in parts]
            info |= {"operations": sum(part[0] for part in parts), "bytes": sum(part[1] for part in parts)}
            info["floor_ms"] = 1e3 * sum(max(o / rates.operations, b / rates.elements) for o, b in parts)
        return {
            "times": {name: [taken / problem.steps for taken in times[name]] for name in runs},
            "verdicts": verdicts,
            "failures": failures,
            "info": info,
            "gpu": {name: gpu_facts(run, problem.steps) for name, run in runs.items()},
        }


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest) -> Groups:
    return Groups(request.config)


_CLEARED: list[torch.Tensor] = []


def kernel_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that a GPU takes for a call, with cold caches, as they are between the layers of a model."""
    # Clearing 4 GiB empties the L2 cache, and takes a millisecond in which the host goes ahead.
    if not _CLEARED:
        _CLEARED.append(torch.empty(1 << 32, dtype=torch.int8, device=device))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _CLEARED[0].zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def gpu_facts(run: Callable[[], object], steps: int) -> dict[str, float]:
    """Measures one more call on a GPU: the milliseconds of a step that its kernels take, whatever the host does, and
    the peak of the memory in MiB. Nothing without a GPU.

    Args:
        run: the call.
        steps: that it makes.
    """
    if DEVICE.type != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    taken = sum(event.time_range.elapsed_us() for event in kernels if not event.is_user_annotation)
    return {"gpu_ms": taken / 1e3 / steps, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def in_turns(
    runs: dict[str, Callable[[], object]],
    machine: dict[str, Callable[[], object]],
    least: int,
    seconds: float,
    clock: Callable[[Callable[[], object], torch.device], float] = step.seconds,
) -> dict[str, list[float]]:
    """Times contenders in turns, each first equally often, after one turn that is not timed.

    Args:
        runs: contenders by name.
        machine: what to time at the end of each turn.
        least: number of turns that there are at least.
        seconds: how long to go on.
        clock: times a call on a device.

    Returns:
        Seconds of each turn by name.
    """
    times: dict[str, list[float]] = {name: [] for name in (*runs, *machine)}
    names, end, turn = list(runs), time.perf_counter() + seconds, -1
    while turn < least or time.perf_counter() < end:
        place = turn % max(len(names), 1)
        for name in (*names[place:], *names[:place], *machine):
            taken = clock({**runs, **machine}[name], DEVICE)
            if turn >= 0:
                times[name].append(taken)
        turn += 1
    return times


_NEEDS = {
    contenders.IMPORTANCE: "a backward pass",
    contenders.GRAPHS: "Triton",
    contenders.BUCKET: "a GPU",
    "flex": "a GPU",
    "varlen": "a GPU and half precision",
    "flash-attn": "a GPU, half precision and its package",
    "flash-deberta": "a GPU, its package and DeBERTa-v3",
    "reduce-overhead": "a GPU",
    **dict.fromkeys(contenders.SDPA, "a GPU"),
}


@pytest.fixture
def report(
    benchmark: Any, groups: Groups, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """Returns a function that checks a contender of a group and hands its times to pytest-benchmark. The test's
    property "row" is what `python -m bench.gpu` keeps."""

    def reported(
        name: str, workload: Workload, dtype: str, kind: str, contender: str, bench: str | None = None
    ) -> None:
        group = groups(name, workload, dtype, kind)
        if contender not in group["times"] and contender not in group["failures"]:
            pytest.skip(f"{contender} needs {_NEEDS.get(contender, '--compile')}")
        verdict, failure = group["verdicts"].get(contender), group["failures"].get(contender)
        row = {
            "bench": bench or name,
            "workload": workload.name if bench is None else f"{name}, {workload.name}",
            "tokens": group["info"].get("tokens", sum(workload.draw())),
            "pass": kind,
            "contender": contender,
            "gate": verdict,
        }
        if failure is not None:
            record_property("row", {**row, "ms": None, "note": failure})
            (pytest.fail if contender.startswith(OURS) else pytest.skip)(f"{contender} failed: {failure}")
        times, info = group["times"], group["info"]
        own = times[contender]
        median = 1e3 * statistics.median(own)
        low, *_, high = statistics.quantiles(own, n=5, method="inclusive") if len(own) > 1 else own * 2
        ratios = {
            rival: statistics.median(a / b for a, b in zip(others, own, strict=True))
            for rival, others in times.items()
            if rival != contender and group["verdicts"][rival] == "green"
        }
        # The floor is that of the whole op.
        has_floor = "floor_ms" in info and contender not in (contenders.HALF_MASKED, contenders.HALF_KEPT)
        floor = {"floor": info["floor_ms"] / median} if has_floor else {}
        named = {"ms": median, "ms_q20": 1e3 * low, "ms_q80": 1e3 * high}
        facts = {**info, **group["gpu"][contender]}
        record_property("row", {**row, **named, "vs": {**ratios, **floor}, "turns": len(own), **facts})
        assert verdict == "green", f"{contender} is wrong, and its times say nothing: {verdict}"
        benchmark.group = ", ".join([row["workload"] if bench else f"{name}, {row['workload']}", kind, dtype])
        benchmark.extra_info |= {
            **facts,
            **{f"share_of_{each}": value for each, value in floor.items()},
            **({"sequences_per_second": 1e3 * workload.rows / median, **PUBLISHED} if name == "bert-large" else {}),
            **{f"vs_{rival}": ratio for rival, ratio in ratios.items()},
            **step.circumstances(DEVICE),
        }
        _times.clear()
        _times.extend(value for taken in own for value in (0.0, taken))
        benchmark.pedantic(lambda: None, rounds=len(own))
        if contender.startswith(OURS):
            against = ", ".join(f"{ratio:.2f}x {rival}" for rival, ratio in ratios.items() if OURS not in rival)
            least = "".join(f"floor {info['floor_ms']:8.2f} ms ({share:4.0%}), " for share in floor.values())
            request.config.stash[_LINES].append(
                f"{benchmark.group:50} {contender:18} {median:9.2f} ms, {least}{against}"
            )

    return reported


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash.get(_LINES, []):
        terminalreporter.section("medians, floors, and how many times as fast as rivals in the same turns")
        for line in lines:
            terminalreporter.write_line(line)

"""Options of `pytest bench`, and how contenders that run in turns reach pytest-benchmark."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from bench import step
from bench.contenders import DEVICE, DTYPES, OPS, OURS, Machine, Shape, Step, with_compiled
from bench.gpu.workloads import QUANTILES, task_lengths

#: Attention heads of every model, as in BERT-base and MiniLM.
HEADS = 12
#: A batch of BERT-large, all of its rows full, as MLPerf packs them; it is fine-tuned here, and pre-trained there.
LARGE = Shape((512,) * 16, channels=1024, heads=16, neurons=4096, layers=24)
#: Sequences a second of one of eight H200 in MLPerf Training 4.0.
PUBLISHED = {"published_sequences_per_second": 996}
_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ticketops")
    group.addoption("--dtype", default="bf16" if DEVICE.type == "cuda" else "fp32", help="fp32, bf16 or fp32,bf16")
    group.addoption("--lengths", default="rte", choices=sorted(QUANTILES), help="task whose lengths rows have")
    group.addoption("--rows", type=int, default=16, help="rows of the batch (default: 16)")
    group.addoption("--channels", type=int, default=384, help="hidden size, 12 heads (default: 384)")
    group.addoption("--layers", type=int, default=6, help="layers of the model of a step (default: 6)")
    group.addoption(
        "--compile",
        action="store_true",
        default=DEVICE.type == "cuda",
        help="also measure rivals under torch.compile, which takes minutes on a CPU (default: on a GPU)",
    )
    group.addoption(
        "--large",
        action="store_true",
        default=DEVICE.type == "cuda",
        help="also measure a step of BERT-large, which takes minutes on a CPU (default: on a GPU)",
    )
    group.addoption(
        "--rounds",
        type=int,
        default=5,
        help="least number of turns of each contender; short ones go on for a second (default: 5)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []
    for name, least in (("rows", 1), ("channels", HEADS), ("layers", 1), ("rounds", 1)):
        if (value := config.getoption(f"--{name}")) % least or value < least:
            raise pytest.UsageError(f"--{name} is {value}: it must be a positive multiple of {least}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        dtypes = metafunc.config.getoption("--dtype").split(",")
        if unknown := set(dtypes) - set(DTYPES):
            raise pytest.UsageError(f"--dtype {','.join(sorted(unknown))}: choose from {', '.join(DTYPES)}")
        metafunc.parametrize("dtype", dtypes)


_times: deque[float] = deque()


def replayed() -> float:
    """A timer for pytest-benchmark, under which each round takes what it took when the contenders ran in turns."""
    return _times.popleft()


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Returns a function that measures a group of contenders once, on the first call for it."""
    option = request.config.getoption
    lengths = task_lengths(option("--lengths"), option("--rows"))
    channels = option("--channels")
    shape = Shape(lengths, channels, HEADS, 4 * channels, option("--layers"))
    least, seconds = (1, 0.0) if option("--benchmark-disable") else (option("--rounds"), 1.0)
    compiles = option("--compile")
    known: dict[Any, Any] = {}

    def remembered(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    def group(name: str, dtype: str, kind: str) -> dict[str, Any]:
        def measured() -> dict[str, Any]:
            torch.manual_seed(0)
            machine = remembered(dtype, lambda: Machine(DTYPES[dtype]))
            problem: Any
            of = LARGE if name == "bert-large" else shape
            if name in ("step", "bert-large"):
                batches = [of.lengths] * 3
                if name == "step":
                    batches = [task_lengths(option("--lengths"), len(of.lengths), seed) for seed in (0, 1, 2)]
                folder = tmp_path_factory.mktemp("model")
                problem = remembered((name, dtype), lambda: Step(of, batches, folder, dtype, compiles))
                check, arguments, size = problem.verdicts, (kind,), 4
            else:
                problem = remembered(name, lambda: OPS[name](shape))
                problem = with_compiled(name, problem) if compiles else problem
                check, arguments = (lambda: problem.verdicts(DTYPES[dtype])), (DTYPES[dtype], kind)
                size = DTYPES[dtype].itemsize
            # First, since training moves the weights.
            verdicts = remembered((name, dtype, "verdicts"), check)
            runs = problem.runs(*arguments)
            times = in_turns(runs, machine.runs, least, seconds)
            rates = machine.rates(times)
            operations, elements = problem.work[kind]
            info = {
                "tokens": of.tokens,
                "padded_tokens": of.real.numel(),
                "channels": of.channels,
                "operations": operations,
                "bytes": elements * size,
                "operations_per_second": rates.operations,
                "bytes_per_second": rates.bytes,
                "floor_ms": 1e3 * max(operations / rates.operations, elements * size / rates.bytes),
            }
            return {"times": {each: times[each] for each in runs}, "verdicts": verdicts, "info": info}

        return remembered((name, dtype, kind), measured)

    return group


def in_turns(
    runs: dict[str, Callable[[], object]], machine: dict[str, Callable[[], object]], least: int, seconds: float
) -> dict[str, list[float]]:
    """Times contenders in turns, each first equally often, after one turn that is not timed.

    Args:
        runs: contenders by name.
        machine: what to time at the end of each turn.
        least: number of turns that there are at least.
        seconds: how long to go on.

    Returns:
        Seconds of each turn by name.
    """
    times: dict[str, list[float]] = {name: [] for name in (*runs, *machine)}
    names, end, turn = list(runs), time.perf_counter() + seconds, -1
    while turn < least or time.perf_counter() < end:
        place = turn % len(names)
        for name in (*names[place:], *names[:place], *machine):
            taken = step.seconds({**runs, **machine}[name], DEVICE)
            if turn >= 0:
                times[name].append(taken)
        turn += 1
    return times


_NEEDS = {
    "flex": "a GPU",
    "varlen": "a GPU and half precision",
    "flash-attn": "a GPU, half precision and its package",
    "reduce-overhead": "a GPU",
}


@pytest.fixture
def report(benchmark: Any, groups: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., None]:
    """Returns a function that checks a contender of a group and hands its times to pytest-benchmark."""

    def reported(name: str, dtype: str, kind: str, contender: str) -> None:
        if name == "bert-large" and not request.config.getoption("--large"):
            pytest.skip("a step of BERT-large takes minutes here: --large")
        group = groups(name, dtype, kind)
        if contender not in group["times"]:
            pytest.skip(f"{contender} needs {_NEEDS.get(contender, '--compile')}")
        verdict = group["verdicts"][contender]
        assert verdict == "green", f"{contender} is wrong, and its times say nothing: {verdict}"
        times = group["times"]
        own = times[contender]
        median = statistics.median(own)
        ratios = {
            f"vs_{rival}": statistics.median(a / b for a, b in zip(others, own, strict=True))
            for rival, others in times.items()
            if rival != contender
        }
        floor = group["info"]["floor_ms"]
        benchmark.group = f"{name}, {kind}, {dtype}"
        benchmark.extra_info |= {
            **group["info"],
            "share_of_floor": floor / median / 1e3,
            **({"sequences_per_second": len(LARGE.lengths) / median, **PUBLISHED} if name == "bert-large" else {}),
            **ratios,
            **step.circumstances(DEVICE),
        }
        _times.clear()
        _times.extend(value for taken in own for value in (0.0, taken))
        benchmark.pedantic(lambda: None, rounds=len(own))
        if contender.startswith(OURS):
            against = ", ".join(f"{ratio:.2f}x {rival[3:]}" for rival, ratio in ratios.items() if OURS not in rival)
            request.config.stash[_LINES].append(
                f"{benchmark.group:34} {contender:18} {1e3 * median:9.2f} ms, floor {floor:8.2f} ms "
                f"({floor / median / 1e3:4.0%}), {against}"
            )

    return reported


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash.get(_LINES, []):
        terminalreporter.section("medians, floors, and how many times as fast as rivals in the same turns")
        for line in lines:
            terminalreporter.write_line(line)

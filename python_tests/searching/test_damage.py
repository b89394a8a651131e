"""Damaged and forged files of runs: each is refused in one line that names the file, or changes nothing."""

import dataclasses
import importlib
import json
import os
import random
import shutil
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ticketops.errors import TicketopsError
from ticketops.files import sealed, sha256
from ticketops.models import load
from ticketops.reporting import read, report
from ticketops.searching import (
    Listener,
    SearchConfig,
    Setting,
    ShareConfig,
    Store,
    TransferConfig,
    run_search,
    run_share,
    run_transfer,
)
from ticketops.searching.progress import status, verify
from ticketops.searching.release import release
from ticketops.searching.sharing import prepare_share
from ticketops.searching.transfer import _adapted, prepare_transfer

from .interrupted import load_once
from .tiny import FIELDS

SHORT = {**{name: value for name, value in FIELDS.items() if name != "kinds"}, "sparsities": "0.5", "epochs": 1}
#: One of these is in every message.
REMEDIES = (
    "delete it",
    "run the same command",
    "restore it",
    "again",
    "choose another",
    "give ",
    "remove",
    "correct it",
    "finish the search",
    "finish that search",
)
JUNK: list[Any] = [
    None, True, 0, -1, 1, 1.5, 1e308, 10**4000, float("nan"), float("inf"), "", "\ud800", "\0", "../../etc/passwd",
    "x" * 10**4, [], {}, [0], [[[[]]]], {"0": 0},
]  # fmt: skip


class Again(Exception):
    """A trial would be made again, as it is where what it left is missing."""


class Idle(Listener):
    """Stops a run that would train."""

    def started(self, trial: Any) -> None:
        raise Again(trial.id)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Finished runs, and what reads them.

    Attributes:
        root: folder of all of them.
        readers: name -> reads a run and returns what it says, to be compared.
    """

    root: Path
    readers: dict[str, Callable[[], Any]]

    def of(self, path: Path) -> list[str]:
        """Names of what reads a file."""
        run, *inside = path.relative_to(self.root).parts
        if run == "small":
            return ["export small", "load small"]
        if "models" in inside:
            best = inside[0] == "models" and ("export search", "export model", "transfer from search")
            return [f"resume {run}", *((best or ()) if run == "search" else [f"export {run}"])]
        if "predictions" in inside:
            return [f"resume {run}"]
        found = [f"report {run}", f"resume {run}"]
        return [*found, "transfer from search", "share from search", "export search"] if run == "search" else found


def digest(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def runs(inputs: dict[str, str], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    model, task, out = inputs["model"], inputs["task"], root.parent / "out"
    search = SearchConfig(
        model=model, task=task, kinds="winning,random", save_models=True, output=str(root / "search"), **SHORT
    )
    common = {"model": model, "save_models": True, **SHORT}
    share = ShareConfig(tasks=(task, pairs), arms="tickets,plain", output=str(root / "share"), **common)
    transfer = TransferConfig(source=task, target=task, fractions="0.5", output=str(root / "transfer"), **common)
    with pytest.MonkeyPatch.context() as patch:
        # Nothing outside the runs is damaged, so it is loaded once.
        patch.setattr(Setting, "load", Setting.load)
        load_once()
        for name in ("search", "sharing", "transfer"):
            patch.setattr(f"ticketops.reporting.{name}.figure", lambda *_: None)
        patch.setattr(importlib.import_module("ticketops.reporting.report"), "html", lambda *_: "")
        for run, config in ((run_search, search), (run_share, share), (run_transfer, transfer)):
            run(config)  # type: ignore[operator]
        release(root / "search", root / "small")
        kept = next((root / "search" / "models").glob("winning*"))

        def exported(folder: Path, **options: Any) -> dict[str, str]:
            shutil.rmtree(out, ignore_errors=True)
            return digest(release(folder, out, **options))

        def reported(folder: Path) -> Any:
            path = report(folder)
            # A record of the same trial, made by another run, took other seconds.
            text = [line for line in path.read_text().splitlines() if not line.startswith("- time:")]
            rows = [line.rpartition(",")[0] for line in (folder / "results.csv").read_text().splitlines()]
            return text, rows, read(folder).table

        def resumed(run: Any, config: Any) -> Any:
            result = read(run(config, Idle()))
            return result.records, config.output and Store.read(config.output).description

        def transferred() -> Any:
            source = TransferConfig(
                source=str(root / "search"), target=task, fractions="0.5", output=str(root / "none"), **common
            )
            ready = prepare_transfer(source)
            origins = [ready.source.trial(kind, ready.source.level(), 0) for kind in ("full", "winning")]
            begun = [_adapted(ready.source, origin, "keep") for origin in origins]
            weights = [float(sum(value.double().sum() for value in one[0].values())) for one, _ in begun]
            return ready.identity, weights, [ticket for _, ticket in begun]

        def shared() -> Any:
            tickets = f"{root / 'search'},{Path(pairs).name}={root / 'share' / 'single' / Path(pairs).name}"
            config = ShareConfig(tasks=(task, pairs), tickets=tickets, output=str(root / "none"), **common)
            return prepare_share(config).identity

        def loaded() -> Any:
            return {name: np.asarray(value).tolist() for name, value in load(root / "small").state_dict().items()}

        readers = {
            "report search": lambda: reported(root / "search"),
            "report share": lambda: reported(root / "share"),
            "report transfer": lambda: reported(root / "transfer"),
            "resume search": lambda: resumed(run_search, search),
            "resume share": lambda: resumed(run_share, share),
            "resume transfer": lambda: resumed(run_transfer, transfer),
            "export search": lambda: exported(root / "search"),
            "export model": lambda: exported(kept),
            "export share": lambda: exported(root / "share", task=Path(pairs).name),
            "export transfer": lambda: exported(root / "transfer", trial="target-0.5-winning-seed-0"),
            "export small": lambda: exported(root / "small"),
            "load small": loaded,
            "transfer from search": transferred,
            "share from search": shared,
        }
        yield Runs(root, readers)


def damage(path: Path, draw: random.Random, others: list[Path]) -> str:
    """Changes a file; returns how: "forged" where its checksum was made anew."""
    content, kind = path.read_bytes(), draw.randrange(12)
    if kind == 0:
        path.unlink()
        return "lost"
    if kind == 1:
        path.write_bytes(content[: draw.randrange(len(content)) if content else 0])
    elif kind == 2:
        alike = [other for other in others if other.suffix == path.suffix and other != path]
        other = draw.choice(alike) if alike else None
        path.write_bytes(b"" if other is None else other.read_bytes())
        if other is not None and other.name == path.name == "config.json":
            # Another run's whole configuration, which says something else where both have the same model and data.
            return "forged"
    elif kind == 3:
        path.write_bytes(draw.choice([b"", b"\0" * len(content), content + b"x", draw.randbytes(64)]))
    elif kind == 4:
        path.unlink()
        # Of these two, a reader that does not look first never comes back.
        draw.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")])()
    elif kind == 5 or path.suffix != ".json":
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif kind == 6:
        deep = '{"a":' * 10**5, "[" * 10**5, '{"id": "x", ' + content.decode()[1:], " " * 2**23, '"\\ud800"'
        path.write_text(draw.choice(deep))
    else:
        return edit(path, draw, json.loads(content))
    return "damaged"


def edit(path: Path, draw: random.Random, content: Any) -> str:
    """Changes one value of a JSON file."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    node, key = draw.choice(places)
    value, kind = node[key], draw.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(value, int | float):
        node[key] = value + draw.choice([-1, 1, 0.5, 1e-3])
    elif kind == 1 and isinstance(value, str) and value:
        node[key] = value[:-1] + draw.choice(string.ascii_letters)
    else:
        node[key] = draw.choice(JUNK)
    forged = draw.random() < 0.5 and isinstance(content.pop("checksum", None), str)
    try:
        path.write_text(json.dumps(sealed(content) if forged else content), encoding="utf-8", errors="surrogatepass")
    except ValueError:
        path.write_text("{")
        return "damaged"
    return "forged" if forged else "damaged"


def difference(one: Any, other: Any, place: str = "") -> str:
    """Where two readings differ first."""
    if type(one) is type(other) and isinstance(one, dict | list | tuple) and len(one) == len(other):
        keys = one if isinstance(one, dict) else range(len(one))
        for key in keys:
            if key not in keys or one[key] != other[key]:
                return difference(one[key], other[key], f"{place}.{key}")
    return f"{place} is {one!r:.200}, not {other!r:.200}"


def judge(read: Callable[[], Any], want: Any, path: Path, how: str) -> str:
    """What came of reading a damaged file; anything but a refusal or the same result fails the test."""
    try:
        got = read()
    except Again:
        return "made again"
    except TicketopsError as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) < 1500, text
        # What is lost may be missed as something unfinished, and a file that is written anew with its checksum may make
        # another one the file that does not fit.
        named = path.name in text or path.parent.name in text
        assert named or how in ("lost", "forged"), f"{path} is not named: {text}"
        assert any(remedy in text for remedy in REMEDIES), f"no remedy: {text}"
        return "refused"
    if got == want:
        return "read as it was"
    # Whoever writes a file anew with its checksum, or takes one away, says something else.
    assert how in ("forged", "lost"), f"{how}: {difference(got, want)}"
    return f"{how}, told otherwise"


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_no_damaged_file_is_believed(runs: Runs, count: int, record_property: Callable[[str, object], None]):
    want = {name: read() for name, read in runs.readers.items()}
    files = [
        path
        for path in sorted(runs.root.rglob("*"))
        if path.is_file() and path.name not in (".lock", "report.md", "report.html")
    ]
    files = [path for path in files if path.suffix != ".csv"]
    before, found, draw = {path: path.read_bytes() for path in files}, Counter[str](), random.Random(count)
    for number in range(count):
        # Every file has its turn, whatever their sizes are.
        path = files[number] if number < len(files) else draw.choice(files)
        name = draw.choice(runs.of(path))
        how = damage(path, draw, files)
        try:
            found[judge(runs.readers[name], want[name], path, how)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of {path}, {how}, met by {name}: {error!r:.2000}") from error
        if path.is_dir():
            path.rmdir()
        elif path.exists() and not path.is_file():
            path.unlink()
        for path, content in before.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for failure in runs.root.rglob("failures/*"):
            failure.unlink()
    assert found["refused"] + found["made again"] > count / 2
    record_property("said", f"{count} damaged files: {dict(found)}")


def test_verify_finds_whichever_file_is_damaged(runs: Runs):
    for run, trials in (("search", 3), ("share", 6), ("transfer", 6)):
        folder = runs.root / run
        found = status(folder)
        assert (len(found.finished), found.failed, found.left, found.running) == (trials, {}, [], {})
        assert verify(folder) == []
        parts = ("trials", "tickets", "importance", "predictions", "models")
        files = [sorted(path for path in folder.rglob(f"{part}/**/*.*") if path.is_file()) for part in parts]
        for path in {several[place] for several in files for place in (0, -1)}:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            damaged = verify(folder)
            path.write_bytes(content)
            assert any(path.name in line or path.parent.name in line for line in damaged), path
        record = next(folder.glob("trials/*.json"))
        content = record.read_bytes()
        record.unlink()
        assert status(folder).left == [record.stem]
        record.write_bytes(content)

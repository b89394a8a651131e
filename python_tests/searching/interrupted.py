"""Runs that are killed, or lose power, at many moments: what they leave in the end equals an undisturbed run's.

Arguments: search, share or transfer; a JSON object of its fields; a folder to work in; how many lives to end; a seed.
Prints how many lives were ended, and at how many moments of a run that can happen.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ticketops import searching
from ticketops.searching import Listener, Setting
from ticketops.searching.sharing import prepare_share
from ticketops.searching.transfer import prepare_transfer

RUNS: dict[str, Any] = {
    "search": (searching.SearchConfig, searching.run_search),
    "share": (searching.ShareConfig, searching.run_share),
    "transfer": (searching.TransferConfig, searching.run_transfer),
}


class Disk:
    """What would be left in a folder after a power cut: content and names that were synced, and no others."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content: dict[int, tuple[int, int]] = {}
        self.names: dict[int, set[str]] = {}
        for path in [folder, *folder.rglob("*")] if folder.exists() else []:
            self._note(path, os.stat(path))

    def _note(self, path: int | Path, found: os.stat_result) -> None:
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = set(os.listdir(path))
        else:
            self.content[found.st_ino] = (found.st_size, found.st_mtime_ns)

    def synced(self, descriptor: int) -> None:
        self._note(descriptor, os.fstat(descriptor))

    def cut(self) -> None:
        """Takes from the folder what a power cut may take."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            found = path.stat()
            if path.name not in self.names.get(path.parent.stat().st_ino, ()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_file() and self.content.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                path.write_bytes(b"")


def live(kind: str, fields: dict[str, Any], output: Path, end: int | float | None, power: bool = False) -> int:
    """Forks a child that makes the run.

    Args:
        end: the number of the event at which it dies; a float: seconds until it is killed; None: it may finish.
        power: whether what was not synced is lost.

    Returns:
        How many events it lived to see; -1 where it was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        events, disk = 0, Disk(output)

        def event(*_: object) -> None:
            nonlocal events
            events += 1
            if events == end:
                if power:
                    disk.cut()
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(function: Callable[..., Any], after: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                event()
                result = function(*arguments, **options)
                after(*arguments)
                event()
                return result

            return call

        class Steps(Listener):
            stepped = event

        os.fsync = counted(os.fsync, disk.synced)
        os.replace, os.unlink = counted(os.replace), counted(os.unlink)
        config, run = RUNS[kind]
        try:
            run(config(**fields, output=str(output)), Steps())
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os.write(writer, str(events).encode())
        os._exit(0)
    os.close(writer)
    if isinstance(end, float):
        time.sleep(end)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 20)
    os.close(reader)
    if status not in (0, signal.SIGKILL):
        sys.exit(f"the child ended with status {status}")
    return int(said) if said else -1


def content(folder: Path) -> dict[str, Any]:
    """Every file of a run, without the seconds that things took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # Claims of killed processes go when the next process begins.
        if path.name == ".lock" or "claims" in path.parts:
            continue
        if "trials" in path.parts[-2:] and path.suffix == ".json":
            record = json.loads(path.read_text())
            found[name] = {key: value for key, value in record.items() if key not in ("timing", "checksum")}
        elif path.is_dir():
            found[name] = None
        elif path.name != "latency.json":
            found[name] = path.read_bytes()
    return found


def load_once() -> None:
    """Has each setting loaded in this process alone; a forked child starts from it as from a fresh load."""
    load, found = Setting.load, {}

    def cached(config: Any, at_most: bool = False, objects: Any = None) -> Setting:
        assert objects is None or not objects.tasks
        apart = {"output": config.output, "save_models": config.save_models}
        key = json.dumps([{**config.to_dict(), **dict.fromkeys(apart)}, at_most])
        if key not in found:
            found[key] = load(config, at_most)
        return dataclasses.replace(found[key], config=dataclasses.replace(found[key].config, **apart))

    Setting.load = cached  # type: ignore[method-assign, assignment]


def main(kind: str, fields: dict[str, Any], folder: Path, count: int, seed: int) -> None:
    load_once()
    undisturbed, interrupted = folder / "undisturbed", folder / "interrupted"
    config = RUNS[kind][0](**fields, output=str(undisturbed))
    # Loads what all lives need.
    prepare: dict[str, Any] = {"search": Setting.load, "share": prepare_share, "transfer": prepare_transfer}
    prepare[kind](config)
    start = time.monotonic()
    events = live(kind, fields, undisturbed, None)
    seconds, want = time.monotonic() - start, content(undisturbed)
    draw, kills, power_cuts = random.Random(seed), 0, 0
    while kills < count:
        shutil.rmtree(interrupted, ignore_errors=True)
        # Spread over all moments of a run; some lives end by the clock, wherever they are.
        end: int | float = 1 + int(events * (kills + draw.random()) / count)
        if draw.random() < 0.15:
            end = seconds * draw.random()
        while True:
            power = draw.random() < 0.5
            if live(kind, fields, interrupted, end, power) >= 0:
                break
            kills += 1
            power_cuts += power and isinstance(end, int)
            # Some runs are killed again, most may finish now.
            end = draw.randrange(1, events) if draw.random() < 0.6 else 10**9
        got = content(interrupted)
        if different := [name for name in {**want, **got} if want.get(name, ...) != got.get(name, ...)]:
            sys.exit(f"after {kills} kills, the last life of {end}, these differ: {different[:5]}")
    print(json.dumps({"kills": kills, "power cuts": power_cuts, "moments": events}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))

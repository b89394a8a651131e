"""Runs on Ray in which workers, machines' managers (raylets) and the command itself are killed at random moments.

Arguments: a JSON object of fields by kind of run; a folder to work in; how many kills; a seed. Each run in the end has
to equal one that nothing disturbed, made in one process. Prints how many of which were killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from searching.interrupted import RUNS, content

#: How often a worker, the command and a raylet are drawn. The command is there longest: before workers, and after them.
WEIGHTS = 0.6, 0.12, 0.28

_RUN = """
import json, sys
from searching.interrupted import RUNS
kind, fields = sys.argv[1], json.loads(sys.argv[2])
config, run = RUNS[kind]
run(config(**fields))
"""


def processes(owner: int) -> dict[int, str]:
    """Processes below another one: number -> command line."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
    below = {owner}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {number: commands[number] for number in below - {owner}}


def disturb(driver: subprocess.Popen, draw: random.Random, done: Counter, count: int) -> None:
    """Kills at random moments until the command ends."""
    while driver.poll() is None:
        time.sleep(draw.uniform(0.2, 6.0))
        if driver.poll() is not None or sum(done.values()) >= count:
            driver.wait()
            return
        what = draw.choices(["worker", "driver", "raylet"], WEIGHTS)[0]
        with_signal = draw.choice([signal.SIGKILL, signal.SIGTERM])
        below = processes(driver.pid)
        found = {
            "worker": [number for number, command in below.items() if command.startswith("ray::")],
            "raylet": [number for number, command in below.items() if "/raylet " in command],
            "driver": [driver.pid],
        }[what]
        if found:
            try:
                os.kill(draw.choice(found), with_signal)
            except ProcessLookupError:
                continue
            done[f"{what} {with_signal.name}"] += 1


def main(runs: dict[str, Any], folder: Path, count: int, seed: int) -> None:
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    draw, done, lives = random.Random(seed), Counter(), 0
    want = {}
    for kind, fields in runs.items():
        config, run = RUNS[kind]
        run(config(**fields, output=str(undisturbed / kind), cpus_per_trial=1))
        want[kind] = content(undisturbed / kind)
    while sum(done.values()) < count:
        for kind, fields in runs.items():
            output = disturbed / kind
            shutil.rmtree(output, ignore_errors=True)
            ends: int | None = None
            while ends != 0:
                values = {**fields, "output": str(output), "executor": "ray", "retries": 3}
                driver = subprocess.Popen(
                    [sys.executable, "-c", _RUN, kind, json.dumps(values)],
                    stderr=open(folder / "stderr", "w"),  # noqa: SIM115
                )
                disturb(driver, draw, done, count)
                ends, lives = driver.returncode, lives + 1
                if ends > 0 and not any(name.startswith(("raylet", "worker", "driver")) for name in done):
                    sys.exit((folder / "stderr").read_text()[-3000:])
            got = content(output)
            if different := [name for name in {**want[kind], **got} if want[kind].get(name, ...) != got.get(name, ...)]:
                sys.exit(f"after {dict(done)}, these differ: {different[:5]}")
    print(json.dumps({"kills": sum(done.values()), "lives": lives, **done}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

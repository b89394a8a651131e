"""Makes a run in children that kill themselves, until it is done; then once more, undisturbed, in another folder.

Arguments: search, share or transfer; a JSON object of its fields, the interrupted run's folder, the other's, and how
many lives the first may take.
"""

import itertools
import json
import os
import signal
import sys

from ticketops import searching
from ticketops.searching import Listener

# Events before the kill: one life after the other, in training steps as well as just before and after a file is there.
RUNS = {
    "search": lambda: (searching.SearchConfig, searching.run_search),
    "share": lambda: (searching.ShareConfig, searching.run_share),
    "transfer": lambda: (searching.TransferConfig, searching.run_transfer),
}
LIVES = [1, 2, 4, 9, 8, 9, 10, 11, 3, 12, 13, 14, 15]


def live(kind: str, fields: dict, output: str, events: int | None) -> bool:
    """Forks a child that works and kills itself at an event; tells whether it finished before."""
    child = os.fork()
    if child == 0:
        counter = itertools.count(1)

        def event(*_: object) -> None:
            if next(counter) == events:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(function):
            def call(*args: object) -> object:
                event()
                result = function(*args)
                event()
                return result

            return call

        class Steps(Listener):
            stepped = event

        os.replace = counted(os.replace)
        config, run = RUNS[kind]()
        run(config(**fields, output=output), Steps())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        sys.exit(f"the child ended with status {status}")
    return status == 0


if __name__ == "__main__":
    kind, fields, interrupted, undisturbed = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    kills = 0
    for events in [*LIVES[: int(sys.argv[5])], None]:
        if live(kind, fields, interrupted, events):
            break
        kills += 1
    live(kind, fields, undisturbed, None)
    print(kills)

"""Runs a search in children that kill themselves, until it is done; then once more, undisturbed, in another folder.

Arguments: a JSON object of the search's fields, the folder for the interrupted search, the folder for the other one.
"""

import itertools
import json
import os
import signal
import sys

from ticketops.searching import Listener, SearchConfig, run_search

# Events before the kill: one life after the other, in training steps as well as just before and after a file is there.
LIVES = [1, 2, 4, 9, 8, 9, 10, 11, 3, 12, 13, 14, 15]


def live(fields: dict, output: str, events: int | None) -> bool:
    """Forks a child that searches and kills itself at an event; tells whether it finished before."""
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
        run_search(SearchConfig(**fields, output=output), Steps())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        sys.exit(f"the child ended with status {status}")
    return status == 0


if __name__ == "__main__":
    fields, interrupted, undisturbed = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    kills = 0
    for events in [*LIVES, None]:
        if live(fields, interrupted, events):
            break
        kills += 1
    live(fields, undisturbed, None)
    print(kills)

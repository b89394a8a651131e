"""Measures training steps of four tasks on one BERT-base: a ticket per task against one ticket for all tasks."""

from collections.abc import Callable

import torch

from bench import sharing
from bench.gpu import step
from bench.gpu.measure import Row, Setting, measured
from bench.gpu.workloads import Workload, task_lengths, tasks

TASKS = 4


def rows(setting: Setting) -> list[Row]:
    """Measures four steps, one per task; "ticketops" switches tickets, the other contender does not.

    Returns:
        The rows.
    """
    table = []
    for task in tasks(setting):
        size = 2 if setting.tiny else 32
        work = Workload(f"{task}, batch {size}, {TASKS} tasks", (5, 2) if setting.tiny else task_lengths(task, size))
        batch = step.make_batch(work, setting)
        verdict = step.check(batch, setting)
        for contender, name in (("ticketops", "switching"), ("ticketops, one ticket for all tasks", "fixed")):

            def build(batch: dict[str, torch.Tensor] = batch, name: str = name) -> Callable[[], object]:
                models = {str(place): step.make_model(setting) for place in range(TASKS)}
                run = sharing.contender(models, name, setting.dtype)

                def steps() -> None:
                    for place in models:
                        run(place, batch)

                return steps

            row = {"bench": "sharing", "workload": work.name, "tokens": work.tokens, "pass": "step"}
            table.append(measured({**row, "contender": contender, "gate": verdict}, build, None, setting))
    return table

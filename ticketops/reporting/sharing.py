"""The report of ticket sharing, and what tickets say about tasks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ticketops.files import write_atomically
from ticketops.reporting import page_figures, task_plots
from ticketops.reporting.page import Figures
from ticketops.reporting.parts import figure, missing, quoted, reproduction, scored_rows, shown, warning_of_a_constant
from ticketops.reporting.tables import csv_text, markdown_table, points
from ticketops.searching.selection import compare_arms, constant_scores
from ticketops.searching.sharing_plan import ARMS, SEARCHES, SINGLE, TaskTicket
from ticketops.searching.statistics import ADVISED_SEEDS, Spread
from ticketops.searching.store import Record, Store
from ticketops.text import count, markdown

if TYPE_CHECKING:
    from ticketops.tickets import Ticket

#: Stands for all tasks among the scores; no task, which is called after a file or a folder, has this name.
AVERAGE = "/"
#: What the table calls each arm.
NAMES = {
    "alone": "one model a task, full",
    "alone, super ticket": "one model a task, super ticket",
    "tickets": "shared, each task its ticket",
    "plain": "shared, no tickets",
    "random": "shared, random tickets",
    "union": "shared, union of all tickets",
    "intersection": "shared, intersection of all tickets",
}
#: Task (or AVERAGE) -> seed -> score.
Scores = dict[str, dict[int, float]]


def lines(store: Store, records: list[Record], figures: Figures) -> list[str]:
    """Writes a share's CSV files and figures, and the text of its report.

    Args:
        store: of the run, finished or not.
        records: of its finished trials.
        figures: file name of a figure -> what draws it for report.html; filled here.

    Returns:
        The report's lines of Markdown.

    Raises:
        StoreError: one of its files is damaged, or the folder cannot be written.
    """
    config = store.config
    tasks = list(store.description["notes"]["tasks"])
    searches = [Store.read(store.folder / SEARCHES / name) for name in tasks if _searched(store, name)]
    inner = [record for search in searches for record in search.records()]
    title = heading(store)
    text = [f"# {markdown(title)}", ""]
    text += missing(store, records, searches)
    tickets = {
        name: {seed: found for seed in config.seeds if (found := store.ticket(TaskTicket(name, seed))) is not None}
        for name in tasks
    }
    write_atomically(store.folder / "results.csv", csv_text(trial_rows(records)))
    if records:
        arms = scores(store)
        text += [markdown(headline(store, records)), "", *quoted(warnings(records))]
        text += [*_splits(_reports(records)), ""]
        figure(store.folder / "sharing.png", plot, arms, title)
        figures["sharing.png"] = partial(page_figures.arms, *drawn(arms))
        text += ["![each arm, by task](sharing.png)", ""]
        text += [markdown_table(overview(store)), ""]
        text += ["Scores are each task's own metric x 100 ("]
        text[-1] += ", ".join(
            f"{markdown(name)}: {markdown(task['metric'])}" for name, task in records[0]["tasks"].items()
        )
        text[-1] += "), mean ± standard deviation over seeds."
        if "plain" in arms and len(arms) > 1:
            text += ["", "Differences to plain multi-task training, seed by seed:", "", markdown_table(_gains(arms))]
        text += ["", *_sizes(records), ""]
    if any(tickets.values()):
        text += _tickets(store, tickets, title, figures)
    text += [
        "## Tasks",
        "",
        *(f"- {markdown(described)}" for described in store.description["notes"]["tasks"].values()),
        "",
    ]
    return [*text, *reproduction(store, [*inner, *records])]


def heading(store: Store) -> str:
    """The title of a share's report."""
    return f"Ticket sharing of {store.config.model} over {', '.join(store.description['notes']['tasks'])}"


def plot(arms: Mapping[str, Scores], title: str) -> Figure:
    """Draws each arm's scores by task, or their differences from multi-task training without tickets.

    Args:
        arms: as `scores` returns them.
        title: title of the share.
    """
    return task_plots.arms(*drawn(arms), title)


def drawn(arms: Mapping[str, Scores]) -> tuple[dict[str, dict[str, list[float]]], dict[str, str], bool]:
    """Returns what is drawn of the arms: the first arguments of `task_plots.arms`.

    Args:
        arms: as `scores` returns them.
    """
    return _differences(arms), {AVERAGE: _title(AVERAGE)}, "plain" in arms


def overview(store: Store) -> list[list[str]]:
    """One row an arm: its score on every task and their average.

    Args:
        store: of the run.

    Returns:
        Rows of cells, header first.
    """
    arms = scores(store)
    tasks = [*store.description["notes"]["tasks"], AVERAGE]
    rows = [["arm", *map(_title, tasks), "seeds"]]
    for arm, found in arms.items():
        seeds = max((len(by_seed) for by_seed in found.values()), default=0)
        rows.append([NAMES[arm], *(points(Spread.of(found.get(task, {}).values())) for task in tasks), str(seeds)])
    return rows


def scores(store: Store) -> dict[str, Scores]:
    """The scores that the report compares, on the split that reports.

    Args:
        store: of the run.

    Returns:
        Arm -> task, or AVERAGE -> seed -> score; single-task trainings first, under "alone".
    """
    held_out = _reports(store.records()) == "report"
    tasks = list(store.description["notes"]["tasks"])
    arms: dict[str, Scores] = {}
    single: dict[str, Record] = store.facts(SINGLE) or {}
    for arm, kind in (("alone", "full"), ("alone, super ticket", "winning")):
        found: Scores = {
            task: {int(seed): pair[held_out] for seed, pair in single[task]["scores"].get(kind, {}).items()}
            for task in tasks
            if task in single
        }
        # A search that held nothing out has nothing to report.
        if any(None not in by_seed.values() for by_seed in found.values()):
            arms[arm] = {task: by_seed for task, by_seed in found.items() if None not in by_seed.values()}
    for record in store.records():
        arm_scores = arms.setdefault(record["kind"], {})
        for task, one in record["tasks"].items():
            arm_scores.setdefault(task, {})[record["seed"]] = one["report_score" if held_out else "score"]
    for arm_scores in arms.values():
        seeds = set.intersection(*(set(arm_scores.get(task, {})) for task in tasks))
        arm_scores[AVERAGE] = {
            seed: float(np.mean([arm_scores[task][seed] for task in tasks])) for seed in sorted(seeds)
        }
    order = [arm for arm in (*NAMES, *ARMS) if arm in arms]
    return {arm: arms[arm] for arm in dict.fromkeys(order)}


_VERDICTS = {
    "better": "it beats {}",
    "worse": "it is worse than {}",
    "no difference shown": "no difference is shown to {}",
    "no verdict": f"one seed gives no verdict (--seeds {ADVISED_SEEDS} allows one) against {{}}",
}


def headline(store: Store, records: Sequence[Record]) -> str:
    """The finding of a share: task averages of sharing with tickets against plain sharing and random tickets.

    Args:
        store: of the share.
        records: of its finished trials.
    """
    ours = [record for record in records if record["kind"] == "tickets"]
    if not ours:
        return "No finding yet: that takes the arm tickets on all tasks."
    split = _reports(records)
    score = "report_score" if split == "report" else "score"
    averages = Spread.of(float(np.mean([task[score] for task in record["tasks"].values()])) for record in ours)
    text = f"Ticket sharing averages {points(averages)} over the tasks"
    names = {"plain": "plain multi-task training", "random": "random tickets of the same counts"}
    found = {arm: one for arm, one in compare_arms(store, records).items() if arm in names and one.difference.count}
    against = [f"{_VERDICTS[one.outcome].format(names[arm])}, {shown(one, 'arms')}" for arm, one in found.items()]
    rows = {f"{split} of {name}": task.get("rows", {}).get(split, 0) for name, task in _tasks(ours[0])}
    return " ".join([f"{text}: {'; '.join(against)}." if against else f"{text}.", scored_rows(rows)])


def warnings(records: Sequence[Record]) -> list[str]:
    """Which arms have not been shown to learn which tasks.

    Args:
        records: of the finished trials.
    """
    split, text = _reports(records), []
    score = "report_score" if split == "report" else "score"
    for arm in ("plain", "tickets"):
        of_arm = [record["tasks"] for record in records if record["kind"] == arm]
        for name, task in of_arm[0].items() if of_arm else ():
            scores = [tasks[name][score] for tasks in of_arm]
            constant, rows = constant_scores(task).get(split, 0.0), task.get("rows", {}).get(split, 0)
            what = f'On {name}, "{NAMES[arm]}"'
            text += warning_of_a_constant(what, task["metric"], scores, constant, rows)
    return text


def _reports(records: Sequence[Record]) -> str:
    """The split that reports."""
    held_out = records and all(task["report_score"] is not None for _, task in _tasks(records[0]))
    return "report" if held_out else "validation"


def _tasks(record: Record) -> Iterable[tuple[str, Record]]:
    return record["tasks"].items()


def _title(task: str) -> str:
    return "task average" if task == AVERAGE else task


def _searched(store: Store, task: str) -> bool:
    return (store.folder / SEARCHES / task / "config.json").exists()


def _splits(split: str) -> list[str]:
    if split == "report":
        return [
            "The split `validation` chooses each task's super ticket; the split `report`, held out of it or the "
            "data's own test split, reports."
        ]
    return [
        "The same split, `validation`, chooses each task's super ticket, trained alone, and reports here; "
        "`--report-fraction 0.5` holds a report split out."
    ]


def _differences(arms: Mapping[str, Scores]) -> dict[str, dict[str, list[float]]]:
    """Arm -> task -> its differences by seed to plain multi-task training where there is one, else its scores."""
    plain = arms.get("plain")
    found: dict[str, dict[str, list[float]]] = {}
    for arm, by_task in arms.items():
        if plain is None:
            found[arm] = {task: list(by_seed.values()) for task, by_seed in by_task.items() if by_seed}
        elif arm != "plain":
            pairs = {
                task: [score - plain[task][seed] for seed, score in by_seed.items() if seed in plain.get(task, {})]
                for task, by_seed in by_task.items()
            }
            found[arm] = {task: values for task, values in pairs.items() if values}
    return {NAMES[arm]: by_task for arm, by_task in found.items()}


def _gains(arms: Mapping[str, Scores]) -> list[list[str]]:
    tasks = list(arms["plain"])
    rows = [["arm", *map(_title, tasks)]]
    for name, by_task in _differences(arms).items():
        cells = (points(Spread.of(by_task[task]), sign=True) if task in by_task else "–" for task in tasks)
        rows.append([name, *cells])
    return rows


def _sizes(records: Sequence[Record]) -> list[str]:
    """What each arm keeps: one row an arm and task, means over seeds."""
    rows = [["arm", "task", "heads pruned", "FFNs pruned", "weights left (%)", "training rows", "steps"]]
    for arm in ARMS:
        of_arm = [record["tasks"] for record in records if record["kind"] == arm]
        for task in of_arm[0] if of_arm and arm != "plain" else ():

            def mean(field: str, of_arm: list[Any] = of_arm, task: str = task) -> float:
                return float(np.mean([tasks[task][field] for tasks in of_arm]))

            counts = [f"{mean(name):.3g}" for name in ("heads_pruned", "ffns_pruned")]
            left = f"{100 * mean('weights_remaining'):.1f}"
            rows.append([arm, task, *counts, left, f"{mean('train_rows'):,.0f}", f"{mean('steps'):,.0f}"])
    return [markdown_table(rows)] if len(rows) > 1 else []


def trial_rows(records: Sequence[Record]) -> list[list[Any]]:
    """Returns one row per trial and task of a share, header first, for `results.csv` and `to_pandas()`.

    Args:
        records: of its finished trials.
    """
    pruned = ("heads_pruned", "ffns_pruned", "neurons_pruned")
    columns = (*pruned, "weights_remaining", "weights_remaining_encoder", "train_rows", "steps")
    details = sorted(
        {
            (split, name)
            for record in records
            for task in record["tasks"].values()
            for split, found in task["scores"].items()
            for name in found
        }
    )
    header = ["id", "arm", "seed", "mixing", "task", *columns, "metric", "score", "report_score"]
    header += [*(f"{split}_{name}" for split, name in details), "trial_train_loss", "trial_train_seconds"]
    rows: list[list[Any]] = [header]
    for record in records:
        for name, task in record["tasks"].items():
            row = [*(record[column] for column in ("id", "kind", "seed", "mixing")), name]
            row += [task[column] for column in columns]
            row += [task[column] for column in ("metric", "score", "report_score")]
            row += [task["scores"].get(split, {}).get(metric) for split, metric in details]
            rows.append([*row, record["train_loss"], record["timing"]["train_seconds"]])
    return rows


def _tickets(store: Store, tickets: "Mapping[str, Mapping[int, Ticket]]", title: str, figures: Figures) -> list[str]:
    """What tickets say about tasks: overlaps and layer profiles, as figures, files and text."""
    pairs = [
        (one, other, *_alike(tickets[one[0]][one[1]], tickets[other[0]][other[1]]))
        for one, other in itertools.combinations([(task, seed) for task in tickets for seed in tickets[task]], 2)
    ]
    header = ["task", "seed", "other_task", "other_seed", "jaccard", "chance", "chance_std"]
    rows: list[list[Any]] = [[*one, *other, *alike] for one, other, *alike in pairs]
    write_atomically(store.folder / "overlap.csv", csv_text([header, *rows]))
    tasks = list(tickets)
    overlap, chance = (np.full((len(tasks), len(tasks)), np.nan) for _ in range(2))
    for (i, task), (j, other) in itertools.product(enumerate(tasks), repeat=2):
        both = [alike for one, two, *alike in pairs if {one[0], two[0]} == {task, other}]
        if both:
            overlap[i, j], chance[i, j] = np.mean([alike[:2] for alike in both], axis=0)
    figure(store.folder / "overlap.png", task_plots.overlaps, tasks, overlap, chance, title)
    figures["overlap.png"] = partial(page_figures.overlaps, tasks, overlap, chance)
    figure(store.folder / "layers.png", task_plots.profiles, tickets, title)
    figures["layers.png"] = partial(page_figures.profiles, tickets)
    write_atomically(store.folder / "layers.csv", _profiles(tickets))
    between = [alike for one, two, *alike in pairs if one[0] != two[0]]
    within = [alike for one, two, *alike in pairs if one[0] == two[0]]
    found = []
    for what, some in (("of two tasks", between), ("of two seeds of one task", within)):
        if some:
            ours, theirs, deviation = np.mean(some, axis=0)
            found.append(
                f"Tickets {what} share {100 * ours:.1f} % of what either keeps (mean of {count(len(some), 'pair')}); "
                f"random tickets of the same sizes would share {100 * theirs:.1f} % ± {100 * deviation:.1f}."
            )
    return [
        "## What tickets say about tasks",
        "",
        "![overlap of tickets](overlap.png)",
        "",
        *found,
        "Overlap is Jaccard's: structures that both keep over structures that either keeps, heads and FFNs alike; on "
        "the diagonal stands the agreement between seeds. ± is the standard deviation of one random pair. Every pair "
        "is in overlap.csv.",
        "",
        "![what tickets keep, layer by layer](layers.png)",
        "",
        "The layers' profiles are in layers.csv.",
        "",
    ]


def _alike(one: "Ticket", other: "Ticket") -> tuple[float, float, float]:
    from ticketops.tickets import chance_jaccard

    return one.jaccard(other), *chance_jaccard(one, other)


def _profiles(tickets: "Mapping[str, Mapping[int, Ticket]]") -> str:
    rows: list[list[Any]] = [["task", "seed", "layer", "heads_kept", "heads", "ffn_kept"]]
    for task, by_seed in tickets.items():
        for seed, ticket in by_seed.items():
            kept = zip(ticket.head_mask.sum(1).tolist(), ticket.ffn_shares.tolist(), strict=True)
            rows += [
                [task, seed, layer, heads, ticket.num_heads, f"{ffn:g}"] for layer, (heads, ffn) in enumerate(kept)
            ]
    return csv_text(rows)

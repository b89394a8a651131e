"""What the JSON files of a run hold: one type for each, by which every file is checked when it is read.

Keys that are not named here are let through, so that a later version may add some.
"""

import functools
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Le, Len, Lt, MaxLen, Predicate
from typing_extensions import TypedDict

Count = Annotated[int, Ge(0), Lt(2**53)]
Positive = Annotated[int, Gt(0), Lt(2**53)]
Share = Annotated[float, Ge(0), Le(1)]
Sparsity = Annotated[float, Ge(0), Lt(1)]
Seconds = Annotated[float, Ge(0)]
Score = Annotated[float, Ge(-1e6), Le(1e6)]


def text_of_at_most_4096_characters(value: Any) -> bool:
    """Whether a value is such a text; it may have bytes of a path that are no text, as Python's lone surrogates."""
    return isinstance(value, str) and len(value) <= 4096


Name = Annotated[Any, Predicate(text_of_at_most_4096_characters)]


class Scores(TypedDict):
    """Metric -> value, on the split that selects and on the one that reports."""

    validation: dict[Name, Score]
    report: NotRequired[dict[Name, Score]]


class Rows(TypedDict):
    """How many rows each split has that scores."""

    validation: Positive
    report: NotRequired[Positive]


class Constants(TypedDict):
    """What a constant answer scores on each split."""

    validation: Score
    report: NotRequired[Score]


class Cost(TypedDict):
    """What a model costs: fields of `ticketops.models.Cost`."""

    parameters: Positive
    macs_per_token: Positive
    bytes: Positive
    length: NotRequired[Positive]


class Costs(TypedDict):
    """Of the whole model, and of what a ticket leaves of it."""

    whole: Cost
    left: Cost


class Environment(TypedDict):
    """Versions and machine, as `environment.circumstances` gives them."""

    versions: dict[Name, Name]
    machine: dict[Name, str | int | None]
    backends: NotRequired[dict[Name, Name]]


class Scored(TypedDict):
    """A model's scores on one task, and what its ticket prunes."""

    metric: Name
    score: Score
    report_score: Score | None
    scores: Scores
    majority: Score
    predictions_sha256: NotRequired[Name]
    rows: NotRequired["Rows"]
    constant_scores: NotRequired["Constants"]
    heads_pruned: Count
    ffns_pruned: Count
    neurons_pruned: NotRequired[Count]
    weights_remaining: Share
    weights_remaining_encoder: Share
    steps: Count


class Trained(TypedDict):
    """What every record says of its training."""

    id: Name
    seed: Count
    train_loss: float
    steps: Count
    timing: "Timing"
    model: NotRequired[Name]
    environment: NotRequired[Environment]
    #: Split, or "TASK.split" -> where its logits are.
    predictions: NotRequired[dict[Name, "Kept"]]
    #: Digest of model and data, by which a record of another run is told.
    run: NotRequired[Name]
    #: Path in the run's folder -> SHA-256 of what the trial has left there.
    files: NotRequired[dict[Name, Name]]


class Kept(TypedDict):
    """A file in the run's folder."""

    file: Name
    sha256: Name


class Timing(TypedDict):
    """Seconds by what took them."""

    train_seconds: Seconds
    evaluate_seconds: NotRequired[Seconds]
    score_seconds: NotRequired[Seconds]


class SearchRecord(Scored, Trained):
    """A finished trial of a search."""

    task: Name
    kind: Literal["full", "winning", "random", "losing"]
    sparsity: Sparsity
    weights: NotRequired[Positive]
    costs: NotRequired[Costs]
    rank_correlation: NotRequired[dict[Literal["head", "ffn"], Score | None]]


class TransferRecord(SearchRecord):
    """A finished trial of a transfer."""

    ladder: Literal["source", "target"]
    fraction: Annotated[float, Gt(0), Le(1)]
    train_rows: Positive
    epochs: Positive


class ShareTask(Scored):
    """One task of a multi-task trial."""

    train_rows: Positive


class ShareRecord(Trained):
    """A finished multi-task trial."""

    kind: Literal["tickets", "plain", "random", "union", "intersection"]
    mixing: Name
    metric: Name
    score: Score
    report_score: Score | None
    tasks: dict[Name, ShareTask]


class Failure(TypedDict):
    """A trial that failed."""

    id: Name
    seed: Count
    error: Name
    environment: Environment


class Single(TypedDict):
    """The scores of a task's search inside a larger run, as `single_scores` makes them."""

    metric: Name
    majority: Score
    sparsity: Sparsity | None
    #: Full model and super ticket -> seed -> scores on the splits that select and report.
    scores: dict[
        Literal["full", "winning"],
        dict[Annotated[str, MaxLen(10), Predicate(str.isdecimal)], Annotated[list[Score | None], Len(2, 2)]],
    ]
    train_rows: NotRequired[Positive]


class Latency(TypedDict):
    """One row of `latencies`, in milliseconds."""

    batch: Positive
    length: Positive
    whole_ms: Annotated[float, Gt(0)]
    left_ms: Annotated[float, Gt(0)]


class Latencies(TypedDict):
    """What the full model and the super ticket took."""

    machine: dict[Name, str | int | None]
    rows: list[Latency]


class Identity(TypedDict):
    """What a run's results depend on."""

    kind: NotRequired[Literal["search", "share", "transfer"]]
    config: dict[str, Any]
    task_fingerprint: Name | dict[Name, Name]
    model_fingerprint: Name
    layers: Annotated[int, Ge(1), Le(1024)]
    heads: Annotated[int, Ge(1), Le(1024)]
    neurons: NotRequired[Annotated[int, Ge(1), Le(10**7)]]
    training: NotRequired[dict[Name, Any]]
    tickets: NotRequired[dict[Name, dict[Name, Name]] | None]
    first_tasks: NotRequired[Annotated[int, Ge(2)]]
    source: NotRequired[dict[str, Any]]
    source_fingerprint: NotRequired[Name]
    source_results: NotRequired[str | dict[Name, Name] | None]


class Notes(Environment):
    """What is noted of a run's first process."""

    validation: NotRequired[Name | dict[Name, Name]]
    tasks: NotRequired[dict[Name, Name]]


class Description(TypedDict):
    """The run's own `config.json`."""

    format: Literal[1, 2]
    identity: Identity
    notes: Notes


@functools.cache
def _adapter(kind: Any) -> Any:
    # Only what reads runs needs it.
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def problem(kind: Any, content: Any) -> str | None:
    """What is wrong with a file's content.

    Args:
        kind: what it should be, a type of this module.
        content: as JSON gives it.

    Returns:
        The first problem in words, with the place; None where there is none.
    """
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        reason = first["msg"][0].lower() + first["msg"][1:]
        return " ".join(f"{place or 'it'}: {reason}".split())
    return None

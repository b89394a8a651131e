"""Types of a run's JSON files. Every file is validated against its type when it is read.

Unknown keys are allowed, so that later versions can add some.
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
    """Returns True if a value is such a text. It may contain lone surrogates, Python's form of undecodable path
    bytes."""
    return isinstance(value, str) and len(value) <= 4096


Name = Annotated[Any, Predicate(text_of_at_most_4096_characters)]


class Scores(TypedDict):
    """Metric -> value, on the split for selection and on the split for reporting."""

    validation: dict[Name, Score]
    report: NotRequired[dict[Name, Score]]


class Rows(TypedDict):
    """Number of scored rows of each split."""

    validation: Positive
    report: NotRequired[Positive]


class Constants(TypedDict):
    """Score of a constant answer on each split."""

    validation: Score
    report: NotRequired[Score]


class Cost(TypedDict):
    """Cost of a model: fields of `ticketops.models.Cost`."""

    parameters: Positive
    macs_per_token: Positive
    bytes: Positive
    length: NotRequired[Positive]


class Costs(TypedDict):
    """Cost of the whole model, and of the model shrunk to its ticket."""

    whole: Cost
    left: Cost


class Environment(TypedDict):
    """Versions and machine, as `environment.circumstances` returns them."""

    versions: dict[Name, Name]
    machine: dict[Name, str | int | None]
    backends: NotRequired[dict[Name, Name]]


class Scored(TypedDict):
    """Scores of a model on one task, and the number of structures that its ticket prunes."""

    metric: Name
    score: Score
    report_score: Score | None
    scores: Scores
    majority: Score
    predictions_sha256: NotRequired[Name]
    rows: NotRequired["Rows"]
    constant_scores: NotRequired["Constants"]
    #: By a metric of the user's own: scores of both halves of the validation rows, for each random split into halves.
    halves: NotRequired[list[Annotated[list[Score], Len(2, 2)]]]
    heads_pruned: Count
    ffns_pruned: Count
    neurons_pruned: NotRequired[Count]
    weights_remaining: Share
    weights_remaining_encoder: Share
    steps: Count


class Trained(TypedDict):
    """Training of a trial: fields that all records have."""

    id: Name
    seed: Count
    train_loss: float
    steps: Count
    timing: "Timing"
    model: NotRequired[Name]
    environment: NotRequired[Environment]
    #: Split, or "TASK.split" -> file of its logits; with "-rows" behind it, of what each row contributes to the metric.
    predictions: NotRequired[dict[Name, "Kept"]]
    #: Digest of the run's model and data, which identifies records of other runs.
    run: NotRequired[Name]
    #: Path in the run's folder -> SHA-256, for each file that the trial wrote.
    files: NotRequired[dict[Name, Name]]


class Kept(TypedDict):
    """A file in the run's folder, and its checksum."""

    file: Name
    sha256: Name


class Timing(TypedDict):
    """Duration of the parts of a trial, in seconds."""

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
    #: With early stopping, the optimizer step whose weights were kept.
    best_step: NotRequired[Count | None]
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


#: Kind of run -> type of its records.
RECORDS: dict[str, Any] = {"search": SearchRecord, "share": ShareRecord, "transfer": TransferRecord}


class Failure(TypedDict):
    """A trial that failed."""

    id: Name
    seed: Count
    error: Name
    environment: Environment
    #: Where an unexpected error happened.
    trace: NotRequired[Name]


class Single(TypedDict):
    """Scores of a task's search inside a larger run, as `single_scores` returns them."""

    metric: Name
    majority: Score
    sparsity: Sparsity | None
    #: Full model and super ticket -> seed -> scores on the splits for selection and reporting.
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
    """Latencies of the full model and of the model shrunk to the super ticket."""

    machine: dict[Name, str | int | None]
    rows: list[Latency]


class Identity(TypedDict):
    """Everything that a run's results depend on."""

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
    """Notes of the process that created the run; results do not depend on them."""

    validation: NotRequired[Name | dict[Name, Name]]
    tasks: NotRequired[dict[Name, Name]]


class Description(TypedDict):
    """The run's own `config.json`."""

    format: Literal[1, 2]
    identity: Identity
    notes: Notes


@functools.cache
def _adapter(kind: Any) -> Any:
    # Imported here, because only the reading of runs needs it.
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def problem(kind: Any, content: Any) -> str | None:
    """Validates the content of a JSON file.

    Args:
        kind: type of the file, one of this module.
        content: parsed JSON.

    Returns:
        A description of the first problem, with its place in the content; None if there is none.
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

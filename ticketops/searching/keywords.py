"""Keyword arguments of `ticketops.search`, `share` and `transfer`, for editors and type checkers.

Each has the names of its configuration's fields; a test compares them. Values are `Any`, because a field takes what a
flag, a YAML file or Python may give: a list, text separated by commas, a data set.
"""

from typing import Any, TypedDict


class RunFields(TypedDict, total=False):
    """The fields of all runs."""

    model: Any
    revision: Any
    sparsities: Any
    seeds: Any
    min_heads: Any
    prune_neurons: Any
    recipe: Any
    batch_size: Any
    learning_rate: Any
    warmup_steps: Any
    lr_scheduler_type: Any
    weight_decay: Any
    max_grad_norm: Any
    dtype: Any
    save_models: Any
    executor: Any
    address: Any
    cpus_per_trial: Any
    gpus_per_trial: Any
    graphs: Any
    retries: Any
    report_to: Any
    granularity: Any
    train_rows: Any
    validation_rows: Any
    report_fraction: Any
    output: Any
    epochs: Any
    class_weights: Any
    metric: Any
    threshold: Any
    text_columns: Any
    label_column: Any
    task_kind: Any
    encoding: Any
    max_length: Any


class SearchFields(RunFields, total=False):
    """The fields of `SearchConfig`, whose docstring says what each one means."""

    task: Any
    kinds: Any
    halving: Any
    gradient_accumulation_steps: Any
    early_stopping_patience: Any
    importance: Any
    loss: Any


class ShareFields(RunFields, total=False):
    """The fields of `ShareConfig`, whose docstring says what each one means."""

    tasks: Any
    tickets: Any
    arms: Any
    mixing: Any


class TransferFields(RunFields, total=False):
    """The fields of `TransferConfig`, whose docstring says what each one means."""

    source: Any
    target: Any
    fractions: Any
    head: Any
    source_ladder: Any
    min_steps: Any
    gradient_accumulation_steps: Any
    early_stopping_patience: Any

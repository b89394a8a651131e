"""Keyword arguments of `ticketops.search`, `share` and `transfer`, for editors and type checkers.

Each has the names of its configuration's fields; a test compares them. Values are `Any`, because a field takes what a
flag, a YAML file or Python may give: a list, text separated by commas, a data set.
"""

from typing import Any, TypedDict


class SearchFields(TypedDict, total=False):
    """The fields of `SearchConfig`, whose docstring says what each one means."""

    model: Any
    revision: Any
    task: Any
    output: Any
    sparsities: Any
    kinds: Any
    seeds: Any
    min_heads: Any
    prune_neurons: Any
    recipe: Any
    epochs: Any
    batch_size: Any
    learning_rate: Any
    warmup_steps: Any
    lr_scheduler_type: Any
    weight_decay: Any
    max_grad_norm: Any
    gradient_accumulation_steps: Any
    early_stopping_patience: Any
    class_weights: Any
    dtype: Any
    save_models: Any
    executor: Any
    address: Any
    cpus_per_trial: Any
    gpus_per_trial: Any
    retries: Any
    report_to: Any
    importance: Any
    granularity: Any
    metric: Any
    threshold: Any
    text_columns: Any
    label_column: Any
    task_kind: Any
    loss: Any
    encoding: Any
    max_length: Any
    train_rows: Any
    validation_rows: Any
    report_fraction: Any


class ShareFields(TypedDict, total=False):
    """The fields of `ShareConfig`, whose docstring says what each one means."""

    model: Any
    revision: Any
    tasks: Any
    output: Any
    tickets: Any
    arms: Any
    mixing: Any
    sparsities: Any
    prune_neurons: Any
    seeds: Any
    min_heads: Any
    recipe: Any
    epochs: Any
    batch_size: Any
    learning_rate: Any
    warmup_steps: Any
    lr_scheduler_type: Any
    weight_decay: Any
    max_grad_norm: Any
    class_weights: Any
    dtype: Any
    save_models: Any
    executor: Any
    address: Any
    cpus_per_trial: Any
    gpus_per_trial: Any
    retries: Any
    report_to: Any
    granularity: Any
    metric: Any
    threshold: Any
    text_columns: Any
    label_column: Any
    task_kind: Any
    encoding: Any
    max_length: Any
    train_rows: Any
    validation_rows: Any
    report_fraction: Any


class TransferFields(TypedDict, total=False):
    """The fields of `TransferConfig`, whose docstring says what each one means."""

    model: Any
    revision: Any
    source: Any
    target: Any
    output: Any
    fractions: Any
    head: Any
    source_ladder: Any
    min_steps: Any
    sparsities: Any
    prune_neurons: Any
    seeds: Any
    min_heads: Any
    recipe: Any
    epochs: Any
    batch_size: Any
    learning_rate: Any
    warmup_steps: Any
    lr_scheduler_type: Any
    weight_decay: Any
    max_grad_norm: Any
    gradient_accumulation_steps: Any
    early_stopping_patience: Any
    class_weights: Any
    dtype: Any
    save_models: Any
    executor: Any
    address: Any
    cpus_per_trial: Any
    gpus_per_trial: Any
    retries: Any
    report_to: Any
    granularity: Any
    metric: Any
    threshold: Any
    text_columns: Any
    label_column: Any
    task_kind: Any
    encoding: Any
    max_length: Any
    train_rows: Any
    validation_rows: Any
    report_fraction: Any

"""What all runs have in common: model, tickets, training, rows, and where trials run. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from ticketops.searching.config import DATA, EXECUTION, PLAN, SCORING, TRAINING, WHAT, Config, option

#: Schedules of the Trainer that need nothing but their name.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

#: Trackers of transformers' Trainer.
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """The fields that every run has: a search, a share and a transfer add their own.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    model: str = option(
        "demo",
        "Pre-trained encoder: a folder, a Hugging Face name, 'demo' (MiniLM, 6 layers x 12 heads) or 'demo-base' "
        "(MPNet, 12 x 12).",
        WHAT,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a model on the Hugging Face hub.", WHAT, shown="its main branch"
    )
    sparsities: tuple[float, ...] | Literal["paper"] = option(
        (0.1, 0.3, 0.5),
        "Fractions of heads and of FFNs to prune, in (0, 1), comma-separated; 'paper': its eight BERT-base levels.",
        PLAN,
        additive=True,
    )
    seeds: tuple[int, ...] = option(
        (0,), "Number of seeds, or the seeds themselves, comma-separated ('7,').", PLAN, shown="1", additive=True
    )
    min_heads: int = option(1, "Heads that every layer keeps at least.", PLAN, int)
    prune_neurons: bool = option(
        False, "Prune that fraction of the FFNs' single neurons in place of whole FFNs.", PLAN, bool
    )
    recipe: str = option(
        None,
        "default (AdamW), paper (its authors' Adamax) or demo (1 epoch of at most 3000 rows).",
        TRAINING,
        shown="demo for task demo, else default",
    )
    batch_size: int = option(None, "Examples a batch.", TRAINING, int, shown="recipe")
    learning_rate: float = option(None, "Peak step size.", TRAINING, float, shown="recipe")
    warmup_steps: float = option(
        None,
        "Steps over which the step size rises from zero; below 1 a share of all steps.",
        TRAINING,
        float,
        shown="recipe",
    )
    lr_scheduler_type: str = option("linear", f"How the step size falls: {', '.join(SCHEDULES)}.", TRAINING)
    weight_decay: float = option(None, "Of all weights but biases and LayerNorm.", TRAINING, float, shown="recipe")
    max_grad_norm: float = option(
        None, "Largest l2 norm of a step's gradient; 0 for no clipping.", TRAINING, float, shown="recipe"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "fp32, or autocast over fp32 weights: bf16, or fp16 (GPUs only).", TRAINING
    )
    save_models: bool = option(
        False,
        "Keep each trial's trained model in models/ (the size of the checkpoint each); a finished trial "
        "without its model trains again.",
        TRAINING,
        bool,
    )
    executor: Literal["local", "ray"] = option(
        "local",
        "local: one trial after the other in this process; ray: as many at a time as fit on Ray, on this machine or a "
        "cluster. Several commands on one folder share its trials, too.",
        EXECUTION,
    )
    address: str | None = option(
        None, "With ray: address of a cluster, or auto.", EXECUTION, shown="a Ray of its own on this machine"
    )
    cpus_per_trial: int | None = option(
        None, "CPU cores and threads of a trial.", EXECUTION, int, shown="all of torch's threads; with ray 1"
    )
    gpus_per_trial: float | None = option(
        None,
        "With ray: GPUs of a trial, such as 0.25 for four on one.",
        EXECUTION,
        float,
        shown="1 where there are any",
    )
    graphs: bool = option(
        False,
        "On a GPU, launch the encoder's kernels by CUDA graphs. No GPU has run them yet.",
        EXECUTION,
        bool,
    )
    retries: int = option(0, "How often a trial that failed is tried again at once.", EXECUTION, int)
    report_to: tuple[str, ...] = option(
        (),
        f"Where each trial's losses and scores are drawn as curves: {', '.join(TRACKERS)}, comma-separated; each needs "
        "its package. TensorBoard's files are in tensorboard/ of the output folder.",
        TRAINING,
        shown="none",
    )
    granularity: Literal["example", "token", "batch"] = option(
        "example", "Absolute importance per example (the paper's formula), token (its code) or batch.", SCORING
    )
    train_rows: int | None = option(None, "Training rows used.", DATA, int, shown="recipe, else all")
    validation_rows: int | None = option(None, "Validation rows used.", DATA, int, shown="all")
    report_fraction: float = option(
        0.0, "Share of the validation rows, in [0, 1), held out from selection and used to report.", DATA, float
    )

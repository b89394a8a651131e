"""The inputs that all trials of a search share: tokenized rows and pre-trained weights."""

import contextlib
import copy
import dataclasses
import hashlib
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from ticketops.errors import InputError, UnsupportedError, spelled
from ticketops.files import user_path
from ticketops.hub import HubError, fetch_model
from ticketops.models import CountingCollator, check_supported
from ticketops.models.checkpoint import LOCAL, check_folder
from ticketops.models.inputs import positions
from ticketops.models.record import held_ticket, num_neurons
from ticketops.searching.objects import Objects
from ticketops.searching.plan import SearchConfig, Trial, check_names, make_plan
from ticketops.searching.recipes import RECIPES, training
from ticketops.searching.tracking import check_trackers
from ticketops.tasks import DEMO_MODELS, Task, demo_model, load_task, tokenized_splits
from ticketops.text import structures

_LAYER = re.compile(r"\blayers?\.\d+\.")
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True, eq=False)
class Setting:
    """The loaded inputs of a search; a trial is a pure function of it, its seed and its ticket.

    Attributes:
        config: the search.
        task: labels, metrics and raw rows.
        tokenizer: tokenizer of the model.
        model_config: configuration of the model, with the task's labels and the recipe's dropout.
        pretrained: pre-trained weights of the encoder, float32, on the CPU.
        splits: split name -> tokenized rows: "train", "validation" and, if there is one, "report".
        head: initial weights of the task head; empty to draw them from each trial's seed.
        trainer_factory: makes the Trainer of a trial from a Trainer's keyword arguments; None for ticketops' own.
    """

    config: SearchConfig
    task: Task
    tokenizer: transformers.PreTrainedTokenizerBase
    model_config: transformers.PretrainedConfig
    pretrained: dict[str, Tensor]
    splits: dict[str, datasets.Dataset]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    trainer_factory: Callable[..., transformers.Trainer] | None = None

    @classmethod
    def load(cls, config: SearchConfig, at_most: bool = False, objects: Objects | None = None) -> "Setting":
        """Loads and checks everything that a search needs, before anything is trained.

        Args:
            config: configuration of the search.
            at_most: True if `train_rows` and `validation_rows` are upper bounds, as the recipe's `train_rows` always
                are. The effective row counts are written back to the setting's `config`.
            objects: the tasks and metrics that `config` names, and what makes the Trainers.

        Raises:
            InputError: the model or the task cannot be loaded, or they do not fit each other.
            UnsupportedError: ticketops does not serve this architecture.
        """
        bounds = ("train_rows", "validation_rows") if at_most else ()
        if config.train_rows == RECIPES[config.recipe].train_rows:
            bounds = ("train_rows", *bounds)
        check_trackers(config.report_to)
        with quiet():
            _check_dtype(config.dtype)
            objects = objects or Objects()
            if objects.trainer_factory is not None and config.early_stopping_patience is not None:
                raise InputError(
                    f"{spelled('early_stopping_patience')} goes with ticketops' own Trainer: leave it out, and "
                    "give the Trainer of trainer_factory an EarlyStoppingCallback"
                )
            spec, name = objects.task(config.task)
            task = load_task(
                spec,
                name=name,
                text_columns=config.text_columns,
                label_column=config.label_column,
                kind=config.task_kind,
                encoding=config.encoding,
                loss=config.loss,
                metric=objects.metric(config.metric),
                threshold=config.threshold,
                train_rows=config.train_rows,
                validation_rows=config.validation_rows,
                report_fraction=config.report_fraction,
                at_most=bounds,
            )
            if config.granularity == "token" and not task.head:
                raise InputError(
                    f"{spelled('granularity')} token has no meaning for {task.kind}, where the texts of an example go "
                    "through forward passes of their own: use example or batch"
                )
            if config.halving and task.report is None:
                raise InputError(
                    f"{spelled('halving', True)} drops sparsities by the validation rows, and gains on rows that chose "
                    f"are no finding: hold some out to report ({spelled('report_fraction', 0.5)})"
                )
            # Weights of classes are checked by reading them.
            task.loss_function(config.class_weights)
            config = _with_rows(config, task)
            folder = find_model(config.model, config.revision)
            with loading_model(config.model):
                model_config = _read_config(config.model, folder)
            if getattr(model_config, "vocab_size", None) is None:
                raise InputError(
                    f"model {config.model!r} reads no text, and tasks of a search are text: use ticketops.patch, prune "
                    "and shrink in Python"
                )
            with loading_model(config.model):
                task, tokenizer = task.with_model(folder, _load_tokenizer(folder, task))
                # Only what the checkpoint has is pre-trained; a pooler it lacks belongs to each trial's fresh head.
                encoder, report = AutoModel.from_pretrained(
                    folder,
                    config=model_config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    # Reported here, where the error would point to a report that nobody sees.
                    ignore_mismatched_sizes=True,
                    **LOCAL,
                )
            check_supported(encoder)
            task.check_model(model_config)
            # A search cuts tickets from all heads and FFNs of the architecture, and counts what is left of these.
            if not (held := held_ticket(encoder.config)).is_full:
                gone = structures(held.heads_pruned, held.ffns_pruned, held.neurons_pruned)
                raise InputError(
                    f"model {config.model!r} is pruned already ({gone} are gone): give the whole model that it was "
                    "made from"
                )
            # Where its files are missing, transformers makes up a tokenizer to which every word is unknown.
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                raise InputError(f"model {config.model!r} has no vocabulary: save its tokenizer into the same folder")
            if report["mismatched_keys"]:
                raise InputError(
                    f"model {config.model!r} has weights that do not fit its own config.json: fix the folder"
                )
            # Heads of other tasks are no part of the encoder, but layers are.
            if extra := sorted(key for key in report["unexpected_keys"] if _LAYER.search(key)):
                raise InputError(
                    f"model {config.model!r} has weights of layers that its config.json does not name ({extra[0]}, "
                    "...): fix the folder"
                )
            missing = set(report["missing_keys"])
            pretrained = {key: value for key, value in encoder.state_dict().items() if key not in missing}
            if absent := sorted(key for key in missing if "pooler" not in key):
                raise InputError(
                    f"model {config.model!r} lacks {len(absent)} pre-trained weights that its config.json names "
                    f"({', '.join(absent[:3])}, ...): give a complete checkpoint"
                )

            if unreal := [key for key, value in pretrained.items() if not value.isfinite().all()]:
                raise InputError(
                    f"model {config.model!r} has weights that are NaN or infinite ({unreal[0]}): give a whole "
                    "checkpoint"
                )
            if tokenizer.pad_token_id is None:
                raise InputError(
                    f"the tokenizer of model {config.model!r} has no padding token: set its pad_token and save it"
                )

            task.configure(model_config)
            dropout = RECIPES[config.recipe].dropout
            for field in _DROPOUTS if dropout is not None else ():
                if hasattr(model_config, field):
                    setattr(model_config, field, dropout)
            longest = positions(encoder)
            if config.max_length > longest:
                raise InputError(
                    f"{spelled('max_length')} {config.max_length} exceeds the {longest} positions of {config.model!r}: "
                    f"give at most {longest}"
                )
            splits = tokenized_splits(task, tokenizer, config.max_length)
            known = encoder.get_input_embeddings().num_embeddings
            largest = max(pc.max(_flat(each.data.column("input_ids"))).as_py() for each in splits.values())
            if largest >= known:
                raise InputError(
                    f"the tokenizer of model {config.model!r} makes the token {largest}, and the model has {known}: "
                    "save its own tokenizer into the folder"
                )
            # It remembers the last call's truncation, and would be saved with it.
            tokenizer("")
        return cls(config, task, tokenizer, model_config, pretrained, splits, trainer_factory=objects.trainer_factory)

    @property
    def num_layers(self) -> int:
        """Encoder layers of the model."""
        return int(self.model_config.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        """Attention heads a layer."""
        return int(self.model_config.num_attention_heads)

    @property
    def num_neurons(self) -> int:
        """Neurons of an FFN."""
        return num_neurons(self.model_config)

    def require_head(self, verb: str) -> None:
        """Checks that the task has a head of its own on the encoder.

        Args:
            verb: what needs it, "share" or "transfer".

        Raises:
            UnsupportedError: the task trains the encoder alone.
        """
        if not self.task.head:
            raise UnsupportedError(
                f"{verb} does not take {self.task.kind}, as of task {self.task.name}: use ticketops search for it"
            )

    @property
    def loss_function(self) -> Any:
        """The loss of training and of importance, as `Task.loss_function` returns it."""
        return self.task.loss_function(self.config.class_weights)

    @property
    def collator(self) -> CountingCollator:
        """What pads inputs to a batch, and counts its tokens before they travel to a GPU."""
        return CountingCollator(self.task.collator(self.tokenizer))

    def plan(self) -> list[Trial]:
        """Lists the trials of the search in the order in which they run.

        Raises:
            InputError: a level prunes nothing, or more than the model has, or is too close to another.
        """
        plan = make_plan(self.config, self.num_layers, self.num_heads, self.num_neurons)
        check_names(plan)
        return plan

    def identity(self) -> dict[str, Any]:
        """What the results depend on: the configuration, the rows and the pre-trained weights."""
        digest = hashlib.sha256()
        for key, value in sorted(self.pretrained.items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().data)
        return {
            "config": self.config.decided(),
            "task_fingerprint": self.task.fingerprint,
            "model_fingerprint": digest.hexdigest(),
            "layers": self.num_layers,
            "heads": self.num_heads,
            "neurons": self.num_neurons,
            "training": training(self.config.recipe),
            "trainer": name_of(self.trainer_factory) if self.trainer_factory else None,
        }

    def fresh_model(self, seed: int) -> PreTrainedModel:
        """Makes a model as every trial starts: pre-trained encoder, task head drawn from the seed.

        Args:
            seed: seed of the task head; it also determines the state in which torch's global generator is left.

        Returns:
            The model on the CPU, in training mode.
        """
        transformers.set_seed(seed)
        # The Trainer writes into a model's configuration, and a trial must not depend on those before it.
        model = self.task.make_model(copy.deepcopy(self.model_config))
        # Weights that only the bare model has, such as an unused pooler, stay behind.
        model.base_model.load_state_dict(self.pretrained, strict=False)
        model.load_state_dict(self.head, strict=False)
        return model.train()


def precision(dtype: str) -> dict[str, Any]:
    """A dtype as arguments of a Trainer, on the device that it trains on."""
    # Without `use_cpu` the Trainer refuses bfloat16 where there is no accelerator.
    return {"bf16": dtype == "bf16", "fp16": dtype == "fp16", "use_cpu": not torch.accelerator.is_available()}


def _check_dtype(dtype: str) -> None:
    """Asks the Trainer whether this machine trains in a dtype."""
    if dtype == "fp32":
        return
    try:
        arguments = TrainingArguments(tempfile.gettempdir(), report_to="none", **precision(dtype))
        trainer = Trainer(torch.nn.Linear(1, 1), arguments)
        # Where there is no accelerator, float16 is left aside without a word.
        if dtype == "fp16" and not trainer.accelerator.native_amp:
            raise ValueError("the Trainer takes it on accelerators alone")
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{spelled('dtype', dtype)} does not run here ({reason}): choose another one") from error


def _load_tokenizer(folder: Path, task: Task) -> transformers.PreTrainedTokenizerBase:
    tokenizer: transformers.PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if task.gives_words and tokenizer.is_fast:
        # Where spaces are part of tokens, words that are given one by one need one in front, as inside a text.
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        if splitter is not None:
            state = splitter.__getstate__().replace(b'"add_prefix_space":false', b'"add_prefix_space":true')
            splitter.__setstate__(state)
            tokenizer.backend_tokenizer.pre_tokenizer = splitter
    return tokenizer


def _flat(column: Any) -> Any:
    """The numbers in a column of lists, or of lists of lists."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return column


def name_of(function: Any) -> str:
    """The module and the name of a function or class, or those of an object's class.

    Args:
        function: anything that can be called.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _with_rows(config: SearchConfig, task: Task) -> SearchConfig:
    found: dict[str, Any] = {
        "train_rows": len(task.train),
        "validation_rows": len(task.validation) + (len(task.report or ()) if config.report_fraction else 0),
    }
    return dataclasses.replace(config, **{name: n for name, n in found.items() if getattr(config, name) is not None})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars, log messages and warnings of the underlying libraries."""
    loggers = [
        logging.getLogger(name)
        for name in ("transformers", "datasets", "huggingface_hub", "accelerate", "torch", "sentence_transformers")
    ]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars[0]:
            transformers.utils.logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()


def find_model(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Finds a search's model, downloads it where it is on the hub and not in the cache, and checks its folder.

    Args:
        name: "demo" or "demo-base", a local folder, or a repository of the Hugging Face hub.
        revision: branch, tag or commit of the repository; by default its main branch.
        weights: True to download tokenizer and weights too, rather than the configuration alone.

    Returns:
        The folder for `from_pretrained`.

    Raises:
        InputError: there is no such model, or its folder holds what would run code or never end.
    """
    remedy = f"give a local folder made by save_pretrained, or {spelled('model', 'demo')}"
    folder = demo_model(name) if name in DEMO_MODELS else user_path(name, spelled("model"))
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"model {name!r} is not a folder: {remedy}")
        try:
            folder = fetch_model(name, revision, weights)
        except HubError as error:
            raise InputError(f"model {name!r} is no folder here, and {error}; or {remedy}") from error
    elif revision is not None:
        raise InputError(
            f"{spelled('revision')} {revision!r} is of a model on the Hugging Face hub, and {name!r} is a folder"
        )
    elif not (folder / "config.json").is_file():
        raise InputError(f"model folder {name} has no config.json: give a folder made by save_pretrained")
    with loading_model(name):
        check_folder(folder)
    return folder


def load_config(name: str, revision: str | None = None) -> transformers.PretrainedConfig:
    """Reads a model's configuration, and nothing of its weights; code that comes with a model is never run.

    Args:
        name: "demo" or "demo-base", a local folder, or a repository of the Hugging Face hub.
        revision: of the repository: a branch, tag or commit; by default its main branch.

    Raises:
        InputError: there is no such model, or its configuration is damaged.
    """
    folder = find_model(name, revision, weights=False)
    with loading_model(name):
        return _read_config(name, folder)


def _read_config(name: str, folder: Path) -> transformers.PretrainedConfig:
    config: transformers.PretrainedConfig = AutoConfig.from_pretrained(folder, **LOCAL)
    # The cache's folder is another on every machine.
    config._name_or_path = name
    return config


@contextlib.contextmanager
def loading_model(name: str) -> Iterator[None]:
    """Turns whatever a model's folder makes transformers raise into an InputError of one line.

    Args:
        name: name or folder of the model, for the error message.
    """
    try:
        yield
    except (InputError, UnsupportedError) as error:
        raise type(error)(f"model {name!r} cannot be loaded: {error}") from error
    # A damaged checkpoint surfaces as any of a dozen exception types of four libraries.
    except Exception as error:
        # A KeyError's text is the key alone.
        text = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
        reason = (text or type(error).__name__).splitlines()[0][:300]
        raise InputError(
            f"model {name!r} cannot be loaded ({reason}): give a folder made by save_pretrained"
        ) from error

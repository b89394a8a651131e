"""Sentence similarity: makes vectors of texts whose cosines say how alike they are, as sentence-transformers does."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ticketops.errors import InputError, UnsupportedError, spelled
from ticketops.kinds import SCORED_LOSSES, UNSCORED_LOSSES
from ticketops.optional import sentence_transformers
from ticketops.tasks.metrics import METRICS
from ticketops.tasks.sequences import SequenceTask
from ticketops.tasks.task import Task

#: Accepted names of the columns of texts that are alike and, third, of one that is not.
UNSCORED_COLUMNS = (
    (
        ("anchor", "positive", "negative"),
        ("anchor", "positive"),
        ("query", "positive", "negative"),
        ("query", "positive"),
        ("question", "answer"),
        ("query", "answer"),
    ),
)
# Texts whose cosines with all others are computed at once.
_CHUNK = 1024


@dataclass
class EmbedderOutput(ModelOutput):
    """Result of an `EmbedderModel`.

    Attributes:
        loss: the loss of the batch; None if it was not asked for.
        embeddings: vectors, float [rows, texts, dimension].
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class EmbedderModel(PreTrainedModel):
    """A SentenceTransformer with a loss, as a Trainer takes it. Each text of a row has a forward pass of its own.

    Args:
        embedder: the SentenceTransformer.
        loss: name of its loss.
    """

    # The encoder inside has checked what its configuration says of attention.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, embedder: Any, loss: str) -> None:
        super().__init__(embedder[0].model.config)
        from sentence_transformers.sentence_transformer import losses

        self.embedder = embedder
        # In a list, since the loss has the embedder as its submodule, whose parameters would then have two names.
        self._losses = [getattr(losses, loss)(embedder)]

    @property
    def base_model(self) -> Any:
        """The transformers model inside."""
        return self.embedder[0].model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        scores: Tensor | None = None,
        return_loss: bool = True,
    ) -> EmbedderOutput:
        """Embeds rows of texts.

        Args:
            input_ids: int64 [rows, texts, tokens], or [rows, tokens] for one text a row, which has no loss.
            attention_mask: 1 for tokens and 0 for padding, in the same shape.
            token_type_ids: int64 in the same shape, if the encoder takes them.
            scores: float [rows], for losses that compare the cosine of two texts with a score.
            return_loss: True to compute the loss. The Trainer reads the default.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: value for name, value in inputs.items() if value is not None}
        if input_ids.ndim == 2:
            given, return_loss = {name: value[:, None] for name, value in given.items()}, False
        columns = [
            self.embedder({name: value[:, text] for name, value in given.items()})["sentence_embedding"]
            for text in range(given["input_ids"].shape[1])
        ]
        loss = self._losses[0].compute_loss_from_embeddings(columns, scores) if return_loss else None
        return EmbedderOutput(loss, torch.stack(columns, 1))


@dataclass(frozen=True, eq=False)
class EmbedderTask(Task):
    """Sentence similarity: the rows have two texts and a score in `label`, or else two texts that are alike and, in a
    third column, one that is not.

    Of scored pairs the correlation of cosine and score is measured. Without scores it is the share of first texts whose
    cosine with their own second text is higher: than with the third one, or than with every other row's second text.

    Attributes:
        loss: name of the loss of sentence-transformers.
        scale: lowest and highest score, which the loss takes as 0 and 1.
        embedder: SentenceTransformer of the model's folder without its encoder; None before `with_model`.
    """

    loss: str = ""
    scale: tuple[float, float] = (0.0, 1.0)
    embedder: Any = None

    head: ClassVar[str] = ""

    @property
    def num_labels(self) -> int:
        """0: there is no head."""
        return 0

    @property
    def segments(self) -> int:
        """1: each text is an input of its own."""
        return 1

    @property
    def has_scores(self) -> bool:
        """True for pairs with a score."""
        return self.loss in SCORED_LOSSES

    def configure(self, config: PretrainedConfig) -> None:
        """Changes nothing."""

    def check_model(self, config: PretrainedConfig) -> None:
        """Accepts every architecture."""

    def with_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Self, PreTrainedTokenizerBase]:
        """Takes pooling and other modules from the folder of a SentenceTransformer; of any other model the mean."""
        embedder = sentence_transformers().SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        first = embedder[0]
        if not isinstance(getattr(first, "model", None), PreTrainedModel):
            raise UnsupportedError(
                f"the first module of this SentenceTransformer is a {type(first).__name__}: give one that begins with "
                "a Transformer"
            )
        if not all(getattr(module, "include_prompt", True) for module in embedder.modules()):
            raise UnsupportedError(
                "this SentenceTransformer leaves its prompt out of the pooling, which a search does not: set "
                "include_prompt to true in its 1_Pooling/config.json"
            )
        own = embedder.tokenizer
        first.model = None
        return dataclasses.replace(self, embedder=embedder), own

    def make_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """Makes the model around an encoder with random float32 weights."""
        embedder = copy.deepcopy(self.embedder)
        embedder[0].model = AutoModel.from_config(config, dtype="float32")
        return EmbedderModel(embedder, self.loss)

    def product(self, model: PreTrainedModel) -> Any:
        """The SentenceTransformer, without its loss."""
        return model.embedder

    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Tokenizes each text by itself: every argument is a list of lists, one for each text column. `scores` are
        float32 on the loss's scale."""
        prompt = self.embedder.prompts.get(self.embedder.default_prompt_name, "")
        texts = [prompt + text for column in self.columns for text in batch[column]]
        tokens, rows = tokenizer(texts, truncation=True, max_length=max_length), len(indices)
        grouped = {name: [values[row::rows] for row in range(rows)] for name, values in tokens.items()}
        if not self.has_scores:
            return grouped
        low, high = self.scale
        return {**grouped, "scores": ((np.asarray(batch["label"]) - low) / (high - low)).astype(np.float32)}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads all texts of a batch to one length."""
        return _Collator(tokenizer)

    def logits(self, predictions: Any) -> np.ndarray:
        """The cosines of each row's first text.

        Args:
            predictions: embeddings [rows, texts, dimension].

        Returns:
            Floats [rows, 1] with the second text; without scores [rows, 2], also the highest with what is not alike.
        """
        vectors = np.asarray(predictions, np.float64)
        units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        first, second, *third = units.transpose(1, 0, 2)
        own = (first * second).sum(-1)
        if self.has_scores:
            return own[:, None]
        other = (first * third[0]).sum(-1) if third else _highest_of_others(first, second)
        return np.stack([own, other], 1)

    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores cosines [rows, 1 or 2]."""
        self.check_finite(logits)
        if self.has_scores:
            scores = np.asarray(rows["label"][:])
            return {metric: METRICS[metric](scores, logits[:, 0]) for metric in self.metrics}
        return {self.metric: float((logits[:, 0] > logits[:, 1]).mean())}

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray:
        """Score and cosine of each pair, [rows, 2]; or 1 for a row whose own texts are nearest, [rows, 1]."""
        if self.has_scores:
            return np.stack([np.asarray(rows["label"][:]), logits[:, 0]], axis=1)
        return (logits[:, :1] > logits[:, 1:2]).astype(np.int64)

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """What guessing reaches: 0 for correlations, a half of the triplets, one of all rows' second texts."""
        if self.has_scores:
            return 0.0
        return 0.5 if len(self.columns) == 3 else 1 / len(self.validation if split is None else split)


@dataclass(frozen=True)
class _Collator:
    """Pads rows of several texts, with a score or without."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name != "scores"]
        texts = [
            dict(zip(names, values, strict=True))
            for row in rows
            for values in zip(*(row[name] for name in names), strict=True)
        ]
        padded = self.tokenizer.pad(texts, return_tensors="pt")
        batch = {name: value.unflatten(0, (len(rows), -1)) for name, value in padded.items()}
        if "scores" in rows[0]:
            batch["scores"] = torch.tensor([row["scores"] for row in rows])
        return batch


def _highest_of_others(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each first text the highest cosine with another row's second text, [rows]; -1 if there is no other row."""
    found = []
    for start in range(0, len(first), _CHUNK):
        cosines = first[start : start + _CHUNK] @ second.T
        np.fill_diagonal(cosines[:, start:], -1.0)
        found.append(cosines.max(axis=1))
    return np.concatenate(found)


def check_texts(columns: Sequence[str], scored: bool) -> None:
    """Checks the text columns of rows.

    Args:
        columns: their names.
        scored: True if the rows have a score.

    Raises:
        InputError: there are too few or too many of them.
    """
    if len(columns) not in ((2,) if scored else (2, 3)) or len({*columns}) < len(columns):
        raise InputError(
            f"text columns {', '.join(columns)} for sentence similarity: give {spelled('text_columns')} the two texts "
            "of a pair; or without a label column also three, an anchor, a positive and a negative text"
        )


def choose_loss(loss: str | None, columns: Sequence[str], scored: bool) -> str:
    """The loss for rows: the one that the user named, or else the first one for such rows.

    Args:
        loss: its name; None for the first one.
        columns: names of the text columns.
        scored: True if the rows have a score.

    Raises:
        InputError: it is for other rows.
    """
    choices = SCORED_LOSSES if scored else UNSCORED_LOSSES[: len(columns) - 1]
    if loss not in (None, *choices):
        rows = "pairs with a score" if scored else "triplets" if len(columns) == 3 else "pairs without a score"
        raise InputError(f"{spelled('loss')} {loss} does not take {rows}: choose from {', '.join(choices)}")
    return loss or choices[0]


def scored_pairs(task: SequenceTask, loss: str | None) -> EmbedderTask:
    """Makes the task of pairs with a score from the regression of these pairs.

    Args:
        task: the regression, of all its rows.
        loss: name of the loss; None for the default.

    Raises:
        InputError: the loss is for other rows.
    """
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}
    chosen = choose_loss(loss, task.columns, scored=True)
    scores, scale, remarks = np.asarray(task.train["label"][:]), (0.0, 1.0), (*task.remarks, f"loss {chosen}")
    # Losses compare scores with cosines.
    if np.abs(scores).max() > 1:
        scale = float(scores.min()), float(scores.max())
        remarks += (f"scores from {scale[0]:g} to {scale[1]:g} are 0 to 1 for the loss",)
    fields |= {"kind": "sentence-similarity", "metrics": ("spearman", "pearson"), "remarks": remarks}
    return EmbedderTask(**fields, loss=chosen, scale=scale)

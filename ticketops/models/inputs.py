"""Inputs of models, text or images: shapes, examples and random batches."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ticketops.errors import InputError

#: Sentences on which exports of text models are verified.
SENTENCES = (
    "It was the best of times, it was the worst of times.",
    "A slow, tender film that trusts its actors and never once raises its voice.",
    "Dull.",
    "The council will meet on Tuesday at half past four to decide whether the bridge, closed since the flood of 1997, "
    "should be repaired, replaced or simply left to the herons.",
    "I would not recommend it to anybody, least of all to those who loved the book.",
)


class Inputs(Protocol):
    """Kind of a model's inputs.

    Attributes:
        noun: name of the inputs in the plural, e.g. "sentences".
        ragged: True if rows have different lengths, with padding and an attention mask; False if all have one size.
    """

    noun: str
    ragged: bool

    def shape(self, config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
        """Returns rows, tokens per row and device of a forward pass's arguments; None if they contain no input."""

    def sample(self, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
        """Returns a few rows of real input, encoded with the tokenizer or image processor if there is one."""

    def length(self, config: Any) -> int:
        """Returns the number of tokens per row for which costs are computed by default."""

    def lengths(self, base: Any, wanted: Iterable[int]) -> list[int]:
        """Returns those of the wanted numbers of tokens per row that the model supports; its fixed number for
        images."""

    def draw(self, model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
        """Returns random input without padding, for measurements."""


class Text:
    """Token ids."""

    noun, ragged = "sentences", True

    def shape(self, config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
        """See Inputs."""
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        return None if tokens is None else (tokens.shape[0], tokens.shape[1], tokens.device)

    def sample(self, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
        """Returns SENTENCES as padded token ids; without a tokenizer, random ids of similar lengths."""
        config = model.config
        longest = min(128, positions(model.base_model))
        if processor is not None:
            options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
            try:
                batch = dict(processor(list(SENTENCES), **options))
            # Such as one without a padding token, or with a length limit that is no number.
            except (ValueError, TypeError, OverflowError) as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"the tokenizer makes no batch ({reason}): repair it, or remove its files") from error
        else:
            lengths = torch.tensor([min(longest, 2 + len(sentence.split())) for sentence in SENTENCES])
            generator = torch.Generator().manual_seed(0)
            shape = (len(lengths), int(lengths.max()))
            ids = torch.randint(min(5, config.vocab_size - 1), config.vocab_size, shape, generator=generator)
            batch = {"input_ids": ids, "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long()}
            if getattr(config, "type_vocab_size", 0) > 1:
                batch["token_type_ids"] = torch.zeros_like(ids)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return _as_choices(model, {name: value for name, value in batch.items() if name in names})

    def length(self, config: Any) -> int:
        """See Inputs."""
        return 128

    def lengths(self, base: Any, wanted: Iterable[int]) -> list[int]:
        """See Inputs."""
        return [length for length in wanted if length <= positions(base)]

    def draw(self, model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
        """See Inputs."""
        vocabulary = model.config.vocab_size
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, (rows, length), device=model.device)
        return _as_choices(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


TEXT = Text()


def _as_choices(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows as the choices of one example, for a multiple-choice model; else as they are."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: value[None] for name, value in batch.items()}
    return batch


@dataclass(frozen=True)
class Images:
    """Images of one size, cut into patches.

    Attributes:
        extra: number of tokens before the patches.
    """

    extra: int

    noun = "photographs"
    ragged = False

    def shape(self, config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
        """See Inputs."""
        pixels = arguments.get("pixel_values")
        if pixels is None:
            return None
        return len(pixels), self._tokens(config, pixels.shape[2:]), pixels.device

    def sample(self, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
        """Returns the two photographs of scikit-learn, whole and in halves."""
        from sklearn.datasets import load_sample_images

        config = model.config
        photographs = [
            part for image in load_sample_images().images for part in (image, image[:, :320], image[:, 320:])
        ]
        if processor is not None:
            return {"pixel_values": processor(images=photographs, return_tensors="pt")["pixel_values"]}
        options: dict[str, Any] = {"size": _pair(config.image_size), "mode": "bilinear", "antialias": True}
        pixels = [torch.tensor(part).permute(2, 0, 1)[None] / 127.5 - 1 for part in photographs]
        rows = torch.cat([nn.functional.interpolate(each, **options) for each in pixels])
        if config.num_channels != 3:
            rows = rows.mean(1, keepdim=True).expand(-1, config.num_channels, -1, -1).contiguous()
        return {"pixel_values": rows}

    def length(self, config: Any) -> int:
        """See Inputs."""
        return self._tokens(config, _pair(config.image_size))

    def lengths(self, base: Any, wanted: Iterable[int]) -> list[int]:
        """See Inputs."""
        return [self.length(base.config)]

    def draw(self, model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
        """See Inputs."""
        shape = (rows, model.config.num_channels, *_pair(model.config.image_size))
        return {"pixel_values": torch.randn(shape, device=model.device)}

    def _tokens(self, config: Any, size: Iterable[int]) -> int:
        height, width = (pixels // patch for pixels, patch in zip(size, _pair(config.patch_size), strict=True))
        return self.extra + height * width


def positions(base: Any) -> int:
    """Returns the maximum number of tokens per row of text.

    Args:
        base: bare model for text.
    """
    table: nn.Embedding | None = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    if table is None:
        return int(base.config.max_position_embeddings)
    # In RoBERTa-like models, positions start after the padding id.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _pair(size: Any) -> tuple[int, int]:
    """Converts an image size, one number or two, to (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

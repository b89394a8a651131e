"""What a model reads, text or images: the few places that must know ask these."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: What every export of a model for text is verified on.
SENTENCES = (
    "It was the best of times, it was the worst of times.",
    "A slow, tender film that trusts its actors and never once raises its voice.",
    "Dull.",
    "The council will meet on Tuesday at half past four to decide whether the bridge, closed since the flood of 1997, "
    "should be repaired, replaced or simply left to the herons.",
    "I would not recommend it to anybody, least of all to those who loved the book.",
)


class Inputs(Protocol):
    """What ticketops must know of a model's inputs.

    Attributes:
        noun: what an export is verified on, in the plural.
        ragged: whether rows may be of any length, padded and with an attention mask; all are of one size if not.
    """

    noun: str
    ragged: bool

    def shape(self, config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
        """Rows, tokens a row and device of a forward pass's arguments; None where they hold no input."""

    def sample(self, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
        """A few rows of real input, by the model's tokenizer or image processor, or without either."""

    def length(self, config: Any) -> int:
        """Tokens of a row that costs are counted for."""

    def lengths(self, base: Any, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted numbers of tokens a row that the model can have; its only one where it has no choice."""

    def draw(self, config: Any, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
        """Random input without padding, to measure with."""


class Text:
    """Token ids."""

    noun, ragged = "sentences", True

    def shape(self, config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
        """See Inputs."""
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        return None if tokens is None else (tokens.shape[0], tokens.shape[1], tokens.device)

    def sample(self, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
        """Sentences as token ids with padding; drawn ids of the sentences' lengths without a tokenizer."""
        config = model.config
        longest = min(128, positions(model.base_model))
        if processor is not None:
            options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
            batch = dict(processor(list(SENTENCES), **options))
        else:
            lengths = torch.tensor([min(longest, 2 + len(sentence.split())) for sentence in SENTENCES])
            generator = torch.Generator().manual_seed(0)
            shape = (len(lengths), int(lengths.max()))
            ids = torch.randint(min(5, config.vocab_size - 1), config.vocab_size, shape, generator=generator)
            batch = {"input_ids": ids, "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long()}
            if getattr(config, "type_vocab_size", 0) > 1:
                batch["token_type_ids"] = torch.zeros_like(ids)
        if type(model).__name__.endswith("ForMultipleChoice"):
            batch = {name: value[None] for name, value in batch.items()}
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: value for name, value in batch.items() if name in names}

    def length(self, config: Any) -> int:
        """See Inputs."""
        return 128

    def lengths(self, base: Any, wanted: Iterable[int]) -> list[int]:
        """See Inputs."""
        return [length for length in wanted if length <= positions(base)]

    def draw(self, config: Any, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
        """See Inputs."""
        ids = torch.randint(min(5, config.vocab_size - 1), config.vocab_size, (rows, length), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TEXT = Text()


@dataclass(frozen=True)
class Images:
    """Images of one size, cut into patches.

    Attributes:
        extra: tokens in front of the patches.
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
        """The two photographs that come with scikit-learn, whole and in halves."""
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

    def draw(self, config: Any, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
        """See Inputs."""
        return {"pixel_values": torch.randn(rows, config.num_channels, *_pair(config.image_size), device=device)}

    def _tokens(self, config: Any, size: Iterable[int]) -> int:
        height, width = (pixels // patch for pixels, patch in zip(size, _pair(config.patch_size), strict=True))
        return self.extra + height * width


def positions(base: Any) -> int:
    """How many tokens a row of text may have.

    Args:
        base: a bare model for text.
    """
    table: nn.Embedding | None = getattr(base.embeddings, "position_embeddings", None)
    if table is None:
        return int(base.config.max_position_embeddings)
    # RoBERTa and its kin count positions from behind the padding id.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _pair(size: Any) -> tuple[int, int]:
    """A size of one number, or of two, as two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

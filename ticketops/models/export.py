"""Three ways out of ticketops: compact and dense transformers folders, and ONNX; each verified before it is there."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ticketops.errors import InputError, TicketopsError
from ticketops.files import new_folder
from ticketops.models.patch import PatchHandle, check_supported, find_adapter
from ticketops.models.record import held_ticket, num_neurons, write_record
from ticketops.models.shrink import cut_indices, shrink
from ticketops.tickets import Ticket

Format = Literal["compact", "dense", "onnx"]

#: What every export is verified on where the caller has no text of its own.
SENTENCES = (
    "It was the best of times, it was the worst of times.",
    "A slow, tender film that trusts its actors and never once raises its voice.",
    "Dull.",
    "The council will meet on Tuesday at half past four to decide whether the bridge, closed since the flood of 1997, "
    "should be repaired, replaced or simply left to the herons.",
    "I would not recommend it to anybody, least of all to those who loved the book.",
)
_MAX_JSON_BYTES = 2**20
# No size of any encoder comes near; a configuration with more would have a loader allocate it.
_MAX_SIZE = 10**7
_NOTE = "ticketops.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def export(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    format: Format = "compact",
    *,
    ticket: Ticket | None = None,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model that a ticket leaves, and reads it back to see that it computes the same, before it is there.

    `compact` has true shapes: `AutoModelFor*.from_pretrained` loads it after `import ticketops`. `dense` has full
    shapes with zeros where something was pruned: plain transformers loads it, at the full model's cost. `onnx` has true
    shapes and runs in onnxruntime. The ticket, a `ticketops.json` and a model card go along. The model is not changed.

    Args:
        model: stock, patched or shrunk.
        folder: to be made; must not exist, or be empty.
        format: `compact`, `dense` or `onnx`.
        ticket: what to keep; by default what is applied to a patched model.
        tokenizer: saved along and used on the verification's sentences; without it token ids are drawn.
        run: where the model comes from, as JSON values, for `ticketops.json` and the card.

    Returns:
        The folder.

    Raises:
        InputError: a ticket of another shape, an unknown format.
        UnsupportedError: a model that ticketops does not serve.
        StoreError: the folder is not empty, or cannot be written.
        TicketopsError: what was written does not compute what the model does; nothing is left behind.
    """
    folder = Path(folder)
    if format not in get_args(Format):
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(get_args(Format))}")
    small, left, batch, want = _small(model, ticket, tokenizer)
    with new_folder(folder) as temporary:
        if format == "onnx":
            from ticketops.models.onnx import run_onnx, save_onnx

            save_onnx(small, batch, temporary)
            got, tolerance = run_onnx(temporary, batch), 1e-4
        else:
            written = small if format == "compact" else expand(small)
            written.save_pretrained(temporary)
            del written
            got, tolerance = _outputs(load(temporary), batch), _tolerance(model.dtype)
        difference = _compare(want, got, batch["attention_mask"], tolerance)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        left.save(temporary / "ticket.safetensors")
        sums = {path.name: _sha256(path) for path in sorted(temporary.glob("model*"))}
        note = {"format": format, "largest_difference": difference, "run": dict(run or {}), "sha256": sums}
        (temporary / _NOTE).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n")
        whole = sum(p.numel() for p in expand(small).parameters())
        weights = (sum(p.numel() for p in small.parameters()), whole)
        (temporary / "README.md").write_text(_card(small, left, format, weights, difference, run or {}))
    return folder


def load(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Reads a model that `export` (compact or dense) or `save_pretrained` wrote; safetensors and JSON only.

    A checkpoint of transformers 4.x with `pruned_heads` loads too, and is written anew by `export`.

    Every size and name is checked against the files' headers before anything is allocated, and nothing is executed.

    Args:
        folder: with config.json and model.safetensors or its shards.

    Returns:
        The model with the task head that it was saved with, on the CPU, in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        UnsupportedError: a model that ticketops does not serve.
    """
    folder = Path(folder)
    try:
        return _load(folder)
    except TicketopsError as error:
        raise type(error)(f"cannot load the model {folder}: {error}") from error
    # A damaged checkpoint surfaces as any of a dozen exception types of four libraries.
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise InputError(f"cannot load the model {folder}: it is damaged ({reason}); export it again") from error


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the full-shape twin of a shrunk model, with zeros where something was removed: the same outputs anywhere.

    Args:
        model: shrunk, stock classes; left as it is.

    Returns:
        A new model without a record, of the same class and dtype, on the CPU, in evaluation mode.
    """
    held = held_ticket(model.base_model.config)
    full = Ticket.full(held.num_layers, held.num_heads)
    config = copy.deepcopy(model.config)
    write_record(config, full)
    twin = type(model)._from_config(config, dtype=model.dtype)
    state, small = twin.state_dict(), model.state_dict()
    places = cut_indices(twin, full, held)
    with torch.no_grad():
        for name, value in state.items():
            if name not in places:
                value.copy_(small[name])
                continue
            dim, index = places[name]
            value.zero_()
            if name in small:
                value.index_copy_(dim, index, small[name].to(value.device))
    return twin.eval()


def _small(
    model: PreTrainedModel, ticket: Ticket | None, tokenizer: Any
) -> tuple[PreTrainedModel, Ticket, dict[str, Tensor], dict[str, Tensor]]:
    """A shrunk copy, what it keeps, a batch of text, and what the model itself answers under the ticket."""
    adapter, base = find_adapter(model)
    check_supported(model)
    handle: PatchHandle | None = getattr(adapter.encoder(base), "_ticketops", None)
    held = held_ticket(base.config)
    applied = handle.ticket if handle is not None else None
    ticket = ticket or applied or held
    ticket.check(held.num_layers, held.num_heads, num_neurons(base.config))
    left = (held & ticket).described(ticket.metadata)
    batch, training = _batch(model, tokenizer), model.training
    own = handle or PatchHandle(model)
    try:
        own.apply(left)
        want = _outputs(model.eval(), batch)
    finally:
        model.train(training)
        own.apply(applied)
        if handle is None:
            own.revert()
    small = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    small.load_state_dict(model.state_dict())
    return shrink(small.eval(), left), left, batch, want


def _batch(model: PreTrainedModel, tokenizer: Any) -> dict[str, Tensor]:
    """Sentences as token ids with padding, or drawn ids of the sentences' lengths."""
    config = model.config
    # RoBERTa's positions start behind the padding id.
    longest = min(128, config.max_position_embeddings - (config.pad_token_id or 0) - 1)
    if tokenizer is not None:
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        batch = dict(tokenizer(list(SENTENCES), **options))
    else:
        lengths = torch.tensor([min(longest, 2 + len(sentence.split())) for sentence in SENTENCES])
        width = int(lengths.max())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            min(5, config.vocab_size - 1), config.vocab_size, (len(lengths), width), generator=generator
        )
        batch = {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
        if getattr(config, "type_vocab_size", 0) > 1:
            batch["token_type_ids"] = torch.zeros_like(ids)
    if type(model).__name__.endswith("ForMultipleChoice"):
        batch = {name: value[None] for name, value in batch.items()}
    return {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = model(**{name: value.to(model.device) for name, value in batch.items()})
    return {name: value.float().cpu() for name, value in found.items() if isinstance(value, Tensor)}


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-5, 16 * torch.finfo(dtype).eps) if dtype != torch.float32 else 1e-5


def _compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor], mask: Tensor, tolerance: float) -> float:
    """The largest difference, relative to the largest output where that is above 1; more than `tolerance` is an
    error."""
    largest = 0.0
    for name, expected in want.items():
        found = got.get(name)
        if found is None or found.shape != expected.shape:
            raise TicketopsError(f"the export was not written: {name} is missing when it is read back; report this")
        if expected.shape[: mask.ndim] == mask.shape:
            # What stands at padding means nothing, and the ops do not compute it.
            found, expected = found[mask.bool()], expected[mask.bool()]
        difference = float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
        if not difference <= tolerance:
            raise TicketopsError(
                f"the export was not written: {name} differs by {difference:.1e} when it is read back, more than "
                f"{tolerance:.0e}; try float32 weights, and report this if it persists"
            )
        largest = max(largest, difference)
    return largest


def _load(folder: Path) -> PreTrainedModel:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("no config.json; give a folder made by ticketops export or save_pretrained")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"config.json is larger than {_MAX_JSON_BYTES} bytes; check the path")
    content = json.loads(path.read_text(encoding="utf-8"), parse_int=_size)
    names = content.get("architectures") if isinstance(content, dict) else None
    kind: Any = getattr(transformers, names[0], None) if isinstance(names, list) and len(names) == 1 else None
    is_model: bool = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not is_model:
        raise InputError(f"config.json names no model class of transformers ({names!r:.60}); export it again")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, kind.config_class or type(None)):
        raise InputError(f"config.json is a {type(config).__name__}, which is none of {kind.__name__}")
    held_ticket(config)
    with torch.device("meta"), no_init_weights():
        skeleton = kind(config)
    find_adapter(skeleton)
    _check_weights(folder, skeleton)
    model, report = kind.from_pretrained(
        folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[problem]:
            raise InputError(f"{problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[0]}; export it again")
    check_supported(model)
    return model.eval()


def _size(digits: str) -> int:
    if len(digits) > 10 or abs(int(digits)) > _MAX_SIZE:
        raise InputError(f"config.json has the size {digits:.20}, larger than any model's; check the path")
    return int(digits)


def _check_weights(folder: Path, skeleton: PreTrainedModel) -> None:
    """Compares the files' headers with the shapes that the configuration makes, before anything is allocated."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (folder / files[0]).exists():
        if index.stat().st_size > 64 * _MAX_JSON_BYTES:
            raise InputError(f"{index.name} is too large; check the path")
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if bad := [name for name in files if not _SHARD.fullmatch(name)]:
            raise InputError(f"{index.name} names the file {bad[0]!r:.60}, no shard in this folder; export it again")
    shapes = {name: list(value.shape) for name, value in skeleton.state_dict().items()}
    found = set()
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"no {name}; only safetensors weights are read")
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                # A buffer that transformers below 4.31 saved and no later one reads.
                if key.endswith("embeddings.position_ids"):
                    continue
                part = file.get_slice(key)
                if shapes.get(key) != part.get_shape() or part.get_dtype() not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"{key!r:.100} is {part.get_dtype()} {part.get_shape()} in {name}, which its configuration "
                        "does not make; export it again"
                    )
                found.add(key)
    tied = {key for key in shapes if key in (getattr(skeleton, "all_tied_weights_keys", None) or {})}
    if missing := sorted(set(shapes) - found - tied):
        raise InputError(f"the weights lack {missing[0]!r}; export it again")
    if (folder / _NOTE).is_file():
        sums = json.loads((folder / _NOTE).read_text(encoding="utf-8"))["sha256"]
        if changed := [name for name in files if sums.get(name) != _sha256(folder / name)]:
            raise InputError(f"{changed[0]} was changed after its export; export it again, or remove {_NOTE}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(
    model: PreTrainedModel,
    ticket: Ticket,
    format: str,
    weights: tuple[int, int],
    difference: float,
    run: Mapping[str, Any],
) -> str:
    """The model card: what it is, what was pruned, how it was verified, how to use it."""
    name, (small, whole) = type(model).__name__, weights
    need = {
        "compact": "import ticketops  # lets transformers load layers of uneven width\n",
        "dense": "",
        "onnx": "",
    }[format]
    use = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")'
        if format == "onnx"
        else f'{need}from transformers import {name}\n\nmodel = {name}.from_pretrained("path/to/this/folder")'
    )
    rows = "\n".join(f"| {key} | {value} |" for key, value in run.items() if isinstance(value, str | int | float))
    came = f"\n## Where it comes from\n\n| | |\n| --- | --- |\n{rows}\n" if rows else ""
    shapes = {
        "compact": "Pruned structures are gone from the weights.",
        "dense": "Pruned structures are zeros at full shape: the same outputs as the small model's, at the full cost.",
        "onnx": "Pruned structures are gone; batch and length are dynamic.",
    }[format]
    return f"""---
library_name: {"onnx" if format == "onnx" else "transformers"}
tags: [ticketops, super-ticket, pruned]
---

# {name}, pruned

{ticket.heads_pruned} of {ticket.num_layers * ticket.num_heads} attention heads and {ticket.ffns_pruned} of \
{ticket.num_layers} FFNs were pruned: {small:,} of {whole:,} parameters are left ({100 * small / whole:.1f} %).
{shapes}

```
{ticket}
```

## Use

```python
{use}
```
{came}
## Verification

Read back and compared with the model that it was made from on {len(SENTENCES)} sentences: outputs differ by at most \
{difference:.1e}, relative to the largest output where that is above 1.
"""

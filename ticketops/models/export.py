"""Three ways out of ticketops: compact and dense transformers folders, and ONNX; each verified before it is there."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ticketops.errors import InputError, TicketopsError
from ticketops.files import new_folder, user_path, write_manifest
from ticketops.models.checkpoint import NOTE, load
from ticketops.models.cost import costs
from ticketops.models.handle import PatchHandle, find_handle
from ticketops.models.note import without_note
from ticketops.models.record import applied_ticket, held_ticket, num_neurons, write_record
from ticketops.models.registry import check_supported, find_adapter
from ticketops.models.shrink import cut_indices, put_back, shrink
from ticketops.models.swapping import stock_class
from ticketops.text import count, fenced, markdown
from ticketops.tickets import Ticket

Format = Literal["compact", "dense", "onnx"]


def export(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    format: Format = "compact",
    *,
    ticket: Ticket | None = None,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Writes the model that a ticket leaves, and reads it back to see that it computes the same, before it is there.

    `compact` has true shapes: `AutoModelFor*.from_pretrained` loads it after `import ticketops`. `dense` has full
    shapes with zeros where something was pruned: plain transformers loads it, at the full model's cost. `onnx` has true
    shapes and runs in onnxruntime. The ticket, a `ticketops.json` and a model card go along. The model is not changed.

    Args:
        model: stock, patched or shrunk.
        folder: to be made; must not exist, or be empty.
        format: `compact`, `dense` or `onnx`.
        ticket: what to keep; by default what is applied to a patched model, or was applied to a stock one when it was
            saved.
        tokenizer: saved along and used on the verification's sentences; without it token ids are drawn. An image
            processor for models that read images.
        run: where the model comes from, as JSON values, for `ticketops.json` and the card.
        push_to_hub: a repository of the Hugging Face hub, `name/of-it`, to which the whole verified folder goes too;
            `push_to_hub` of a loaded model sends its weights and configuration alone.

    Returns:
        The folder.

    Raises:
        InputError: a ticket of another shape, an unknown format.
        UnsupportedError: a model that ticketops does not serve.
        StoreError: the folder is not empty, or cannot be written.
        TicketopsError: what was written does not compute what the model does; nothing is left behind. Or the hub did
            not take it; the folder is there.
    """
    folder = user_path(folder, "the folder to write")
    if format not in get_args(Format):
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(get_args(Format))}")
    small, left, batch, want = _small(model, ticket, tokenizer)
    with new_folder(folder) as temporary:
        if format == "onnx":
            from ticketops.models.onnx import run_onnx, save_onnx

            save_onnx(small, batch, temporary)
            # For what serves the graph: labels, and which class it was.
            small.config.architectures = [type(small).__name__]
            small.config.save_pretrained(temporary)
            got, tolerance = run_onnx(temporary, batch), 1e-4
        else:
            (small if format == "compact" else expand(small)).save_pretrained(temporary)
            got, tolerance = _outputs(load(temporary), batch), _tolerance(model.dtype)
        difference = _compare(want, got, batch.get("attention_mask"), tolerance)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        left.save(temporary / "ticket.safetensors")
        note = {"format": format, "largest_difference": difference, "run": dict(run or {})}
        write_manifest(temporary, NOTE, note)
        # After the checksums, since a card is there to be edited.
        (temporary / "README.md").write_text(_card(small, left, format, difference, run or {}))
    if push_to_hub is not None:
        _push(folder, push_to_hub)
    return folder


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the full-shape twin of a shrunk model, with zeros where something was removed: the same outputs anywhere.

    Args:
        model: shrunk, stock classes; left as it is.

    Returns:
        A new model without a record, of the same class and dtype, on the CPU, in evaluation mode.
    """
    held = held_ticket(model.base_model.config)
    full = Ticket.full(held.num_layers, held.num_heads)
    config = without_note(model.config)
    write_record(config, full)
    twin = stock_class(model)._from_config(config, dtype=model.dtype)
    for name in cut_indices(twin, full, held):
        twin.get_parameter(name).data.zero_()
    put_back(model, twin)
    return twin.eval()


def _small(
    model: PreTrainedModel, ticket: Ticket | None, tokenizer: Any
) -> tuple[PreTrainedModel, Ticket, dict[str, Tensor], dict[str, Tensor]]:
    """A shrunk copy, what it keeps, a batch of text, and what the model itself answers under the ticket."""
    adapter, base = find_adapter(model)
    check_supported(model)
    handle = find_handle(model)
    held = held_ticket(base.config)
    applied = handle.ticket if handle is not None else applied_ticket(base.config)
    ticket = ticket or applied or held
    ticket.check(held.num_layers, held.num_heads, num_neurons(base.config))
    left = (held & ticket).described(ticket.metadata)
    batch, training = adapter.inputs.sample(model, tokenizer), model.training
    own = handle or PatchHandle(model)
    try:
        own.restrict(left, noted=False)
        want = _outputs(model.eval(), batch)
    finally:
        model.train(training)
        if handle is None:
            own.revert()
        else:
            handle.restrict(applied)
    small = stock_class(model)._from_config(without_note(model.config), dtype=model.dtype)
    # A plain dictionary does not tell of the ticket.
    small.load_state_dict(dict(model.state_dict()))
    return shrink(small.eval(), left), left, batch, want


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = model(**{name: value.to(model.device) for name, value in batch.items()})
    return {name: value.float().cpu() for name, value in found.items() if isinstance(value, Tensor)}


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-5, 16 * torch.finfo(dtype).eps)


def _compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor], mask: Tensor | None, tolerance: float) -> float:
    """The largest difference, relative to the largest output where that is above 1; more than `tolerance` is an
    error."""
    largest = 0.0
    for name, expected in want.items():
        found = got.get(name)
        if found is None or found.shape != expected.shape:
            raise TicketopsError(f"the export was not written: {name} is missing when it is read back; report this")
        if mask is not None and expected.shape[: mask.ndim] == mask.shape:
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


def _push(folder: Path, repository: str) -> None:
    hub = huggingface_hub.HfApi()
    files = [huggingface_hub.CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        # One commit, as transformers' own push_to_hub makes it; that one would put a blank card in place of ours.
        name = hub.create_repo(repository, exist_ok=True).repo_id
        hub.create_commit(name, files, commit_message="Upload a pruned model")
    # Of the network, of permissions, of the name: half a dozen types of two libraries.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TicketopsError(
            f"{folder} is verified and there, but the hub did not take it as {repository!r} ({reason}): log in with "
            "`hf auth login` and upload it with `hf upload`"
        ) from error


def _card(model: PreTrainedModel, ticket: Ticket, format: str, difference: float, run: Mapping[str, Any]) -> str:
    """The model card: what it is, what was pruned, how it was verified, how to use it."""
    inputs = find_adapter(model)[0].inputs
    name, (whole, small) = type(model).__name__, costs(model)
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
    facts = [(key, value) for key, value in run.items() if isinstance(value, str | int | float) and key != "command"]
    rows = "\n".join(f"| {markdown(key.replace('_', ' '))} | {markdown(value)} |" for key, value in facts)
    came = f"\n## Where it comes from\n\n| | |\n| --- | --- |\n{rows}\n" if rows else ""
    if isinstance(run.get("command"), str):
        came += f"\nMade by\n\n{fenced(run['command'], 'sh')}\n"
    shapes = {
        "compact": "Pruned structures are gone from the weights.",
        "dense": "Pruned structures are zeros at full shape: the same outputs as the small model's, at the full cost.",
        "onnx": f"Pruned structures are gone; {'batch and length are' if inputs.ragged else 'the batch is'} dynamic.",
    }[format]
    neurons = f", and {count(ticket.neurons_pruned, 'neuron')} of the other FFNs" if ticket.neurons_pruned else ""
    titles = {
        "parameters": "parameters",
        "macs_per_token": f"multiply-accumulates a token of {whole.length}",
        "bytes": "bytes",
    }
    table = "\n".join(
        f"| {title} | {getattr(whole, key):,} | {getattr(small, key):,} | "
        f"{100 * getattr(small, key) / getattr(whole, key):.1f} % |"
        for key, title in titles.items()
    )
    return f"""---
library_name: {"onnx" if format == "onnx" else "transformers"}
tags: [ticketops, super-ticket, pruned]
---

# {name}, pruned

{ticket.heads_pruned} of {count(ticket.num_layers * ticket.num_heads, "attention head")} and {ticket.ffns_pruned} of \
{count(ticket.num_layers, "FFN")} were pruned{neurons}. {shapes}

| | whole model | left | |
| --- | ---: | ---: | ---: |
{table}

```
{ticket}
```

## Use

```python
{use}
```
{came}
## Verification

Read back and compared with the model that it was made from on {inputs.noun}: outputs differ by at most \
{difference:.1e}, relative to the largest output where that is above 1.
"""

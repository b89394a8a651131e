"""Export of pruned models as compact or dense transformers folders or as ONNX. Each export is verified."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ticketops.errors import InputError, TicketopsError, UnsupportedError
from ticketops.files import new_folder, user_path, write_manifest
from ticketops.models.checkpoint import NOTE, load
from ticketops.models.containers import copy_around, save, transformers_model
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
    model: Any,
    folder: str | os.PathLike[str],
    format: Format = "compact",
    *,
    ticket: Ticket | None = None,
    tokenizer: Any = None,
    run: Mapping[str, Any] | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Writes a model shrunk to a ticket. The written files are loaded and their outputs compared with the model's,
    before the folder appears under its name.

    `compact` has the shrunk shapes: `AutoModelFor*.from_pretrained` loads it after `import ticketops`. `dense` has full
    shapes with zeros for pruned structures: plain transformers loads it, at the full model's cost. `onnx` has the
        shrunk
    shapes and runs in onnxruntime. The folder also has the ticket, `ticketops.json` and a model card. The model is not
    changed.

    Args:
        model: stock, patched or shrunk model, or an object of sentence-transformers that contains one. Of such an
            object the folder is one that its class loads, `compact` or `dense`.
        folder: folder to create; must not exist, or must be empty.
        format: `compact`, `dense` or `onnx`.
        ticket: structures to keep; by default the ticket that is applied to a patched model, or that was applied to a
            stock model when it was saved.
        tokenizer: tokenizer of the model (image processor for a vision model). It is saved with the model and used for
            the verification; without it the verification uses random token ids.
        run: origin of the model, as JSON values, for `ticketops.json` and the card.
        push_to_hub: repository of the Hugging Face hub, e.g. "name/model", to which the verified folder is also
            uploaded. (`push_to_hub` of a loaded model uploads its weights and configuration only.)

    Returns:
        The folder.

    Raises:
        InputError: the ticket has another shape, or the format is unknown.
        UnsupportedError: ticketops does not support the model, or the format for an object of sentence-transformers.
        StoreError: the folder is not empty, or cannot be written.
        TicketopsError: the outputs differ, and nothing was written; or the upload failed, and the folder exists.
    """
    folder = user_path(folder, "the folder to write")
    if format not in get_args(Format):
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(get_args(Format))}")
    whole, model = model, transformers_model(model)
    contained = whole is not model
    if contained:
        if format == "onnx":
            raise UnsupportedError(
                f"a {type(whole).__name__} has no export as onnx: export the transformers model inside, or use "
                "compact or dense"
            )
        tokenizer = whole.tokenizer
    small, left, batch, want = _small(model, ticket, tokenizer)
    with new_folder(folder) as temporary:
        if format == "onnx":
            from ticketops.models.onnx import run_onnx, save_onnx

            save_onnx(small, batch, temporary)
            # The configuration tells users of the graph the labels and the class of the model.
            small.config.architectures = [type(small).__name__]
            small.config.save_pretrained(temporary)
            got, tolerance = run_onnx(temporary, batch), 1e-4
        else:
            written = small if format == "compact" else expand(small)
            save(copy_around(whole, written), temporary)
            got, tolerance = _outputs(load(temporary), batch), _tolerance(model.dtype)
        difference = _compare(want, got, batch.get("attention_mask"), tolerance)
        if tokenizer is not None and not contained:
            tokenizer.save_pretrained(temporary)
        left.save(temporary / "ticket.safetensors")
        note = {"format": format, "largest_difference": difference, "run": dict(run or {})}
        write_manifest(temporary, NOTE, note)
        # Written after the checksums, because users edit the card.
        name = type(whole if contained else small).__name__
        (temporary / "README.md").write_text(_card(small, left, format, difference, run or {}, name))
    if push_to_hub is not None:
        _push(folder, push_to_hub)
    return folder


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a full-shape copy of a shrunk model, with zeros for removed structures; its outputs are the same.

    Args:
        model: shrunk model of stock classes; not changed.

    Returns:
        A new model of the same class and dtype, without a record, on the CPU, in evaluation mode.
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
    """Returns a shrunk copy, the ticket of what it keeps, a batch to verify with, and the model's outputs under the
    ticket."""
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
    # As a plain dictionary, without the metadata about the ticket.
    small.load_state_dict(dict(model.state_dict()))
    return shrink(small.eval(), left), left, batch, want


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = model(**{name: value.to(model.device) for name, value in batch.items()})
    return {name: value.float().cpu() for name, value in found.items() if isinstance(value, Tensor)}


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-5, 16 * torch.finfo(dtype).eps)


def _compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor], mask: Tensor | None, tolerance: float) -> float:
    """Returns the largest difference, relative to the largest output if that is above 1. Raises if it exceeds
    `tolerance`."""
    largest = 0.0
    for name, expected in want.items():
        found = got.get(name)
        if found is None or found.shape != expected.shape:
            raise TicketopsError(f"the export was not written: {name} is missing when it is read back; report this")
        if mask is not None and expected.shape[: mask.ndim] == mask.shape:
            # Outputs at padding are meaningless, and the ops do not compute them.
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
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [huggingface_hub.CommitOperationAdd(str(path.relative_to(folder)), path) for path in paths]
    try:
        # Not with transformers' push_to_hub, which would replace our card by a blank one.
        name = hub.create_repo(repository, exist_ok=True).repo_id
        hub.create_commit(name, files, commit_message="Upload a pruned model")
    # Errors of network, permissions or name have half a dozen types from two libraries.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise TicketopsError(
            f"{folder} is verified and there, but the hub did not take it as {repository!r} ({reason}): log in with "
            "`hf auth login` and upload it with `hf upload`"
        ) from error


def _card(
    model: PreTrainedModel, ticket: Ticket, format: str, difference: float, run: Mapping[str, Any], name: str
) -> str:
    """Returns the model card: cost, ticket, usage, origin and verification."""
    inputs = find_adapter(model)[0].inputs
    whole, small = costs(model)
    contained = name != type(model).__name__
    library, load_call = ("sentence-transformers", "") if contained else ("transformers", ".from_pretrained")
    need = {
        "compact": "import ticketops  # lets transformers load layers of uneven width\n",
        "dense": "",
        "onnx": "",
    }[format]
    use = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")'
        if format == "onnx"
        else f'{need}from {library.replace("-", "_")} import {name}\n\nmodel = {name}{load_call}("path/to/this/folder")'
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
library_name: {"onnx" if format == "onnx" else library}
tags: [ticketops, super-ticket, pruned]
---

# {name}, pruned

{ticket.heads_pruned} of {count(ticket.num_layers * ticket.num_heads, "attention head")} and {ticket.ffns_pruned} of \
{count(ticket.num_layers, "FFN")} were pruned{neurons}. {shapes}

| | whole model | pruned model | |
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

"""ONNX export: a shrunk model as one graph with its shrunk shapes, dynamic in batch and, for text, in length."""

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ticketops.errors import UnsupportedError
from ticketops.models.registry import find_adapter

_FILE = "model.onnx"


class _Graph(nn.Module):
    """Calls a model with positional tensors in a fixed order."""

    def __init__(self, model: PreTrainedModel, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(value for value in found.values() if isinstance(value, Tensor))


def save_onnx(model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path) -> None:
    """Writes model.onnx.

    Args:
        model: shrunk model of stock classes, in evaluation mode.
        batch: inputs of the model. A smaller part is traced, so that a later run of the batch tests the dynamic axes.
        folder: folder to write to.

    Raises:
        UnsupportedError: the extra `onnx` is not installed, or the model has weights other than float32.
    """
    _extra("onnx")
    if model.dtype != torch.float32:
        raise UnsupportedError(f"weights are {model.dtype}, and ONNX is verified in float32: call model.float() first")
    accepted = inspect.signature(model.forward).parameters
    inputs = [name for name in batch if name in accepted]
    ragged = find_adapter(model)[0].inputs.ragged
    traced = {name: batch[name][-3:, ..., :8] if ragged else batch[name][-3:] for name in inputs}
    names = ("batch", "choice", "sequence") if batch[inputs[0]].ndim == 3 else ("batch", "sequence")
    axes = {name: dict(enumerate(names if ragged else names[:1])) for name in inputs}
    with torch.no_grad():
        answers, others = model(**{name: batch[name] for name in inputs}), model(**traced)
    outputs = [name for name, value in answers.items() if isinstance(value, Tensor)]
    for name in outputs:
        axes[name] = {0: "batch"}
        for dim, (size, other) in enumerate(zip(answers[name].shape, others[name].shape, strict=True)):
            if dim and size != other:
                axes[name][dim] = "sequence"
            elif dim == 1 and "choice" in names:
                axes[name][dim] = "choice"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Graph(model, inputs),
            tuple(traced.values()),
            str(folder / _FILE),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


def run_onnx(folder: Path, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs model.onnx in onnxruntime on the CPU.

    Args:
        folder: folder with model.onnx.
        batch: inputs by name.

    Returns:
        The outputs by name.
    """
    runtime = _extra("onnxruntime")
    session = runtime.InferenceSession(str(folder / _FILE), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    found = session.run(names, {node.name: batch[node.name].numpy() for node in session.get_inputs()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def _extra(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} is not installed: pip install 'ticketops[onnx]'") from error

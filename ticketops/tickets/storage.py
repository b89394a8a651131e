"""File format of tickets and importances: a safetensors file with a description and a checksum in its header."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ticketops.errors import InputError
from ticketops.files import user_path, write_atomically

VERSION = 1
# Largest size of a file in bytes. Scores of a thousand layers of a thousand heads fit; nothing larger is ours.
MAX_BYTES = 16 * 2**20
# The description is under one key: safetensors does not guarantee the order of keys, and equal content should give
# equal bytes.
_KEY = "ticketops"

T = TypeVar("T")


def to_json(value: Any) -> str:
    """Writes a value as strict JSON, which loads as an equal value.

    Args:
        value: anything made of None, bool, int, finite float, str, list and dict.

    Returns:
        The JSON text, keys sorted.

    Raises:
        InputError: the value is not JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata must be JSON: {error}; use strings, finite numbers, lists and dicts") from error


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Writes tensors and fields to one file, atomically and with a SHA-256 checksum.

    Args:
        path: the file to write.
        kind: type of the content, `ticket` or `importance`.
        tensors: CPU tensors by name.
        fields: JSON values by name.

    Raises:
        InputError: the fields are not JSON.
        StoreError: the file cannot be written.
    """
    description = {"format": f"ticketops.{kind}", "version": VERSION, "fields": dict(fields)}
    description["sha256"] = _seal(description, tensors)
    content = to_safetensors(dict(tensors), {_KEY: to_json(description)})
    if len(content) > MAX_BYTES:
        raise InputError(f"cannot save {path}: {len(content)} bytes, more than {MAX_BYTES}; shorten its metadata")
    write_atomically(path, content)


def load(
    path: str | os.PathLike[str],
    kind: str,
    layout: Mapping[str, tuple[str, int]],
    build: Callable[[dict[str, Tensor], dict[str, Any]], T],
    optional: Mapping[str, tuple[str, int]] | None = None,
) -> T:
    """Reads a file that `save` wrote and builds an object from it. Every defect of the file is an InputError.

    Args:
        path: the file to read.
        kind: required type of the content, `ticket` or `importance`.
        layout: safetensors dtype and number of dimensions of each tensor, by name.
        build: makes the object from the tensors and the fields.
        optional: the same as `layout`, for tensors that are either all in the file or all missing.

    Returns:
        The result of `build`.

    Raises:
        InputError: the file is missing, of another type, damaged, too large, or of another version.
    """
    try:
        return build(*_read(user_path(path, "the path"), kind, layout, optional or {}))
    except (InputError, OSError) as error:
        raise InputError(f"cannot load the {kind} {path}: {error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        message = f"cannot load the {kind} {path}: it is damaged or not a {kind} ({reason}); save it again"
        raise InputError(message) from error


def _read(
    path: Path, kind: str, layout: Mapping[str, tuple[str, int]], optional: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise InputError("no such file; check the path")
    if not path.is_file():
        raise InputError("it is not a file; give the path of the .safetensors file itself")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{size} bytes are too many for a {kind} (at most {MAX_BYTES}); check the path")
    with safe_open(path, framework="pt") as file:
        description = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if not isinstance(description, dict) or description.get("format") != f"ticketops.{kind}":
            raise InputError(f"the file does not say that it holds a {kind}; check the path")
        if (version := description.get("version")) != VERSION:
            raise InputError(f"format version {version!r:.40}, this ticketops reads {VERSION}; use one that reads it")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (part.get_dtype(), len(part.get_shape())) for name, part in slices.items()}
        if found not in (dict(layout), {**layout, **optional}):
            raise InputError(f"its tensors are not {dict(layout)} in dtype and dimensions; save it again")
        # Not `file.get_tensor`, which turns a Ctrl-C into a ValueError about the file.
        tensors = from_safetensors(path.read_bytes())
    if description.pop("sha256", None) != _seal(description, tensors):
        raise InputError("its checksum does not match its content, so it was changed or damaged; save it again")
    # Kernels that read a bool tensor with bytes other than 0 and 1 have undefined behaviour.
    if any((tensor.view(torch.uint8) > 1).any() for tensor in tensors.values() if tensor.dtype == torch.bool):
        raise InputError("a mask holds bytes other than 0 and 1; save it again")
    return {name: tensor.clone() for name, tensor in tensors.items()}, description["fields"]


def _seal(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(to_json(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()

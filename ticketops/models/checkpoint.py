"""Safe loading of model folders, which may be damaged or hostile: only safetensors and JSON are read, and they are
checked before the model is built."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk
from transformers.initialization import no_init_weights

from ticketops.errors import InputError, TicketopsError
from ticketops.files import MAX_INDEX_BYTES, MAX_JSON_BYTES, read_json, read_manifest, user_path
from ticketops.models.note import without_note
from ticketops.models.record import applied_ticket, held_ticket
from ticketops.models.registry import check_installed, check_supported, find_adapter

#: File in an export or a run's saved model that has its origin and the checksums of its files.
NOTE = "ticketops.json"
# No size of any encoder comes near; a configuration with more would have a loader allocate it.
_MAX_SIZE = 10**7
_MAX_LABELS = 10**5
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
#: Arguments of every from_pretrained that reads a folder: no download, no remote code, no prompt.
LOCAL: Mapping[str, Any] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
#: Files in which a folder can refer to custom code, under _CODE_KEY.
_CODE_FILES = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_CODE_KEY = "auto_map"
#: Keys and a file that make from_pretrained read files other than the folder's own weights.
_REFUSED_KEYS = ("quantization_config", "transformers_weights")
_REFUSED_FILE = "adapter_config.json"
#: Of weights, in safetensors' words.
_DTYPES = ("F32", "F16", "BF16")


def load(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Reads a model that `export` (compact or dense) or `save_pretrained` wrote; safetensors and JSON only.

    A checkpoint of transformers 4.x with `pruned_heads` loads too; `export` converts it.

    Every size and name is checked against the files' headers before memory is allocated. No code is executed.

    Args:
        folder: folder with config.json and model.safetensors or its shards.

    Returns:
        The model with its task head, on the CPU, in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        UnsupportedError: ticketops does not support the model.
    """
    folder = user_path(folder, "the folder of the model")
    try:
        return _load(folder)
    except TicketopsError as error:
        raise type(error)(f"cannot load the model {folder}: {error}") from error
    # A damaged checkpoint raises any of a dozen exception types from four libraries.
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise InputError(f"cannot load the model {folder}: it is damaged ({reason}); export it again") from error


def check_folder(folder: Path) -> dict[str, Any]:
    """Checks that a model's folder refers to no code and no other models, and contains only regular files.

    Must be called before transformers reads anything from the folder.

    Args:
        folder: folder with config.json.

    Returns:
        The content of config.json.

    Raises:
        InputError: one of its files is missing, damaged or hostile.
        UnsupportedError: the installed transformers does not have the architecture yet.
    """
    for path in folder.iterdir():
        # Such as a pipe, a device, a socket, or a broken link.
        if not path.is_file() and not path.is_dir():
            raise InputError(f"{path.name!r:.80} is no regular file; remove it")
    content = _read_json(folder / "config.json", largest=_MAX_SIZE)
    for name in _CODE_FILES:
        found = content if name == "config.json" else _read_json(folder / name) if (folder / name).exists() else {}
        if found.get(_CODE_KEY) is not None:
            raise InputError(
                f'{name} has "{_CODE_KEY}": it is made for custom code, which ticketops never runs; give a model of '
                "transformers' own"
            )
    check_installed(content.get("model_type"))
    labels = content.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:
        raise InputError(f"config.json has {labels} labels, each of which is given a name; correct it")
    if bad := [key for key in _REFUSED_KEYS if content.get(key) is not None]:
        raise InputError(f'config.json has "{bad[0]}", which would read more than this folder\'s weights; remove it')
    if (folder / _REFUSED_FILE).exists():
        raise InputError(f"{_REFUSED_FILE} names another model to load; merge the adapter and save the whole model")
    return content


def read_config(folder: Path) -> tuple[Any, Any]:
    """Reads the class and configuration of the model in a folder, and checks that building it is safe.

    Args:
        folder: folder with config.json.

    Returns:
        The model's class and its configuration.

    Raises:
        InputError: the file is missing, damaged or hostile.
    """
    content = check_folder(folder)
    names = content.get("architectures")
    kind: Any = getattr(transformers, names[0], None) if isinstance(names, list) and len(names) == 1 else None
    is_model: bool = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not is_model:
        raise InputError(f"config.json names no model class of transformers ({names!r:.60}); export it again")
    config: Any = AutoConfig.from_pretrained(folder, **LOCAL)
    if kind.config_class is None or not isinstance(config, kind.config_class):
        raise InputError(f"config.json is a {type(config).__name__}, which is none of {kind.__name__}")
    # Other names of attention implementations refer to kernels on the hub, which would be downloaded.
    config._attn_implementation = None
    held_ticket(config)
    applied_ticket(config)
    return kind, config


def check_files(folder: Path) -> None:
    """Verifies the checksums in the `ticketops.json` of an export or of a run's saved model.

    Args:
        folder: folder of a model; without `ticketops.json` there is nothing to verify.

    Raises:
        InputError: `ticketops.json` is damaged, or a file is missing or was changed.
    """
    if not (folder / NOTE).exists():
        return
    remedy = f"export it again, or remove {NOTE} if the change is meant"
    sums = read_manifest(folder, NOTE, remedy)["sha256"]
    if added := [path.name for path in _weight_files(folder) if path.name not in sums]:
        raise InputError(f"{folder / added[0]} is not one of the files that were written: {remedy}")


def _load(folder: Path) -> PreTrainedModel:
    check_files(folder)
    kind, config = read_config(folder)
    files = _weight_files(folder)
    # A lower bound of the size of the weights: two LayerNorms per layer. (If the first layer lacks one, the model has
    # it.) It limits the layers that a hostile configuration can have built.
    least = 2 * config.num_hidden_layers * config.hidden_size * torch.bfloat16.itemsize
    if least > (found := sum(path.stat().st_size for path in files)):
        raise InputError(
            f"{found} bytes of weights are too few for the {config.num_hidden_layers} layers of size "
            f"{config.hidden_size} in config.json; export it again"
        )
    with torch.device("meta"), no_init_weights():
        skeleton = kind(without_note(config))
    find_adapter(skeleton)
    _check_weights(files, skeleton)
    model, report = kind.from_pretrained(
        folder,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **LOCAL,
    )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[problem]:
            raise InputError(f"{problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[0]}; export it again")
    check_supported(model)
    return model.eval()


def _read_json(path: Path, most: int = MAX_JSON_BYTES, largest: int | None = None) -> dict[str, Any]:
    """Reads a JSON object from a model's folder."""
    if not path.is_file():
        raise InputError(f"no {path.name}; give a folder made by ticketops export or save_pretrained")
    return read_json(path, "correct it, or export it again", most, largest)


def _weight_files(folder: Path) -> list[Path]:
    """Returns the weight files that from_pretrained will read; all are in the folder itself."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single.name]
    if index.is_file() and not single.exists():
        shards = _read_json(index, MAX_INDEX_BYTES)["weight_map"].values()
        if bad := [name for name in shards if not isinstance(name, str) or not _SHARD.fullmatch(name)]:
            raise InputError(f"{index.name} names the file {bad[0]!r:.60}, no shard in this folder; export it again")
        files = sorted(set(shards))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise InputError(f"no {missing[0]}; only safetensors weights are read")
    return [folder / name for name in files]


def _check_weights(files: list[Path], skeleton: PreTrainedModel) -> None:
    """Compares the shapes in the files' headers with those of the model's parameters, before memory is allocated."""
    shapes = {name: list(value.shape) for name, value in skeleton.state_dict().items()}
    # If transformers has renamed or divided modules, files on disk keep the old names and the undivided weights.
    changes = get_model_conversion_mapping(skeleton)
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                # A buffer that transformers before 4.31 saved, and that later versions ignore.
                if key.endswith("embeddings.position_ids"):
                    continue
                part, names = file.get_slice(key), _names_in_model(key, changes)
                # Earlier versions wrote the weights of removed sublayers as tensors of size 0.
                if names[0] not in shapes and 0 in part.get_shape():
                    continue
                if twice := [name for name in names if name in found]:
                    raise InputError(
                        f"{key!r:.100} and {found[twice[0]]!r:.100} are one parameter twice; export it again"
                    )
                if _joined([shapes.get(name) for name in names]) != part.get_shape() or part.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{key!r:.100} is {part.get_dtype()} {part.get_shape()} in {path.name}, which its "
                        "configuration does not make; export it again"
                    )
                found |= dict.fromkeys(names, key)
    tied = {key for key in shapes if key in (getattr(skeleton, "all_tied_weights_keys", None) or {})}
    if missing := sorted(set(shapes) - found.keys() - tied):
        raise InputError(f"the weights lack {missing[0]!r}; export it again")


def _names_in_model(key: str, changes: Iterable[Any]) -> list[str]:
    """Returns the names of the model's parameters that a tensor of a file becomes: several equal parts of its rows, if
    transformers divides it."""
    names = [key]
    for change in changes:
        names = [part for name in names for part in _changed(name, change)]
    return names


def _changed(name: str, change: Any) -> list[str]:
    """Applies one of transformers' changes to a name."""
    changed, matched = change.rename_source_key(name)
    operations: Any = getattr(change, "operations", ())
    divides = len(operations) == 1 and type(operations[0]) is Chunk and operations[0].dim == 0
    if matched is None or not divides:
        return [changed]
    return [changed.replace(change.target_patterns[0], part, 1) for part in change.target_patterns]


def _joined(shapes: list[list[int] | None]) -> list[int] | None:
    """Returns the shape of a tensor whose rows are those of equal parts; None if there are no such parts."""
    part = shapes[0]
    if part is None or len(shapes) == 1:
        return part
    return [len(shapes) * part[0], *part[1:]] if shapes.count(part) == len(shapes) else None

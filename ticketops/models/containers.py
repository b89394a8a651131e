"""Objects of sentence-transformers, and the transformers models inside them."""

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ticketops.errors import UnsupportedError
from ticketops.optional import sentence_transformers

_CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")

#: A transformers model, or an object with one inside.
AnyModel = TypeVar("AnyModel")


def is_container(model: Any) -> bool:
    """Returns True for a SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder.

    Args:
        model: object of any class.
    """
    # If such an object exists, the library is imported.
    library = sys.modules.get("sentence_transformers.base.model")
    return library is not None and isinstance(model, library.BaseModel)


def transformers_model(model: Any) -> Any:
    """Returns the transformers model inside an object of sentence-transformers.

    Args:
        model: object of sentence-transformers. Any other object is returned itself.

    Raises:
        UnsupportedError: it contains no transformers model, or several.
    """
    if not is_container(model):
        return model
    found = list(dict.fromkeys(_outermost(model)))
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if not found:
        raise UnsupportedError(
            f"this {name} has no transformers model inside: load one whose first module is a Transformer, with "
            "backend='torch'"
        )
    raise UnsupportedError(
        f"this {name} has {len(found)} transformers models inside, each of which has tickets of its own: give them one "
        "by one, each the `model` of its Transformer module"
    )


def is_container_folder(folder: Path) -> bool:
    """Returns True if a folder contains a saved object of sentence-transformers.

    Args:
        folder: folder of a model.
    """
    return (folder / "modules.json").is_file()


def load_container(folder: Path) -> Any:
    """Loads a saved object of sentence-transformers on the CPU. No code of the folder is executed.

    Args:
        folder: folder whose transformers model is checked already.

    Raises:
        UnsupportedError: sentence-transformers is not installed.
    """
    library, note = sentence_transformers(), folder / "config_sentence_transformers.json"
    name = json.loads(note.read_text(encoding="utf-8")).get("model_type") if note.is_file() else None
    kind = getattr(library, name if name in _CLASSES else "SentenceTransformer")
    return kind(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)


def copy_around(model: Any, inner: PreTrainedModel) -> Any:
    """Copies an object of sentence-transformers, with another transformers model in the place of its own.

    Args:
        model: the object; of a transformers model nothing is around it, and `inner` is returned.
        inner: model to put into the copy.
    """
    # In `deepcopy`'s memory, `inner` is the copy of the model.
    return copy.deepcopy(model, {id(transformers_model(model)): inner})


def save(model: Any, folder: Path) -> None:
    """Saves a transformers model or an object of sentence-transformers.

    Args:
        model: the model or object.
        folder: folder to write to.
    """
    # Its own card would say that the model is as it was.
    options = {"create_model_card": False} if is_container(model) else {}
    model.save_pretrained(str(folder), **options)


def refuse_readers_of_padding(model: Any) -> None:
    """Refuses an object of sentence-transformers that reads hidden states at padding, which a patched model leaves out.

    Args:
        model: such an object. Of anything else nothing is known.

    Raises:
        UnsupportedError: names the module.
    """
    if not is_container(model):
        return
    modules = sys.modules["sentence_transformers.sentence_transformer.modules"]
    for module in model.modules():
        expansion = getattr(module, "query_expansion", None)
        if isinstance(module, modules.CNN) or (isinstance(expansion, dict) and not expansion["attend"]):
            what, remedy = "CNN", "leave it unpatched"
            if expansion:
                what, remedy = "query_expansion without attention", "set its attend=True, or leave the model unpatched"
            raise UnsupportedError(
                f"this {type(model).__name__} has a {what}, which reads hidden states at padding, and a patched model "
                f"has none there: {remedy}"
            )


def callers(model: Any) -> list[nn.Module]:
    """Returns the modules of an object of sentence-transformers that call the inner model's forward method directly, so
    that its hooks do not run.

    Args:
        model: object of sentence-transformers. For any other object the list is empty.
    """
    if not is_container(model):
        return []
    library = sys.modules["sentence_transformers.base.modules.transformer"]
    return [module for module in model.modules() if type(module) is library.Transformer]


def separate_columns() -> AbstractContextManager[None]:
    """Returns a context in which the losses of sentence-transformers embed each column of a batch in a separate forward
    pass.

    By default they concatenate the columns to one pass, for speed; then the example of a row is not known.
    """
    library = sys.modules.get("sentence_transformers.base.losses.merged_forward")
    return getattr(library, "column_merging_disabled", nullcontext)()


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The transformers models inside a module, without those inside another one of them; of what torch.compile made of
    one the wrapper, which is refused."""
    if isinstance(module, PreTrainedModel) or hasattr(module, "_orig_mod"):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)

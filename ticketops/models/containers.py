"""Where the transformers model is inside an object of sentence-transformers."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ticketops.errors import UnsupportedError

#: A transformers model, or an object with one inside.
AnyModel = TypeVar("AnyModel")


def is_container(model: Any) -> bool:
    """True for a SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder.

    Args:
        model: of any class.
    """
    # Whoever has such an object has imported the library.
    library = sys.modules.get("sentence_transformers.base.model")
    return library is not None and isinstance(model, library.BaseModel)


def transformers_model(model: Any) -> Any:
    """The one transformers model inside an object of sentence-transformers.

    Args:
        model: such an object. Anything else is returned as it is.

    Raises:
        UnsupportedError: there is none inside, or several.
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


def callers(model: Any) -> list[nn.Module]:
    """The modules of an object of sentence-transformers that call the forward method of the model inside, past its
    hooks.

    Args:
        model: such an object. Anything else has none.
    """
    if not is_container(model):
        return []
    library = sys.modules["sentence_transformers.base.modules.transformer"]
    return [module for module in model.modules() if type(module) is library.Transformer]


def separate_columns() -> AbstractContextManager[None]:
    """Has the losses of sentence-transformers embed each column of a batch in a forward pass of its own.

    They would put columns behind each other in one pass, for speed alone, in which nobody could tell whose example a
    row is.
    """
    library = sys.modules.get("sentence_transformers.base.losses.merged_forward")
    return getattr(library, "column_merging_disabled", nullcontext)()


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models inside a module, without those inside another one of them."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)

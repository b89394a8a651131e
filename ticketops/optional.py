"""Libraries that only some uses need."""

from typing import Any

from ticketops.errors import UnsupportedError


def sentence_transformers() -> Any:
    """Imports sentence-transformers.

    Returns:
        The package.

    Raises:
        UnsupportedError: it is not installed, or is older than version 6.
    """
    try:
        import sentence_transformers.base.model
    except ImportError as error:
        raise UnsupportedError(
            "models of sentence-transformers need its version 6 or later: pip install 'sentence-transformers>=6'"
        ) from error
    return sentence_transformers

"""How the compiled extensions are loaded: their switches in the environment, and whether they were built from the
sources that lie beside them."""

import hashlib
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ticketops.errors import UnsupportedError

#: Of a checkout, to which the paths of an extension's sources are relative.
ROOT = Path(__file__).resolve().parents[2]
#: What builds both extensions anew in a checkout.
REBUILD = "python setup.py build_ext --inplace"


def switch(variable: str, choices: Sequence[str]) -> str | None:
    """Reads a variable of the environment.

    Args:
        variable: its name.
        choices: the values that mean something.

    Returns:
        One of the choices; None where the variable is unset or empty.

    Raises:
        UnsupportedError: another value.
    """
    value = os.environ.get(variable) or None
    if value is not None and value not in choices:
        raise UnsupportedError(f"{variable}={value} is none of its values here: use {', '.join(choices)}, or unset it")
    return value


def changed_sources(built_from: str, root: Path = ROOT) -> list[str]:
    """The sources that an extension was built from and that are different now.

    Args:
        built_from: a line "<SHA-256> <path>" for each.
        root: folder that the paths are relative to.

    Returns:
        Their paths; none where the extension was installed without its sources.
    """
    if not (root / "csrc").is_dir():
        return []
    changed = []
    for line in built_from.splitlines():
        digest, _, path = line.partition(" ")
        file = root / path
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(path)
    return changed


def load(name: str, switches: Sequence[str], kernels: str, needs: str) -> tuple[Any, str | None]:
    """Imports an extension, unless a switch turns it off; one that is out of date is left aside with a warning.

    Args:
        name: of the module.
        switches: variables whose value 0 turns it off; 1 is what a build demands, and changes nothing here.
        kernels: what the extension is called in messages.
        needs: what building it needs, for the message where it is missing.

    Returns:
        The module and None, or None and the reason.

    Raises:
        UnsupportedError: a switch is neither 0 nor 1.
    """
    for variable in switches:
        if switch(variable, ("0", "1")) == "0":
            return None, f"{variable}=0 turns {kernels} off"
    built = "is" if kernels.startswith("the native extension") else "are"
    try:
        extension: Any = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, f"{kernels} {built} not built: install ticketops again {needs} and without {switches[-1]}=0"
    except ImportError as error:
        return None, f"{kernels} cannot be loaded ({error}): install ticketops again"
    if not hasattr(extension, "built_from"):
        stale = "by an older version"
    elif changed := changed_sources(extension.built_from):
        stale = f"before {changed[0]} changed" if len(changed) == 1 else f"before {len(changed)} of its sources changed"
    else:
        return extension, None
    reason = f"{kernels} {built} out of date, built {stale}: run `{REBUILD}` in {ROOT}, or install ticketops again"
    warnings.warn(f"ticketops does without: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason

"""Loading of the compiled extensions: environment variables that turn them off, and detection of stale builds."""

import hashlib
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ticketops.errors import UnsupportedError

#: Root of the checkout; the paths of an extension's sources are relative to it.
ROOT = Path(__file__).resolve().parents[2]
#: The command that rebuilds both extensions in a checkout.
REBUILD = "python setup.py build_ext --inplace"


def switch(variable: str, choices: Sequence[str]) -> str | None:
    """Reads an environment variable that has a fixed set of values.

    Args:
        variable: name of the variable.
        choices: the valid values.

    Returns:
        One of the choices; None if the variable is unset or empty.

    Raises:
        UnsupportedError: the variable has any other value.
    """
    value = os.environ.get(variable) or None
    if value is not None and value not in choices:
        raise UnsupportedError(f"{variable}={value} is not supported here: use {', '.join(choices)}, or unset it")
    return value


def changed_sources(built_from: str, root: Path = ROOT) -> list[str]:
    """Lists the source files that have changed since an extension was built.

    Args:
        built_from: one line "<SHA-256> <path>" per source file, as recorded at build time.
        root: folder that the paths are relative to.

    Returns:
        Paths of changed or missing files; empty if the extension was installed without its sources.
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
    """Imports a compiled extension. One that is turned off, missing, broken or out of date is not used; for the last
    there is a warning.

    Args:
        name: name of the module.
        switches: environment variables; the value 0 in any of them turns the extension off. (1 makes a build fail
            without the extension, and has no effect here.)
        kernels: name of the extension in messages, e.g. "the CUDA kernels".
        needs: what a build of the extension needs, e.g. "with nvcc at hand"; used in the message if it is not built.

    Returns:
        (module, None), or (None, reason).

    Raises:
        UnsupportedError: one of `switches` is set to something other than 0 or 1.
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

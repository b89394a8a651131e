"""Reading and writing of files and folders: writes are atomic and survive a power cut, reads are checked."""

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from ticketops.errors import InputError, StoreError, shown, spelled
from ticketops.text import repeated

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again; finished work is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again; finished work is kept",
    errno.EROFS: "the file system is read-only: choose another OUTPUT folder",
    errno.EACCES: "permission denied: choose another OUTPUT folder or change its permissions",
    errno.EPERM: "not permitted: choose another OUTPUT folder or change its permissions",
    errno.EEXIST: "a file of that name is in the way: choose another OUTPUT folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another OUTPUT folder",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter OUTPUT folder",
}
#: Maximum size of a JSON file in bytes. Records of the largest runs have a thousandth of it.
MAX_JSON_BYTES = 2**20
#: Maximum size of the index of a model's shards in bytes. It names each tensor, so it grows with the model.
MAX_INDEX_BYTES = 2**26


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Expands "~" and "~user" in a path from the user, and checks that the operating system accepts the path.

    Args:
        path: path as the user wrote it.
        name: what the path is for, e.g. "the folder to export"; used in the error message.

    Returns:
        The expanded path, which may or may not exist.

    Raises:
        InputError: the user is unknown or has no home folder, or the operating system rejects the path: too long, a
            loop of links, a folder without permission.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        # Such as a model in memory.
        raise InputError(f"{name} {shown(path)} is not a path")
    quoted = ascii(os.fspath(path))
    if len(quoted) > 100:
        quoted = f"{quoted[:100]}...'"
    try:
        # Runs record their paths as UTF-8 text, so undecodable bytes are refused.
        os.fspath(path).encode()
        found = Path(path).expanduser()
        # Service accounts may have a home folder that does not exist.
        if found != Path(path) and not Path(Path(path).parts[0]).expanduser().is_dir():
            raise RuntimeError
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except RuntimeError as error:
        raise InputError(f"{name} {quoted}: there is no such user, or that user has no home folder") from error
    # A null character or an undecodable byte raises ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} {quoted} cannot be used: {reason}") from error
    return found


def text_encoding(name: str) -> str:
    """Returns Python's canonical name of a text encoding, e.g. "utf-8" for "UTF8".

    Args:
        name: name of the encoding, as the user wrote it.

    Raises:
        InputError: Python has no text encoding of this name.
    """
    try:
        "".encode(name)
    except (LookupError, ValueError) as error:
        raise InputError(
            f"{spelled('encoding')} {shown(name)} is unknown: give utf-8, latin-1, utf-16, cp1252 or the like"
        ) from error
    return codecs.lookup(name).name


def store_error(path: Path, error: OSError) -> StoreError:
    """Converts an operating-system error to a StoreError with a remedy.

    Args:
        path: file or folder that could not be written.
        error: error of the operating system.

    Returns:
        The error to raise.
    """
    remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}: choose another OUTPUT folder").replace(
        "OUTPUT", spelled("output")
    )
    return StoreError(f"cannot write {path}: {remedy}")


def cache_folder() -> Path:
    """The folder of what can be fetched or made again: TICKETOPS_CACHE, else `ticketops` in the user's cache folder."""
    if chosen := os.environ.get("TICKETOPS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ticketops"


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, durably: they survive a power cut.

    Args:
        folder: folder to create; may exist.

    Raises:
        OSError: the folder cannot be created.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file atomically: if the process is killed at any moment, either the old or the whole new file exists.

    When it returns, the file survives a power cut.

    Args:
        path: file to write; missing folders are created.
        data: content; text is encoded as UTF-8.

    Raises:
        StoreError: the file cannot be written (disk full, read-only, no permission).
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    try:
        _write(path, content)
    except FileNotFoundError:
        # Another process took the temporary file for one that a killed process had left.
        try:
            _write(path, content)
        except OSError as error:
            raise store_error(path, error) from error
    except OSError as error:
        raise store_error(path, error) from error


def _write(path: Path, content: bytes) -> None:
    temporary: str | None = None
    try:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        _finish(Path(temporary))
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Creates a folder atomically: the context fills a temporary folder, which is renamed at the end if no error
    occurred. The folder then survives a power cut.

    Args:
        folder: folder to create; must not exist, or must be empty.

    Yields:
        The temporary folder, next to `folder`.

    Raises:
        StoreError: the folder is not empty, or cannot be written.
    """
    temporary = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is there already: choose another {spelled('output')} folder, or remove it")
        make_folder(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            _finish(path)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise store_error(folder, error) from error
    except SafetensorError as error:
        # It gives the number of the operating system's error only in its text.
        number = re.search(r"os error (\d+)", str(error))
        raise store_error(folder, OSError(int(number[1]) if number else 0, str(error))) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _finish(path: Path) -> None:
    """Sets the default permissions of a new file or folder, and flushes it to the disk."""
    # mkstemp, mkdtemp and safetensors create files that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read, or is a pipe, a device or a folder, which may never end.
    """
    with _regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file.

    Args:
        path: the file.

    Raises:
        OSError: as `sha256`.
    """
    with _regular(path) as file:
        return file.read()


def _regular(path: Path) -> BufferedReader:
    # To open a pipe would wait for its writer.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return path.open("rb")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to a JSON object, which `read_json` verifies.

    Args:
        content: the object.

    Returns:
        A copy with the key "checksum".
    """
    return {**content, "checksum": _checksum(content)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, atomically.

    Args:
        path: file to write.
        content: the object.

    Raises:
        StoreError: the file cannot be written.
    """
    write_atomically(path, json.dumps(sealed(content), indent=2, allow_nan=False) + "\n")


def read_json(
    path: Path, remedy: str, most: int = MAX_JSON_BYTES, largest: int | None = None, unsealed: bool = True
) -> dict[str, Any]:
    """Reads a JSON object strictly: its size is bounded, numbers are finite, keys are unique, and the checksum is
    verified.

    Args:
        path: file to read.
        remedy: what the user can do if the file is damaged; ends the error message.
        most: maximum size of the file in bytes.
        largest: maximum absolute value of integers; None for no limit.
        unsealed: True accepts files without the checksum that `sealed` adds.

    Returns:
        The object, without its checksum.

    Raises:
        InputError: the file cannot be read, is too large, is not a JSON object, or was changed after it was written.
    """

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"{path} {reason}: {remedy}")

    def whole(digits: str) -> int:
        if len(digits) > 19 or abs(int(digits)) > (largest or 0):
            refuse(f"has the size {digits:.20}, larger than any model's")
        return int(digits)

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            refuse(f"has the number {text:.20}, which is not finite")
        return float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            refuse(f"has the key {repeated(name for name, _ in pairs)!r:.60} twice")
        return values

    try:
        try:
            found = path.stat()
        except FileNotFoundError:
            refuse("is not there")
        if not stat.S_ISREG(found.st_mode):
            refuse("is not a file")
        if found.st_size > most:
            refuse(f"is larger than {most} bytes")
        text = path.read_text(encoding="utf-8")
        # No function is called for each number where none is needed, because runs have thousands of such files.
        integer = None if largest is None else whole
        content = json.loads(text, parse_int=integer, parse_constant=number, object_pairs_hook=unique)
        if not isinstance(content, dict):
            refuse(f"is a JSON {type(content).__name__}, not an object")
        checksum = content.pop("checksum", None)
        try:
            actual = _checksum(content)
        except ValueError:
            # A number that is too large for a float: find it.
            json.loads(text, parse_float=number)
            raise
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): {remedy}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply: {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path} is truncated or damaged: {remedy}") from error
    if checksum != actual and not (unsealed and checksum is None):
        refuse("was changed or damaged after it was written")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, name: str, fields: Mapping[str, Any]) -> None:
    """Writes a JSON file with the checksums of all other files of a folder.

    Args:
        folder: folder that is complete except for this file.
        name: name of the file.
        fields: further fields of the JSON object.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != name)
    sums = {str(path.relative_to(folder)): sha256(path) for path in paths}
    text = json.dumps(sealed({**fields, "sha256": sums}), indent=2, sort_keys=True, allow_nan=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, name: str, remedy: str) -> dict[str, Any]:
    """Reads a file that `write_manifest` wrote, and verifies the checksum of every file that it lists.

    Args:
        folder: folder of the file.
        name: name of the file.
        remedy: what the user can do if a file is missing or damaged; ends the error message.

    Returns:
        The JSON object.

    Raises:
        InputError: the file is damaged, or a file that it lists is missing or was changed.
    """
    path = folder / name
    content = read_json(path, remedy)
    sums = content.get("sha256")
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise InputError(f"{path} does not list the folder's checksums: {remedy}")
    for entry, expected in sums.items():
        # Entries must be relative paths inside the folder.
        if Path(entry).is_absolute() or ".." in Path(entry).parts or "\0" in entry:
            raise InputError(f"{path} lists {entry!r:.100}, no file of this folder: {remedy}")
        try:
            found = sha256(folder / entry)
        except OSError as error:
            raise InputError(f"{folder / entry} cannot be read ({error.strerror}): {remedy}") from error
        if found != expected:
            raise InputError(f"{folder / entry} was changed or damaged after it was written: {remedy}")
    return content

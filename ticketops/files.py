"""Files that are either wholly there or not there at all."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ticketops.errors import InputError, StoreError, spelled

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again; finished work is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again; finished work is kept",
    errno.EROFS: "the file system is read-only: choose another OUTPUT folder",
    errno.EACCES: "permission denied: choose another OUTPUT folder or change its permissions",
    errno.EPERM: "not permitted: choose another OUTPUT folder or change its permissions",
    errno.EEXIST: "a file of that name is in the way: choose another OUTPUT folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another OUTPUT folder",
}


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Expands a path that a user gave, and refuses one that no file could have.

    Args:
        path: as given; "~" and "~user" are expanded.
        name: what the path is of, for the error message.

    Returns:
        The path, whether or not something is there.

    Raises:
        InputError: its user is unknown, or the operating system does not take it: too long, a loop of links, a folder
            that may not be entered.
    """
    shown = ascii(os.fspath(path))
    if len(shown) > 100:
        shown = f"{shown[:100]}...'"
    try:
        found = Path(path).expanduser()
        # Accounts of services have homes that are not there.
        if found != Path(path) and not Path(Path(path).parts[0]).expanduser().is_dir():
            raise RuntimeError
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except RuntimeError as error:
        raise InputError(f"{name} {shown}: there is no such user, or that user has no home folder") from error
    # A null character in it is a ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} {shown} cannot be used: {reason}") from error
    return found


def store_error(path: Path, error: OSError) -> StoreError:
    """Turns an operating-system error on `path` into a StoreError that says what to do.

    Args:
        path: the file or folder that could not be written.
        error: what the operating system answered.

    Returns:
        The error to raise.
    """
    remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}: choose another OUTPUT folder").replace(
        "OUTPUT", spelled("output")
    )
    return StoreError(f"cannot write {path}: {remedy}")


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file so that a reader, or a process killed at any moment, sees all of it or nothing of it.

    Args:
        path: the file to write; its folder is created where it is missing.
        data: the content; text is written as UTF-8.

    Raises:
        StoreError: the folder cannot be written (full, read-only, no permission).
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise store_error(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder that is there when all went well, and not at all when not.

    Args:
        folder: must not exist, or be empty.

    Yields:
        A folder beside it, to be filled, that takes its name in the end.

    Raises:
        StoreError: the folder is not empty, or cannot be written.
    """
    temporary = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is there already: choose another {spelled('output')} folder, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        yield temporary
        # mkdtemp makes private folders.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.replace(temporary, folder)
    except OSError as error:
        raise store_error(folder, error) from error
    except SafetensorError as error:
        # It names the operating system's error in its text alone.
        number = re.search(r"os error (\d+)", str(error))
        raise store_error(folder, OSError(int(number[1]) if number else 0, str(error))) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)

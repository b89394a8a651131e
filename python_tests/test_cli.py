import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from searching.tiny import FIELDS, make_model, make_pairs, make_task
from test_text import HOSTILE
from typer.testing import CliRunner, Result

from bench.records import make
from ticketops import cli, progress_view
from ticketops.cli import app
from ticketops.searching import SearchConfig, ShareConfig, ShareTrial, Store, TransferConfig, run
from ticketops.searching.sharing_plan import TaskTicket
from ticketops.tickets import Ticket

ROOT = Path(__file__).parents[1]


def flags(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120", "TERM": "dumb"})


def refused(result: Result, code: int, *words: str) -> None:
    """Checks that a command ended with one line on stderr that has these words, and no traceback."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line != "loading model and data"]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ticketops: error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fields of a search that takes seconds."""
    root: Path = tmp_path_factory.mktemp("tiny")
    return {"model": make_model(root / "model"), "task": make_task(root / "task"), **FIELDS}


@pytest.fixture(scope="module")
def searched(
    inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess]:
    """A search as a user runs it: in a process of its own."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = command("search", *flags(inputs), "--save-models", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(starter(*words), env=environment(), capture_output=True, text=True)


def starter(*words: str) -> list[str]:
    return [sys.executable, "-m", "ticketops", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def test_search_prints_plain_lines_the_table_and_the_report_and_nothing_else(searched: Any):
    folder, done = searched
    trials = [
        rf"\[{n}/4\] {name}-seed-0: accuracy \d+\.\d \(\d+ s\){', about .* left' * (n < 4)}"
        for n, name in enumerate(("full", r"winning-0\.25", r"winning-0\.5", r"random-0\.5"), 1)
    ]
    errors = done.stderr.splitlines()
    assert errors[:2] == ["loading model and data", "4 trials"]
    assert len(errors) == 6
    for line, pattern in zip(errors[2:], trials, strict=True):
        assert re.fullmatch(pattern, line)
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["ticket", "sparsity"]
    assert [line.split()[0] for line in lines[1:5]] == ["full", "winning", "winning", "random"]
    assert lines[-2:] == [f"Report: {folder / 'report.md'}", f"In a browser: {folder / 'report.html'}"]
    assert (folder / "report.html").is_file()
    assert (folder / "report.md").is_file()
    assert (folder / "results.csv").is_file()


def test_report_writes_it_again(searched: Any):
    folder, _ = searched
    before = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    result = invoke("report", folder)
    assert result.exit_code == 0
    assert "winning" in result.stdout
    assert (folder / "report.md").read_text() == before


def test_show_prints_a_ticket(searched: Any):
    path = searched[0] / "tickets" / "winning-0.5-seed-0.safetensors"
    result = invoke("show", path)
    assert result.exit_code == 0
    assert str(Ticket.load(path)) in result.stdout
    assert "sparsity: 0.5" in result.stdout
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert shown["head_mask"] == Ticket.load(path).head_mask.tolist()
    assert (shown["heads_pruned"], shown["ffns_pruned"], shown["metadata"]["kind"]) == (4, 1, "winning")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "spearman"], ["--metric 'spearman' does not suit task task", "choose from accuracy, macro_f1"]),
        (["--metric", "python:mine"], ["--metric mine is an object in Python"]),
        (["--threshold", "0.3"], ["--threshold 0.3 is for labels of a multi-label task"]),
        (["--class-weights", "1,2,3"], ["--class-weights has 3 numbers", "2 labels (0, 1)"]),
        (["--warmup-steps", "1.5"], ["--warmup-steps 1.5 is neither a whole number"]),
        (["--lr-scheduler-type", "step"], ["--lr-scheduler-type 'step' is unknown", "cosine"]),
        (["--early-stopping-patience", "1", "--importance", "both"], ["--early-stopping-patience keeps the best one"]),
    ],
)
def test_wrong_options_of_training_are_one_line(inputs: dict[str, Any], tmp_path: Path, options: list, words: list):
    result = invoke("search", *flags({**inputs, "output": tmp_path / "run"}), *options)
    refused(result, 2, *words)
    assert not (tmp_path / "run").exists()


def test_doctor_says_what_would_run_and_why():
    result = invoke("doctor")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "threads", "attention", "backend", "why"):
        assert word in result.stdout
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert {"op", "device", "dtype", "backend", "why"} <= facts["backends"][0].keys()
    assert facts["machine"]["threads"] >= 1


@pytest.mark.parametrize(("wanted", "words"), [("native", "native is out: "), ("triton", "triton is out: ")])
def test_doctor_explains_a_backend_that_cannot_run_everything(wanted: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", wanted)
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    # No compiled backend has kernels for it.
    row = next(row for row in facts["backends"] if (row["op"], row["dtype"]) == ("attention", "float64"))
    assert row["backend"] == "none"
    assert f"TICKETOPS_BACKEND={wanted}" in row["why"]
    assert words in row["why"]


def test_doctor_refuses_a_backend_that_there_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", "nonsense")
    refused(invoke("doctor"), 2, "TICKETOPS_BACKEND=nonsense is not supported here: use auto, native,")


def test_doctor_says_how_a_model_is_served(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    result = invoke("doctor", "--model", str(tmp_path))
    assert result.exit_code == 0
    for word in ("BertForMaskedLM", "head size", "gelu", "attention", "backend", "why"):
        assert word in result.stdout
    facts = json.loads(invoke("doctor", "--model", str(tmp_path), "--json").stdout)
    assert (facts["supported"], facts["layers"], facts["heads"], facts["neurons"]) == (True, 12, 12, 3072)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model_type": "roformer"}', "rotary position embeddings"),
        ("{", "truncated or damaged"),
        ('{"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}', "custom code"),
        (None, "no config.json"),
    ],
)
def test_doctor_says_in_one_line_why_a_model_is_not_served(content: str | None, words: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    result = invoke("doctor", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    if "roformer" in (content or ""):
        result = invoke("doctor", "--model", str(tmp_path), "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["supported"] is False


def test_help_names_every_field_with_its_default_and_does_not_wait_for_torch():
    result = invoke("search", "--help")
    assert result.exit_code == 0
    for field in SearchConfig.__dataclass_fields__.values():
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    assert "0.1,0.3,0.5" in result.stdout
    code = "import sys, ticketops.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_reading_a_run_waits_only_for_what_it_needs(tmp_path: Path):
    # A run without tickets needs no torch, and none needs models or the compiler.
    assert make(tmp_path, seeds=2) == 20
    heavy = {"torch", "transformers", "datasets", "sklearn", "pandas", "scipy.stats", "scipy.optimize"}
    code = f"import sys, ticketops; ticketops.report({str(tmp_path)!r}); print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    Ticket.full(6, 12).save(tmp_path / "tickets" / "winning-0.1-seed-0.safetensors")
    code = code.replace(str(heavy), str(heavy - {"torch"} | {"torch._dynamo"}))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_yaml_equals_the_flags(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[SearchConfig] = []

    def remember(config: SearchConfig, **_: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("ticketops.api.search", remember)
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({name: str(value) for name, value in inputs.items()} | {"save-models": True}))
    invoke("search", *flags(inputs), "--save-models")
    invoke("search", "--config", path)
    invoke("search", "--config", path, "--epochs", 5, "--no-save-models")
    assert seen[0] == seen[1]
    assert (seen[2].epochs, seen[2].save_models) == (5, False)
    path.write_text("epoch: 3\n")
    refused(invoke("search", "--config", path), 2, "'epoch'", "'epochs'")


def test_without_arguments_the_demo_is_searched(monkeypatch: pytest.MonkeyPatch):
    seen: list[SearchConfig] = []
    monkeypatch.setattr("ticketops.api.search", lambda config, **_: seen.append(config))
    invoke("search")
    assert (seen[0].model, seen[0].task, seen[0].recipe) == ("demo", "demo", "demo")


def test_columns_of_negative_numbers_are_aligned_as_numbers(capsys: pytest.CaptureFixture):
    cli._print_table([["kind", "score"], ["full", "-17.5"], ["random", "2.7"]])
    assert "random    2.7" in capsys.readouterr().out


def test_names_with_brackets_and_colons_are_printed_as_they_are(searched: Any, tmp_path: Path, capsys: Any):
    name = "br [/x] [bold]y :smile:"
    folder = shutil.copytree(searched[0], tmp_path / name)
    result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    assert f"{name}/report.md" in result.stdout
    cli._print_table([["task", name], ["[red]z", "1"]])
    out = capsys.readouterr().out
    assert name in out
    assert "[red]z" in out
    console = progress_view.new_console(file=io.StringIO(), force_terminal=True)
    with progress_view.progress(console) as bars:
        bars.planned([ShareTrial("plain", 0)], [])
        bars.started(TaskTicket(name, 0))
        bars.progress.refresh()
    assert name in console.file.getvalue()


def test_dry_run_prints_the_plan_and_touches_nothing(inputs: dict[str, Any], tmp_path: Path):
    result = invoke("search", *flags(inputs), "--seeds", 3, "--output", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0
    assert "12 trials of 6 steps, 72 in all" in result.stdout
    assert "no model kept" in result.stdout
    assert re.search(r"winning +0\.5 +4 +1 ", result.stdout)
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_share_counts_its_searches_and_arms(tiny: dict[str, Any], tmp_path: Path):
    data, run = tiny["model"].parent, tmp_path / "run"
    words = flags({**tiny, "tasks": f"{data / 'good'},{data / 'score'}", "output": run, "seeds": 2})
    result = invoke("share", *words, "--dry-run", "--save-models")
    assert result.exit_code == 0, result.output
    # 32 rows of each task in batches of 16; two seeds of two searches of two trials and of three arms.
    for name in (r"good: full +0 +0 +0 ", r"score: winning +0\.5 +4 +1 "):
        assert re.search(name + r"+[\d.]+ +[\d.]+ +32 +2 +2$", result.stdout, re.MULTILINE)
    for arm in ("tickets", "plain", "random"):
        assert re.search(rf"shared: {arm} +(– +){{5}}64 +4 +2$", result.stdout, re.MULTILINE)
    assert "14 trials of 40 steps in all, batch 16" in result.stdout
    assert "6 models kept" in result.stdout
    assert not run.exists()
    Ticket(torch.tensor([[1, 1, 1, 0]] * 2).bool(), torch.tensor([True, False])).save(tmp_path / "t.safetensors")
    tickets = ",".join(f"{name}={tmp_path / 't.safetensors'}" for name in ("good", "score"))
    result = invoke("share", *words, "--dry-run", "--tickets", tickets)
    assert "6 trials of 4 steps, 24 in all" in result.stdout
    assert "score: the ticket of seed 1 prunes 2 heads and 1 FFN" in result.stdout


def test_dry_run_of_a_transfer_counts_its_search_and_both_ladders(tiny: dict[str, Any], tmp_path: Path):
    data, run = tiny["model"].parent, tmp_path / "run"
    words = flags({**tiny, "source": data / "good", "target": data / "score", "head": "fresh", "output": run})
    result = invoke("transfer", *words, "--fractions", "0.25,1", "--min-steps", 3, "--dry-run")
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines() if ":" in line]
    assert [(*row[:3], *row[-3:]) for row in table if row[0] == "target," and row[2] == "%:"] == [
        ("target,", "25", "%:", "8", "3", "1"),
        ("target,", "25", "%:", "8", "3", "1"),
        ("target,", "100", "%:", "32", "4", "1"),
        ("target,", "100", "%:", "32", "4", "1"),
    ]
    assert re.search(r"source, 25 %: winning +0\.5 +4 +1 .* 8 +3 +1$", result.stdout, re.MULTILINE)
    assert "8 trials of 24 steps in all" in result.stdout
    # The source's models, which the target starts from.
    assert "2 models kept" in result.stdout
    assert not run.exists()


def test_a_dry_run_refuses_an_output_that_the_run_would_refuse(tiny: dict[str, Any], tmp_path: Path):
    data, run = tiny["model"].parent, tmp_path / "run"
    tasks = {
        "search": {"task": data / "good"},
        "share": {"tasks": f"{data / 'good'},{data / 'score'}"},
        "transfer": {"source": data / "good", "target": data / "score", "head": "fresh", "fractions": 1},
    }
    dry = lambda verb: invoke(verb, *flags({**tiny, **tasks[verb], "output": run}), "--dry-run")  # noqa: E731
    run.mkdir()
    assert [dry(verb).exit_code for verb in tasks] == [0, 0, 0]
    (run / "notes.txt").touch()
    for verb in tasks:
        refused(dry(verb), 1, "notes.txt", "is no ticketops folder")
    (run / "notes.txt").rename(tmp_path / "notes.txt")
    identity = {"task_fingerprint": "", "model_fingerprint": "", "layers": 2, "heads": 4}
    Store.create(run, {**identity, "config": {"task": "rte", "sparsities": [0.5]}}, {"versions": {}, "machine": {}})
    before = (run / "config.json").read_bytes()
    refused(dry("search"), 1, "holds another search")
    for verb in ("share", "transfer"):
        refused(dry(verb), 1, "holds the results of ticketops search")
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_levels_that_no_search_has_are_refused_before_a_folder_is_made(tiny: dict[str, Any], tmp_path: Path, dry: Any):
    data = tiny["model"].parent
    for verb, tasks in (
        ("share", {"tasks": f"{data / 'good'},{data / 'score'}"}),
        ("transfer", {"source": data / "good", "target": data / "good", "fractions": 1}),
    ):
        words = flags({**tiny, **tasks, "output": tmp_path / "run", "sparsities": "0.01"})
        refused(invoke(verb, *words, *dry), 2, "sparsity 0.01 prunes nothing")
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line_with_the_remedy(inputs: dict[str, Any], tmp_path: Path):
    def search(**fields: Any) -> Result:
        return invoke("search", *flags({**inputs, "output": tmp_path / "run", **fields}))

    refused(search(sparsities="0.1,1.2"), 2, "1.2", "[0, 1)")
    refused(search(kinds="lucky"), 2, "lucky", "winning, random, losing")
    refused(search(model=tmp_path / "nowhere"), 2, "nowhere", "local folder")
    refused(search(task="no-such-task"), 2, "no-such-task", "sst2")
    refused(search(max_length=1000), 2, "--max-length 1000")
    refused(search(sparsities="0.01"), 2, "prunes nothing")
    (tmp_path / "empty.jsonl").write_text("")
    refused(search(task=tmp_path / "empty.jsonl"), 2, "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", ')
    refused(search(task=tmp_path / "bad.jsonl"), 2, "bad.jsonl")
    (tmp_path / "one.jsonl").write_text("".join(f'{{"text": "good {n}", "label": 1}}\n' for n in range(99)))
    refused(search(task=tmp_path / "one.jsonl"), 2, "label")
    assert not (tmp_path / "run").exists()
    assert search(epochs="many").exit_code == 2
    refused(invoke("report", tmp_path), 2, "no ticketops folder")
    refused(invoke("show", tmp_path / "none.safetensors"), 2, "none.safetensors")


def test_an_unusable_output_folder_is_one_line(searched: Any, inputs: dict[str, Any], tmp_path: Path):
    folder, _ = searched
    records = Store.read(folder).records()
    other = invoke("search", *flags({**inputs, "epochs": 3, "output": folder}))
    refused(other, 1, "another search", "epochs is 2 there and 3 here")
    record = folder / "trials" / "random-0.5-seed-0.json"
    whole = record.read_text()
    record.write_text(whole[:40])
    refused(invoke("search", *flags({**inputs, "output": folder})), 1, str(record), "delete it")
    record.write_text(whole)
    ticket = folder / "tickets" / "random-0.5-seed-0.safetensors"
    content = ticket.read_bytes()
    ticket.write_bytes(content[:40])
    refused(invoke("search", *flags({**inputs, "output": folder})), 1, str(ticket), "delete it")
    refused(invoke("show", ticket), 2, str(ticket))
    ticket.write_bytes(content)
    assert Store.read(folder).records() == records
    (tmp_path / "file").write_text("")
    refused(invoke("search", *flags({**inputs, "output": tmp_path / "file"})), 1, str(tmp_path / "file"))


def test_an_unreachable_hub_is_said_at_once(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    refused(
        invoke("search", *flags({**inputs, "model": "someone/bert-nowhere"})), 2, "cannot be reached", "local folder"
    )


def test_an_unexpected_error_is_one_line_and_its_traceback_is_an_option(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nin two lines")

    monkeypatch.setattr(run, "search_jobs", fail)
    words = ["search", *flags({**inputs, "output": tmp_path / "run"})]
    result = invoke(*words)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "ticketops: error: unexpected RuntimeError: out of memory in two lines: run again with --traceback to see where"
    )
    traced = invoke(*words, "--traceback")
    assert isinstance(traced.exception, RuntimeError)


def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_finished(inputs: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "run"
    words = ["search", *flags({**inputs, "output": folder, "seeds": 20})]
    process = subprocess.Popen(
        starter(*words),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in a shell's background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[2/"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    # Compared first, since they say more than a number.
    assert rest.splitlines()[-1:] == ["Interrupted. Finished trials are kept: run the same command again to go on."]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert len(Store.read(folder).records()) >= 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "--epochs", "x"], "--epochs"),
        (["search", "--epoch", "3"], "--epochs"),
        (["find"], "No such command 'find'"),
        (["show"], "Missing argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ticketops", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ticketops: error: ")
    assert said in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields that share and transfer have in common, for seconds."""
    root: Path = tmp_path_factory.mktemp("tiny")
    make_task(root / "good")
    make_pairs(root / "score")
    fields = {name: value for name, value in FIELDS.items() if name != "kinds"}
    return {**fields, "model": make_model(root / "model"), "sparsities": "0.5", "epochs": 1, "train_rows": 32}


def test_share_prints_its_table_is_reported_again_and_a_task_is_exported(tiny: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "run"
    data = tiny["model"].parent
    fields = {**tiny, "tasks": f"{data / 'good'},{data / 'score'}", "arms": "tickets,plain", "output": folder}
    result = invoke("share", *flags(fields), "--save-models")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[1] == "6 trials"
    assert re.fullmatch(r"\[1/6\] good full-seed-0: accuracy \d+\.\d \(\d+ s\), about .* left", lines[2])
    assert re.fullmatch(r"\[6/6\] plain-seed-0: task average -?\d+\.\d \(\d+ s\)", lines[7])
    for word in ("shared, each task its ticket", "one model a task, full", "Ticket sharing averages", "report.md"):
        assert word in result.stdout
    before = (folder / "report.md").read_text()
    again = invoke("report", folder)
    assert again.exit_code == 0
    assert (folder / "report.md").read_text() == before
    assert invoke("export", folder, "--task", "score", "--output", tmp_path / "small").exit_code == 0
    assert invoke("show", tmp_path / "small").exit_code == 0
    refused(invoke("export", folder, "--output", tmp_path / "none"), 2, "name one of its tasks", "--task good")
    refused(invoke("share", *flags({**fields, "mixing": "uniform"})), 1, "another share", "mixing is")
    refused(
        invoke("search", *flags({**tiny, "task": data / "good", "output": folder})), 1, "results of ticketops share"
    )


def test_bad_input_to_share_and_transfer_is_one_line_before_any_training(tiny: dict[str, Any], tmp_path: Path):
    data = tiny["model"].parent
    good, score = data / "good", data / "score"

    def share(**fields: Any) -> Result:
        return invoke("share", *flags({**tiny, "tasks": f"{good},{score}", "output": tmp_path / "run", **fields}))

    def transfer(**fields: Any) -> Result:
        fields = {"source": good, "target": good, "output": tmp_path / "run", **fields}
        return invoke("transfer", *flags({**tiny, **fields}))

    refused(share(tasks=good), 2, "alone: use ticketops search")
    refused(share(mixing="random"), 2, "mixing 'random' is unknown", "annealed")
    refused(share(tasks=f"{good},{good}"), 2, "both called good", "rename")
    refused(share(tasks=f"{good},no-such-task"), 2, "no-such-task")
    Ticket.full(12, 12).save(tmp_path / "wide.safetensors")
    refused(share(tickets=f"good={tmp_path / 'wide.safetensors'}"), 2, "12 layers x 12 heads", "2 layers x 4 heads")
    refused(transfer(target=score), 2, "--head fresh")
    refused(transfer(fractions="0.001"), 2, "0.1 % of the 32 training rows", "--fractions from")
    refused(transfer(fractions="2"), 2, "outside (0, 1]")
    refused(invoke("transfer", "--target", good), 2, "source None")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("verb", "kind"), [("share", ShareConfig), ("transfer", TransferConfig)])
def test_help_of_share_and_transfer_names_every_field(verb: str, kind: Any):
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    for field in kind.__dataclass_fields__.values():
        assert f"--{field.name.replace('_', '-')}" in result.stdout


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_files_do_not_control_the_terminal(name: str, tmp_path: Path):
    path = tmp_path / "ticket.safetensors"
    Ticket.full(2, 4).described({"task": name.encode(errors="replace").decode()}).save(path)
    shown = invoke("show", path)
    assert shown.exit_code == 0
    refused_ = invoke("search", "--task", name.replace("\0", ""), "--output", tmp_path / "run")
    assert refused_.exit_code == 2
    for text in (shown.output, refused_.output):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert refused_.stderr.count("\n") == 2

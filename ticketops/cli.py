"""The command line. Only help and arguments are handled before torch is imported."""

import contextlib
import dataclasses
import gc
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ticketops.errors import InputError, TicketopsError, TrialError, UnsupportedError, as_flag, spelling
from ticketops.files import user_path
from ticketops.launch import follows
from ticketops.progress_view import new_console, progress
from ticketops.searching.config import Config, nearest
from ticketops.searching.plan import SearchConfig
from ticketops.searching.sharing_plan import ShareConfig
from ticketops.searching.transfer_plan import TransferConfig
from ticketops.text import count, duration, printable

if TYPE_CHECKING:
    from ticketops.tickets import Ticket

app = typer.Typer(
    help="Finds super tickets: sub-networks of a pre-trained encoder that fine-tune better than all of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Trace = Annotated[
    bool,
    typer.Option(
        "--traceback", envvar="TICKETOPS_TRACEBACK", help="Show where an error comes from.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.", show_default=False)]


def main() -> None:
    """The console entry point."""
    try:
        code = app(prog_name="ticketops", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # A wrong flag or value is click's exception, whose home has moved between versions of typer.
        if not hasattr(error, "format_message"):
            raise
        wrong: Any = error
        message = " ".join(error.format_message().split())
        if type(error).__name__ == "NoSuchOption":
            near = nearest(wrong.option_name.strip("-"), [str(option.name) for option in wrong.ctx.command.params])
            message = f"there is no flag {wrong.option_name}" + (f": did you mean {as_flag(near)}?" if near else "")
        if message:
            _say(f"ticketops: error: {message.rstrip('.')}; see ticketops --help", err=True)
        else:
            # No arguments at all: the help is the answer.
            wrong.show()
        sys.exit(2)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from ticketops import __version__

        typer.echo(f"ticketops {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.", show_default=False)
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file whose keys are these flags; flags win over it.", rich_help_panel="What"),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Load and check everything, print the trials, and stop.",
        show_default=False,
        rich_help_panel="What",
    ),
]
_KEPT = "Finished trials are kept: run the same command again to go on."


def _flag(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    """The flag of a configuration field; None by default, so that values of the file and the recipe apply."""
    flag = f"--{field.name.replace('_', '-')}"
    kind: Any = field.metadata["flag_type"]
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag,
        help=f"{field.metadata['help']} \\[default: {field.metadata['shown']}]",
        show_default=False,
        rich_help_panel=field.metadata["group"],
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _configured(kind: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function: the configuration's fields become its flags, so that flags, YAML keys and the
    configuration cannot drift apart."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        flags = [_flag(field) for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        function.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in [*flags, *own]}
        app.command(kind.verb)(function)
        return function

    return register


def _settings(kind: type[Any], config: Path | None, flags: dict[str, Any]) -> Any:
    chosen = {name: value for name, value in flags.items() if value is not None}
    return kind.from_yaml(config, **chosen) if config else kind.from_dict(chosen)


@_configured(SearchConfig)
def _search(
    config: ConfigFile = None,
    dry_run: DryRun = False,
    traceback: Trace = False,
    **flags: Any,
) -> None:
    """Fine-tune, score, prune, rewind, retrain, select, report; the same command resumes what was interrupted.

    Without arguments it searches the demo: MiniLM on movie-review sentences, in minutes on a processor.
    """
    with _errors(traceback, _KEPT):
        settings = _settings(SearchConfig, config, flags)
        if dry_run:
            _print_outlook(settings)
            return
        with progress() as listener:
            from ticketops.api import search

            result = search(settings, listener=listener)
        _print_result(result)


@_configured(ShareConfig)
def _share(config: ConfigFile = None, dry_run: DryRun = False, traceback: Trace = False, **flags: Any) -> None:
    """Train several tasks on one encoder, each on its own ticket, and compare; the same command resumes.

    A batch of a task runs, and trains, that task's ticket alone. What it is compared with comes from the same command.
    """
    with _errors(traceback, _KEPT):
        settings = _settings(ShareConfig, config, flags)
        if dry_run:
            _print_outlook(settings)
            return
        with progress() as listener:
            from ticketops.api import share

            result = share(settings, listener=listener)
        _print_result(result)


@_configured(TransferConfig)
def _transfer(config: ConfigFile = None, dry_run: DryRun = False, traceback: Trace = False, **flags: Any) -> None:
    """Adapt a fine-tuned source model to shares of a target task, super ticket against full model; resumes.

    The same shares of the source task's own rows show what tickets are worth where data is scarce.
    """
    with _errors(traceback, _KEPT):
        settings = _settings(TransferConfig, config, flags)
        if dry_run:
            _print_outlook(settings)
            return
        with progress() as listener:
            from ticketops.api import transfer

            result = transfer(settings, listener=listener)
        _print_result(result)


def _print_result(result: Any) -> None:
    """Prints the table, the finding and its warnings, and where the report is."""
    _print_table(result.table)
    for finding in result.findings:
        _say(finding)
    _print_report(result.report_path)
    if failures := result.failures:
        count = f"{len(failures)} trial{'s' if len(failures) > 1 else ''}"
        first = f"{failures[0]['id']}: {failures[0]['error']}"
        raise TrialError(f"{count} failed, the first {first}; the same command tries again")


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Switches Python's garbage collector off: it would visit the records of a large run again and again, and free
    nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _print_report(path: Path) -> None:
    _say(f"Report: {path}")
    _say(f"In a browser: {path.with_suffix('.html')}")


def _say(line: str, err: bool = False) -> None:
    """Prints a line of text that may hold names from files: nothing in it controls the terminal.

    Of processes that train together the first one speaks."""
    if not follows():
        typer.echo(printable(line), err=err)


@app.command("report")
def _report(
    folder: Annotated[
        Path, typer.Argument(help="The --output folder of a search, share or transfer, finished or not.")
    ],
    traceback: Trace = False,
) -> None:
    """Write the report of a search, share or transfer again: report.md, report.html, results.csv, the figures."""
    with _errors(traceback), _without_collections():
        from ticketops.reporting import write_report

        found, path = write_report(folder)
        _print_table(found.table)
        _print_report(path)


@app.command("status")
def _status(
    folder: Annotated[Path, typer.Argument(help="The --output folder of a search, share or transfer.")],
    as_json: Json = False,
    traceback: Trace = False,
) -> None:
    """Print how far a run is: finished, failed and missing trials, and an estimate of the time that is left."""
    with _errors(traceback), _without_collections():
        from ticketops.searching.progress import status

        found = status(folder)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found)))
            return
        trials = len(found.finished) + len(found.failed) + len(found.left)
        done = f"{len(found.finished)} of {count(trials, 'trial')} finished, in {duration(found.seconds)}"
        rest = "" if not found.seconds_left else f", about {duration(found.seconds_left)} left"
        working = f"{count(len(found.running), 'trial')} running" if found.running else "no process is working there"
        _say(f"{found.kind}: {done}{rest}; {working}")
        for name, where in found.running.items():
            _say(f"running: {name}: {where}")
        for name, error in found.failed.items():
            _say(f"failed: {name}: {error}")
        for name in found.left:
            if name not in found.running:
                _say(f"missing: {name}")


@app.command("verify")
def _verify(
    folder: Annotated[Path, typer.Argument(help="The --output folder of a search, share or transfer.")],
    traceback: Trace = False,
) -> None:
    """Compare every file of a run with its checksum; exit code 1 if one is damaged or missing."""
    with _errors(traceback):
        from ticketops.searching.progress import status, verify

        damaged = verify(folder)
        for line in damaged:
            _say(line)
        if damaged:
            raise typer.Exit(1)
        _say(f"the files of {count(len(status(folder).finished), 'finished trial')} are whole")


class Format(StrEnum):
    """The formats of an export."""

    compact = "compact"
    dense = "dense"
    onnx = "onnx"


@app.command("export")
def _export(
    source: Annotated[
        Path, typer.Argument(help="A run's --output folder (made with --save-models), or a model's folder.")
    ],
    output: Annotated[Path, typer.Option("--output", help="The folder to make.")],
    format: Annotated[
        Format,
        typer.Option(help="compact: true shapes; dense: zeros, for plain transformers; onnx: for onnxruntime."),
    ] = Format.compact,
    ticket: Annotated[
        Path | None,
        typer.Option(help="What to keep of a model's folder. \\[default: its ticket.safetensors]", show_default=False),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option(
            help="Which trial of a run. \\[default: the super ticket's, or tickets', with the best score]",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Which task of a share, or of a shared model's folder.", show_default=False)
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Upload the folder to this repository of the Hugging Face hub, too.", show_default=False),
    ] = None,
    traceback: Trace = False,
) -> None:
    """Write a small model that others can load; it is read back and verified before the folder appears."""
    with _errors(traceback):
        from ticketops.searching.release import release

        path = release(source, output, format.value, ticket=ticket, trial=trial, task=task, push_to_hub=push_to_hub)
        _say(f"{path}: verified, {sum(file.stat().st_size for file in path.iterdir()):,} bytes")


@app.command("show")
def _show(
    ticket: Annotated[Path, typer.Argument(help="A ticket's .safetensors file, or a model's folder.")],
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Time the full and the pruned model by batch size and length; takes seconds to minutes.",
            show_default=False,
        ),
    ] = False,
    as_json: Json = False,
    traceback: Trace = False,
) -> None:
    """Print a ticket: what it keeps, where it comes from; of a model's folder also what that costs."""
    with _errors(traceback):
        from ticketops.tickets import Ticket

        ticket = user_path(ticket, "the path")
        costs: dict[str, Any] = {}
        if ticket.is_dir():
            found, costs = _model_ticket(ticket, latency)
        elif latency:
            raise InputError(f"--latency times a model, and {ticket} is a ticket: give a model's folder")
        else:
            found = Ticket.load(ticket)
        if as_json:
            names = ("num_layers", "num_heads", "heads_pruned", "ffns_pruned", "neurons_pruned")
            masks = {"head_mask": found.head_mask, "ffn_mask": found.ffn_mask, "neuron_mask": found.neuron_mask}
            shown = {name: getattr(found, name) for name in names}
            shown |= {name: None if mask is None else mask.tolist() for name, mask in masks.items()}
            typer.echo(json.dumps({**shown, "metadata": dict(found.metadata), **costs}))
            return
        typer.echo(str(found))
        for name, value in found.metadata.items():
            _say(f"{name}: {value}")
        if costs:
            from ticketops.reporting.tables import cost_rows

            _print_table(cost_rows(costs["costs"], costs.get("latencies", ())))


def _model_ticket(folder: Path, timed: bool) -> tuple["Ticket", dict[str, Any]]:
    """What a model's folder still has, and what that costs."""
    from ticketops.models import costs, expand, latencies, load, patch
    from ticketops.models.record import held_ticket
    from ticketops.searching.setting import quiet
    from ticketops.tickets import Ticket

    with quiet():
        model = load(folder)
        whole, left = costs(model)
        found: dict[str, Any] = {"costs": {"whole": dataclasses.asdict(whole), "left": dataclasses.asdict(left)}}
        if timed:
            full = expand(model)
            patch(full)
            patch(model)
            found["latencies"] = latencies(full, model)
    path = folder / "ticket.safetensors"
    return Ticket.load(path) if path.is_file() else held_ticket(model.base_model.config), found


@app.command("doctor")
def _doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile the Triton kernels for sm_80, sm_90 and sm_100 (minutes; needs no GPU) and print their "
            "registers and memory, and those of the CUDA kernels that are built.",
            show_default=False,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Say whether and how this model is supported: a folder, a name on the Hugging Face hub, or demo; only "
            "its configuration is loaded.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="With --model: a branch, tag or commit of it on the Hugging Face hub.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With --kernels: also write the table of Triton kernels to this folder, as JSON and Markdown.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    traceback: Trace = False,
) -> None:
    """Print versions, device, and which backend would run each op and why; or the same for one model."""
    with _errors(traceback):
        if output is not None and not kernels:
            raise InputError("--output keeps the kernels' table: add --kernels")
        if model is not None:
            _print_support(model, revision, as_json)
            return
        if revision is not None:
            raise InputError("--revision is of a model: add --model")
        if kernels:
            _print_kernels(as_json, output)
            return
        from ticketops.inspection import installation

        found = dataclasses.asdict(installation())
        if as_json:
            typer.echo(json.dumps(found))
            return
        for name, value in {**found["versions"], **found["machine"], **found["built"]}.items():
            typer.echo(f"{name:<18} {'none' if value is None else value}")
        _print_backends(found["backends"])


def _print_backends(rows: list[dict[str, str]]) -> None:
    titles = ["op", "device", "dtype", "backend", "why"]
    _print_table([titles, *([row[title] for title in titles] for row in rows)])


def _print_support(model: str, revision: str | None, as_json: bool) -> None:
    """Prints how a model would be served; UnsupportedError says why it would not."""
    from ticketops.models import describe
    from ticketops.searching.setting import load_config, quiet

    try:
        with quiet():
            facts = describe(load_config(model, revision))
    except UnsupportedError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"model": model, "supported": False, "why": str(error)}))
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps({"model": model, "supported": True} | facts))
        return
    rows = facts.pop("backends")
    for name, value in ({"model": model, "supported": "yes"} | facts).items():
        _say(f"{name.replace('_', ' '):<18} {value}")
    _print_backends(rows)


def _print_kernels(as_json: bool, output: Path | None) -> None:
    from ticketops.inspection.cuda_report import cuda_table

    try:
        from ticketops.inspection.kernel_report import kernel_table, write_table
    except ModuleNotFoundError as missing:
        raise UnsupportedError(f"--kernels needs {missing.name}: pip install {missing.name}") from missing
    try:
        built, why = cuda_table(), None
    except UnsupportedError as missing:
        built, why = [], str(missing)
    rows = kernel_table(lambda what: typer.echo(f"compiling {what}", err=True))
    if output is not None:
        write_table(rows, user_path(output, "--output"))
    if as_json:
        typer.echo(json.dumps({"kernels": rows, "cuda_kernels": built, "cuda_kernels_missing": why}))
        return
    for table in filter(None, (rows, built)):
        titles = [name for name in table[0] if name != "digest"]
        _print_table([titles, *([str(row[title]) for title in titles] for row in table)])
    if why is not None:
        typer.echo(f"no CUDA kernels: {why}")
    typer.echo("Compiled only: no number of this comes from a run on a GPU.")


@contextlib.contextmanager
def _errors(traceback: bool, interrupted: str = "") -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code: 2 bad input, 1 failure while running, 130 Ctrl-C."""
    try:
        with spelling(as_flag):
            yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {interrupted}".rstrip(), err=True)
        raise typer.Exit(130) from None
    # typer.Exit is a RuntimeError.
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if traceback:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, TicketopsError):
            message = f"unexpected {type(error).__name__}: {message}: run again with --traceback to see where"
        _say(f"ticketops: error: {message}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError | UnsupportedError) else 1) from error


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    console = new_console() if sys.stdout.isatty() else new_console(width=160)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for position, title in enumerate(rows[0]):
        numeric = len(rows) > 1 and position > 0 and rows[1][position].lstrip("-")[:1].isdigit()
        table.add_column(printable(title), justify="right" if numeric else "left")
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    console.print(table)


def _print_outlook(settings: Config) -> None:
    from ticketops.searching.outlook import outlook

    found = outlook(settings)
    _print_table(found.table)
    for line in found.lines:
        _say(line)

"""Readers of data files: CSV, TSV, JSON, JSON lines, Parquet, Arrow, and of data sets, saved or in memory.

A reader yields the requested columns in batches of rows. SQuAD's nested JSON is read as its questions, CoNLL files as
sentences with `tokens` and `ner_tags`. Text files may be compressed (.gz, .bz2, .xz). A .csv or .tsv
file may separate fields by commas, tabs, semicolons or bars: the header shows which. `_is_quoted` decides whether the
quotes in a tab-separated file follow RFC 4180 or belong to the texts, as in GLUE's own files.
"""

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ticketops.errors import InputError, spelled
from ticketops.files import read_json, text_encoding
from ticketops.text import count, repeated

#: Rows in a batch.
BATCH = 1_000
#: File that marks a folder written by `datasets.Dataset.save_to_disk`.
SAVED = "state.json"
# Bytes that it may have; it names every Arrow file.
_MOST_STATE = 2**26
# What ends an Arrow stream whose writer was not interrupted.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# A field quoted by RFC 4180: quotes inside are doubled.
_QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
# Columns of a CoNLL file.
_CONLL = ("tokens", "ner_tags")
# Columns of CoLA's own files, which have no header.
_COLA = ("source", "label", "annotation", "sentence")
# How files of other encodings begin; the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Without a mark they begin with a letter or a bracket, which has zeros beside it.
_ZEROS: Mapping[tuple[int, ...], str] = {
    (0, 1, 1, 1): "utf-32-le",
    (1, 1, 1, 0): "utf-32-be",
    (0, 1, 0, 1): "utf-16-le",
    (1, 0, 1, 0): "utf-16-be",
}
# How files begin that are no text, and what they are: the usual answer to an unreadable byte, another encoding, would
# make rows of them.
_NO_TEXT = {
    b"\x1f\x8b": "compressed by gzip: call it {}.gz",
    b"BZh": "compressed by bzip2: call it {}.bz2",
    b"\xfd7zXZ\0": "compressed by xz: call it {}.xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the sheet as CSV",
    b"PAR1": "a Parquet file: call it .parquet",
    b"ARROW1": "an Arrow file: call it .arrow",
}
_LFS_POINTER = b"version https://git-lfs."
_COMPRESSIONS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file.

    Attributes:
        numbers: for each row, the number of the line in which it ends, or the row's own number; both start at 1.
        columns: column name -> value of each row; None where the row has no value.
    """

    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Source:
    """An open file of rows.

    Attributes:
        path: the file, the folder of a saved data set, or what messages call a data set in memory.
        columns: names of all columns.
        read: function that takes column names and yields batches of these columns, from the first row on.
        unit: what `Batch.numbers` count: "line" or "row".
        typed: False if all values are text, as in CSV.
        classes: column name -> label names by id, for columns of labels or lists of labels that the file itself names.
        encoded: True if the file is text, so that an encoding applies.
        remark: how the file is read, if its extension does not say so; else empty.
    """

    path: Path
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[Batch]]
    unit: str = "row"
    typed: bool = True
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    encoded: bool = False
    remark: str = ""


def extension(path: Path) -> str:
    """The extension that names a file's format, such as `.csv` of `train.csv.gz`; empty for an unknown format.

    Args:
        path: the file.
    """
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in _COMPRESSIONS:
        return before if before in _TEXT_FORMATS else ""
    return last if last in FORMATS else ""


def bare_name(path: Path) -> str:
    """A file's name without the extensions of format and compression, such as `train` of `train.csv.gz`.

    Args:
        path: the file; unknown extensions stay in the name.
    """
    kind = extension(path)
    return path.name[: path.name.lower().rindex(kind)] if kind else path.name


def open_source(path: Path, encoding: str | None = None) -> Source:
    """Opens a file of rows, or the folder of a saved data set.

    Args:
        path: the file or folder.
        encoding: text encoding of a text file; UTF-8 by default.

    Returns:
        The open file. Its rows are read later, which raises the same errors.

    Raises:
        InputError: the path is not a file, cannot be read or decoded, is damaged, or has an unknown extension.
    """
    encoding = text_encoding(encoding or "utf-8").removesuffix("-sig")
    opener: Callable[[Path, str], Source] = _open_saved
    kind = ""
    if not path.is_dir():
        check_regular(path)
        kind = extension(path)
        if not kind:
            names = ", ".join(FORMATS)
            raise InputError(f"file {path} has an unknown extension: use one of {names}; text may be compressed (.gz)")
        opener = FORMATS[kind]
    with _refusing(path, encoding if kind in _TEXT_FORMATS else ""):
        if path.is_file():
            with path.open("rb") as stream:
                if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise InputError(f"file {path} is a pointer of Git LFS, without the rows: run git lfs pull")
        return opener(path, encoding)


def check_regular(path: Path) -> None:
    """Checks that a path is a regular file, so that reading it neither blocks nor runs without end.

    Args:
        path: the file.

    Raises:
        InputError: the path is a pipe, a socket, a device or a loop of links, or cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"file {path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise InputError(f"{path} is {kind}, not a file: write the rows to a file")


@contextlib.contextmanager
def _refusing(path: Path, encoding: str = "") -> Iterator[None]:
    """Turns the readers' exceptions on a damaged file into an InputError of one line; `encoding` is for text files."""
    try:
        yield
    except InputError:
        raise
    except UnicodeError as error:
        problem = _undecodable(path, encoding) if encoding else f"{path} is damaged ({error}): write it again"
        raise InputError(problem) from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InputError(f"file {path} is damaged, or not all of it is there ({error}): compress it again") from error
    except (pa.ArrowException, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged, or not what its name says ({reason}): write it again") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"file {path} cannot be read: {reason}") from error


def _undecodable(path: Path, encoding: str) -> str:
    problem = "somewhere"
    try:
        with _bytes(path) as stream:
            stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
    # The rest of a compressed file may be damaged as well.
    except (UnicodeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem = str(error)
    remedy = f"name its encoding, such as {spelled('encoding', 'latin-1')}"
    return f"file {path} is not {encoding.upper()} ({problem}): {remedy}"


def _bytes(path: Path) -> IO[bytes]:
    stream: IO[bytes] = _COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb")
    return stream


@contextlib.contextmanager
def _text(path: Path, encoding: str, newline: str) -> Iterator[IO[str]]:
    """Opens the file as text, behind its byte-order mark."""
    with _bytes(path) as raw:
        start = raw.read(6)
    for mark, what in _NO_TEXT.items():
        if start.startswith(mark):
            raise InputError(f"file {path} is {what.format(path.name)}")
    found = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")
    if found and not encoding.startswith(found):
        raise InputError(
            f"file {path} is not {encoding.upper()} (it starts with the mark of {found}): say "
            f"{spelled('encoding', found)}"
        )
    found = "" if found else _ZEROS.get(tuple(int(byte == 0) for byte in start[:4]), "")
    if found and encoding != found:
        raise InputError(f"file {path} is not {encoding.upper()} (it has zero bytes): say {spelled('encoding', found)}")
    opener: Callable[..., Any] = _COMPRESSIONS.get(path.suffix.lower(), open)
    with opener(path, "rt", encoding=encoding, newline=newline) as stream:
        if stream.read(1) != "\ufeff":
            stream.seek(0)
        yield stream


def _batched(rows: Iterable[tuple[int, Sequence[Any]]], columns: Sequence[str]) -> Iterator[Batch]:
    """Groups rows into batches; a row's values are in the order of `columns`."""
    for part in itertools.batched(rows, BATCH) if hasattr(itertools, "batched") else _chunks(rows):
        numbers, values = zip(*part, strict=True)
        yield Batch(numbers, dict(zip(columns, zip(*values, strict=True), strict=True)))


def _chunks(rows: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    rows = iter(rows)
    while part := tuple(itertools.islice(rows, BATCH)):
        yield part


# Delimited text.


def _open_delimited(path: Path, encoding: str) -> Source:
    usual = "\t" if extension(path) == ".tsv" else ","
    delimiter = _delimiter(path, encoding, usual)
    quoting = csv.QUOTE_MINIMAL
    remarks = [f"fields separated by {_DELIMITERS[delimiter]}"] if delimiter != usual else []
    if delimiter == "\t":
        if _is_quoted(path, encoding):
            remarks.append("quotes read as those of CSV")
        else:
            quoting = csv.QUOTE_NONE
    options = {"delimiter": delimiter, "quoting": quoting}
    _, header = next(_records(path, encoding, **options), (0, []))
    if any("\0" in name for name in header):
        raise InputError(f"file {path} has zero bytes in its header: write it again")
    headed = not (delimiter == "\t" and len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*"))
    if not headed:
        header = list(_COLA)
        remarks.append("no header: the columns of CoLA")
    named = [name.strip() for name in header]
    _check_columns(filter(None, named), path)

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        places = [named.index(column) for column in columns]

        def rows() -> Iterator[tuple[int, list[str | None]]]:
            records = _records(path, encoding, **options)
            for line, fields in itertools.islice(records, headed, None):
                if len(fields) != len(named):
                    hint = (
                        "a tab inside a text needs quotes"
                        if delimiter == "\t"
                        else "quote texts that hold a delimiter or a line break"
                    )
                    raise InputError(
                        f"{path}, line {line}: {len(fields)} fields where the header has {len(named)}: {hint}"
                    )
                found = [fields[place] or None for place in places]
                if any("\0" in value for value in found if value):
                    raise InputError(f"{path}, line {line}: a zero byte, as a crash leaves them: write the file again")
                yield line, found

        with _refusing(path, encoding):
            yield from _batched(rows(), columns)

    return Source(path, tuple(named), read, unit="line", typed=False, encoded=True, remark=", ".join(remarks))


def _check_columns(names: Iterable[str], path: Path) -> None:
    if (name := repeated(names)) is not None:
        raise InputError(f"file {path} has a column name twice ({name:.80}): rename one")


def _records(path: Path, encoding: str, **options: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields, for each record, the number of its last line and its fields; blank lines are skipped."""
    with _text(path, encoding, newline="") as stream:
        reader = csv.reader(stream, strict=True, **options)
        try:
            while True:
                # The csv module's limit is global to the process, and texts are longer than its default.
                limit = csv.field_size_limit(2**31 - 1)
                try:
                    records = [(reader.line_num, fields) for fields in itertools.islice(reader, BATCH)]
                finally:
                    csv.field_size_limit(limit)
                if not records:
                    return
                yield from (record for record in records if record[1])
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: malformed ({error}): repair the quotes") from error


def _delimiter(path: Path, encoding: str, usual: str) -> str:
    """Finds the delimiter: the one that divides the header or, of several, the first that fits every row as well.

    Args:
        path: the file.
        encoding: its text encoding.
        usual: the delimiter that the extension stands for; it is tried first.
    """
    dividing = []
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        with contextlib.suppress(InputError):
            _, header = next(_records(path, encoding, delimiter=delimiter, quoting=quoting), (0, []))
            if len(header) > 1:
                dividing.append((delimiter, quoting, len(header)))
    if len(dividing) > 1:
        for delimiter, quoting, width in dividing:
            with contextlib.suppress(InputError):
                records = _records(path, encoding, delimiter=delimiter, quoting=quoting)
                if all(len(fields) == width for _, fields in records):
                    return delimiter
    return dividing[0][0] if dividing else usual


def _is_quoted(path: Path, encoding: str) -> bool:
    """True if the quotes of a tab-separated file follow RFC 4180; False if they are part of its texts.

    If only one of the two readings gives every row as many fields as the header, that one is taken. If both do, the
    quotes are RFC 4180's where a quoted field has doubled quotes inside, or where every field of a column is quoted:
    only a program that quotes by the standard writes such files.

    Args:
        path: the file.
        encoding: its text encoding.

    Raises:
        InputError: some quotes are malformed, but for each of them at least ten fields are quoted by the standard.
    """
    marked = doubled = malformed = first_malformed = width = 0
    even = True
    # For each column: whether all its fields are quoted or empty, and how many are quoted.
    wholly: list[bool] = []
    counts: list[int] = []
    with _text(path, encoding, newline="") as stream:
        for number, line in enumerate(stream, start=1):
            fields = line.rstrip("\r\n").split("\t")
            if fields == [""]:
                continue
            even &= width in (0, len(fields))
            for place, entry in enumerate(fields):
                match = _QUOTED.fullmatch(entry)
                marked += entry.startswith('"')
                doubled += match is not None and '""' in match[1]
                if entry.startswith('"') and match is None:
                    malformed += 1
                    first_malformed = first_malformed or number
                if place < width:
                    wholly[place] &= match is not None or not entry
                    counts[place] += match is not None
            if not width:
                width = len(fields)
                wholly, counts = [True] * width, [0] * width
    if not marked:
        return False
    standard, across = _standard_reading(path, encoding)
    if standard and even:
        return not across and (doubled > 0 or any(map(all, zip(wholly, counts, strict=True))))
    if not standard and malformed and doubled >= 10 * malformed:
        raise InputError(f"{path}, line {first_malformed}: malformed quotes, in a file that quotes: repair them")
    return standard


def _standard_reading(path: Path, encoding: str) -> tuple[bool, bool]:
    """Reads a tab-separated file by RFC 4180.

    Returns:
        True if every row has as many fields as the header, and True if some field contains a tab or a line break.
    """
    width, across = 0, False
    try:
        for _, fields in _records(path, encoding, delimiter="\t"):
            width = width or len(fields)
            if len(fields) != width:
                return False, across
            across |= any("\t" in entry or "\n" in entry or "\r" in entry for entry in fields)
    except InputError:
        return False, across
    return True, across


# CoNLL.


def _open_conll(path: Path, encoding: str) -> Source:
    """Opens a file of one word a line, its tag last, with an empty line behind each sentence."""

    def rows() -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
        words: list[str] = []
        tags: list[str] = []
        number = width = 0
        with _text(path, encoding, newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                # Words may hold spaces in files that separate by tabs.
                fields = line.strip("\r\n ").split("\t") if "\t" in line else line.split()
                if not any(fields) or fields[0] == "-DOCSTART-":
                    if words:
                        yield number - 1, (words, tags)
                    words, tags = [], []
                    continue
                width = width or len(fields)
                if len(fields) != width or width < 2:
                    raise InputError(
                        f"{path}, line {number}: {count(len(fields), 'field')}, where a word and its tag belong, as in "
                        "the lines before: repair the line"
                    )
                words.append(fields[0])
                tags.append(fields[-1])
        if words:
            yield number, (words, tags)

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        places = [_CONLL.index(column) for column in columns]
        with _refusing(path, encoding):
            yield from _batched(((number, [row[place] for place in places]) for number, row in rows()), columns)

    columns = _CONLL if next(rows(), None) else ()
    return Source(path, columns, read, unit="line", encoded=True)


# JSON.


def _open_json(path: Path, encoding: str) -> Source:
    """Opens a JSON file under any of its extensions: an array of objects, one object per line, or pandas' formats."""
    with _text(path, encoding, newline="\n") as stream:
        lines = (line.lstrip() for line in stream if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if not first:
        return Source(path, (), lambda _: iter(()))
    if first.startswith("{") and second and (second.startswith("{") or _is_valid(first, path)):
        return _open_lines(path, encoding)
    with _text(path, encoding, newline="\n") as stream:
        rows = _rows_of(_parse(stream.read(), path), path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _no_object(row, f"{path}, row {number}")

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        values = ((number, [row.get(column) for column in columns]) for number, row in enumerate(rows, start=1))
        return _batched(values, columns)

    return Source(path, tuple(dict.fromkeys(column for row in rows for column in row)), read, encoded=True)


def _open_lines(path: Path, encoding: str) -> Source:
    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        # Inside JSON strings Unicode's other line separators may stand unescaped.
        with _text(path, encoding, newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = _parse(line, path, number)
                    if not isinstance(row, dict):
                        raise _no_object(row, f"{path}, line {number}")
                    yield number, row

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        with _refusing(path, encoding):
            yield from _batched(((number, [row.get(column) for column in columns]) for number, row in rows()), columns)

    columns = tuple(dict.fromkeys(column for _, row in rows() for column in row))
    return Source(path, columns, read, unit="line", encoded=True)


def _parse(content: str, path: Path, line: int | None = None) -> Any:
    try:
        return _JSON.decode(content)
    # Python raises ValueError for an integer of more than 4,300 digits.
    except (ValueError, RecursionError) as error:
        where = str(path) if line is None else f"{path}, line {line}"
        raise InputError(f"{where}: not valid JSON ({error}): repair or remove it") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (key := repeated(key for key, _ in pairs)) is not None:
        raise ValueError(f"the key {key!r:.80} is there twice")
    return dict(pairs)


# Shared, since making a decoder takes as long as decoding a row.
_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _is_valid(line: str, path: Path) -> bool:
    with contextlib.suppress(InputError):
        return bool(_parse(line, path))
    return False


def _no_object(value: Any, where: str) -> InputError:
    return InputError(f"{where}: a {type(value).__name__} where an object of columns belongs: repair the row")


def _rows_of(value: Any, path: Path) -> list[Any]:
    """The rows of a JSON file that is one value: an array of rows, or one of the layouts of pandas' `to_json`."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if value.keys() == {"schema", "data"}:
        return list(value["data"])
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        _check_columns(value["columns"], path)
        return [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    articles = value.get("data")
    if isinstance(articles, list) and all(isinstance(each, dict) and "paragraphs" in each for each in articles):
        return [
            {**question, "context": paragraph["context"]}
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    entries = list(value.values())
    if entries and all(isinstance(entry, list) for entry in entries):
        return [dict(zip(value, row, strict=True)) for row in zip(*entries, strict=True)]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        return [value]
    if any(entry.keys() != entries[0].keys() for entry in entries):
        raise InputError(f"{path}: one object of objects with different keys: write an array of rows")
    # pandas' orient "columns" is {column: {row: value}}, "index" is {row: {column: value}}; row keys are numbers.
    counted = [all(key.lstrip("-").isdigit() for key in keys) for keys in (value, entries[0])]
    if counted[0] == counted[1]:
        raise InputError(f"{path}: one object of objects, of which rows and columns look alike: write an array of rows")
    if counted[0]:
        return entries
    return [dict(zip(value, row, strict=True)) for row in zip(*(entry.values() for entry in entries), strict=True)]


# Columnar files.


def _open_parquet(path: Path, _: str) -> Source:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow

    def tables(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=list(columns))

    return _columnar(path, schema, tables)


def _open_arrow(path: Path, _: str) -> Source:
    """Opens an Arrow file in the random-access format (Feather) or the stream format (the cache of `datasets`)."""
    with path.open("rb") as stream:
        seekable = stream.read(6) == b"ARROW1"
        # A writer that was interrupted may leave whole batches, but not this.
        stream.seek(max(path.stat().st_size - len(_END_OF_STREAM), 0))
        if not seekable and stream.read() != _END_OF_STREAM:
            raise InputError(
                f"file {path} is damaged, or not all of it is there (an Arrow stream has an end): write it again"
            )

    def tables(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as mapped:
            if seekable:
                reader = pa.ipc.open_file(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = reader = pa.ipc.open_stream(mapped)
            for batch in batches:
                part = batch.select(list(columns))
                yield from (part.slice(start, BATCH) for start in range(0, part.num_rows, BATCH))

    with pa.memory_map(str(path)) as mapped:
        schema = (pa.ipc.open_file if seekable else pa.ipc.open_stream)(mapped).schema
    return _columnar(path, schema, tables)


def _open_saved(path: Path, _: str) -> Source:
    """Opens a folder written by `Dataset.save_to_disk`."""
    for entry in path.iterdir():
        if not entry.is_dir():
            check_regular(entry)
    state = read_json(path / SAVED, "save the data set again", _MOST_STATE)
    # Files elsewhere are none of this data set's.
    for name in [file["filename"] for file in state["_data_files"]]:
        if name != Path(name).name or not (path / name).is_file():
            raise InputError(f"{path / SAVED} lists the file {name:.80}, which is not in its folder: save it again")
    return open_rows(datasets.load_from_disk(str(path)), path)


def open_rows(rows: datasets.Dataset, path: Path) -> Source:
    """Opens a data set in memory.

    Args:
        rows: the data set; a format or transform of it is left aside.
        path: what messages call it.
    """

    def tables(columns: Sequence[str]) -> Iterator[pa.Table]:
        return rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH)

    return _columnar(path, rows.features.arrow_schema, tables)


def _columnar(path: Path, schema: pa.Schema, tables: Callable[[Sequence[str]], Iterable[Any]]) -> Source:
    def read(columns: Sequence[str]) -> Iterator[Batch]:
        start = 1
        with _refusing(path):
            for table in tables(columns):
                # Lengths and offsets in a damaged file may point outside its buffers.
                table.validate(full=True)
                found = {name: table.column(name).to_pylist() for name in columns}
                yield Batch(range(start, start + table.num_rows), found)
                start += table.num_rows

    _check_columns(schema.names, path)
    try:
        types = datasets.Features.from_arrow_schema(schema)
    # The schema's metadata may come from another library, with types that `datasets` does not know.
    except Exception:
        types = {}
    # Lists of them are the tags of words, or several labels of a text.
    types = {name: getattr(kind, "feature", kind) for name, kind in types.items()}
    classes = {
        name: tuple(map(str, kind.names)) for name, kind in types.items() if isinstance(kind, datasets.ClassLabel)
    }
    return Source(path, tuple(schema.names), read, classes=classes)


_TEXT_FORMATS: Mapping[str, Callable[[Path, str], Source]] = {
    ".jsonl": _open_json,
    ".ndjson": _open_json,
    ".json": _open_json,
    ".csv": _open_delimited,
    ".tsv": _open_delimited,
    **dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), _open_conll),
}
#: Extension -> function that takes a path and an encoding and opens the file.
FORMATS: Mapping[str, Callable[[Path, str], Source]] = {
    **_TEXT_FORMATS,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
}

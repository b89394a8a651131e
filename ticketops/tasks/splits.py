"""Finds the files of each split in a folder: by name, as shards or parts, in subfolders, or as saved data sets."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ticketops.errors import InputError
from ticketops.files import read_json
from ticketops.tasks.formats import SAVED, bare_name, check_regular, extension
from ticketops.text import some

#: Split -> accepted names of its files or its folder, the preferred name first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "validation_matched", "valid", "val", "dev", "dev_matched"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Shards on the hub: train-00000-of-00004, with a hash at the end in older data sets.
_SHARD = re.compile(r"[-_.](\d+)-of-(\d+)(?:-[0-9a-f]{8,})?$")
_PART = re.compile(r"\d+$")
_MARKER = re.compile(r"[-_.]?\d+$")
# Lists the splits of a folder that `datasets.DatasetDict.save_to_disk` has written.
_SAVED_SPLITS = "dataset_dict.json"
# Metadata files that `datasets` and the hub write beside the rows.
_DESCRIPTIONS = {_SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
# Levels of subfolders to search: 2 finds data/english/train.csv.
_DEPTH = 2


@dataclass(frozen=True)
class Layout:
    """The files of a task.

    Attributes:
        train: files of the training split, in the order of their rows; a file may be the folder of a saved data set.
        validation: files of the validation split; empty if it must be held out of the training rows.
        test: files of the test split; often empty.
        validation_name: name by which the validation files were found, such as `dev`.
        unread: names of the data files that belong to no split.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    validation_name: str = ""
    unread: tuple[str, ...] = ()


def find_splits(path: Path) -> Layout:
    """Finds the files of each split by their names, without opening them.

    Args:
        path: a file, the folder of a saved data set, or a folder with the files of the splits: directly, in one
            subfolder per split, or in a subfolder such as `data`, as in clones of the hub's data sets.

    Returns:
        The files of each split.

    Raises:
        InputError: there is no training split, several files could be the same split, or a shard is missing.
    """
    if not path.is_dir() or (path / SAVED).is_file():
        if (shard := _SHARD.search(bare_name(path))) and int(shard[2]) > 1:
            raise InputError(
                f"file {path} is one of {int(shard[2])} shards: give their folder, or rename it to use it alone"
            )
        return Layout((path,))
    layouts = _layouts(path, _DEPTH, {path.resolve()})
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    if layouts:
        names = some(folder.relative_to(path) for folder in layouts)
        raise InputError(
            f"folder {path} holds several data sets ({names}): give the folder of one, such as {next(iter(layouts))}"
        )
    found = some(entry.name for entry in _entries(path) if _is_data(entry)) or "no data files"
    raise InputError(
        f"folder {path} has no training split (found: {found}): call the file train.jsonl (or .csv, ...), or give the "
        "path of a single file"
    )


def name_splits(names: Iterable[str], task: str) -> Layout:
    """Finds the splits of a data set in memory by the same names as those of files.

    Args:
        names: names of its parts.
        task: its name, for error messages.

    Returns:
        The name of each split's part in place of files.

    Raises:
        InputError: there is no training split, or several parts could be the same split.
    """
    groups = {name.lower(): name for name in names}
    chosen = {split: groups.get(_choose(f"task {task}", split, groups), "") for split in SPLIT_NAMES}
    if not chosen["train"]:
        raise InputError(
            f"task {task} has no training split (found: {some(groups.values()) or 'nothing'}): call it train"
        )
    train, validation, test = ((Path(name),) if name else () for name in chosen.values())
    unread = tuple(name for name in groups.values() if name not in chosen.values())
    return Layout(train, validation, test, chosen["validation"], unread)


def _layouts(folder: Path, depth: int, seen: set[Path]) -> dict[Path, Layout]:
    """Folder -> its splits: of the folder itself or, if it has none, of its subfolders."""
    if (layout := _layout(folder)) is not None:
        return {folder: layout}
    found: dict[Path, Layout] = {}
    for entry in _entries(folder) if depth else ():
        # A link to a parent folder would be followed without end.
        if _is_folder(entry) and not (entry / SAVED).is_file() and (place := entry.resolve()) not in seen:
            seen.add(place)
            found |= _layouts(entry, depth - 1, seen)
    return found


def _layout(folder: Path) -> Layout | None:
    """The splits in a folder; None if it has no training split."""
    groups: dict[str, list[Path]] = {}
    for entry in _entries(folder):
        if _is_data(entry):
            groups.setdefault(_group(entry), []).append(entry)
    if (folder / _SAVED_SPLITS).exists():
        splits = read_json(folder / _SAVED_SPLITS, "save the data set again").get("splits")
        if lacking := [name for name in splits or () if not (folder / str(name) / SAVED).is_file()]:
            raise InputError(
                f"folder {folder} lacks the split {lacking[0]!r:.80} that its {_SAVED_SPLITS} lists: fetch all, or "
                "take it off that list"
            )
    chosen = {split: _choose(f"folder {folder}", split, groups) for split in SPLIT_NAMES}
    if not chosen["train"]:
        return None
    files = {split: _files(folder, name, groups[name]) if name else () for split, name in chosen.items()}
    unread = [entry.name for name, entries in groups.items() if name not in chosen.values() for entry in entries]
    return Layout(files["train"], files["validation"], files["test"], chosen["validation"], tuple(unread))


def _choose(where: str, split: str, groups: Iterable[str]) -> str:
    """The split's group of files: named exactly so, or else the one with the split's name among other words."""
    for name in SPLIT_NAMES[split]:
        if name in groups:
            return name
    others = {name for key in SPLIT_NAMES if key != split for name in SPLIT_NAMES[key]}
    found = [
        name
        for name in groups
        if (words := set(re.split(r"[^a-z]+", name))) & {*SPLIT_NAMES[split]} and not words & others
    ]
    if len(found) > 1 and split != "test":
        raise InputError(
            f"{where} has several files that could be the {split} split ({', '.join(found)}): call the right "
            f"one {split}"
        )
    return found[0] if len(found) == 1 else ""


def _files(folder: Path, name: str, entries: Sequence[Path]) -> tuple[Path, ...]:
    """The files of a split in order: a single file, numbered parts or shards, or all files of the split's folder."""
    if len(entries) == 1 and entries[0].is_dir() and not (entries[0] / SAVED).is_file():
        inside = [entry for entry in _entries(entries[0]) if _is_rows(entry)]
        parts: dict[str, list[Path]] = {}
        for entry in inside:
            parts.setdefault(_group(entry), []).append(entry)
        kinds = {extension(entry) for entry in inside}
        if len(kinds) > 1:
            raise InputError(
                f"folder {entries[0]} holds files of several kinds ({', '.join(sorted(kinds))}): keep one kind"
            )
        return tuple(file for group in parts for file in _files(entries[0], group, parts[group]))
    stems = [bare_name(entry) for entry in entries]
    plain = [entry for entry, stem in zip(entries, stems, strict=True) if stem.lower() == name]
    if len(entries) > 1 and (plain or len({extension(entry) for entry in entries}) > 1):
        names = some(entry.name for entry in entries)
        raise InputError(f"folder {folder} has several files for split {name} ({names}): keep one of them")
    shards = [(int(match[1]), int(match[2])) for stem in stems if (match := _SHARD.search(stem))]
    if shards:
        count = shards[0][1]
        # Shards usually count from 0.
        first = 1 if (count, count) in shards else 0
        missing = sorted({*range(first, first + count)} - {place for place, _ in shards})
        if len(shards) != len(entries) or len(shards) != count or missing or {total for _, total in shards} != {count}:
            what = f"without number {missing[0]}" if missing else "with others beside them"
            raise InputError(
                f"folder {folder} has {len(entries)} of the {count} shards of split {name}, {what}: fetch all, or "
                f"remove what is left of an older set"
            )
    # Years and the like may be numbers too, and begin elsewhere.
    numbers = sorted(int(match[0]) for stem in stems if (match := _PART.search(stem)))
    gap = {*range(numbers[0], numbers[-1])} - {*numbers} if numbers and numbers[0] < 2 else ()
    if gap and not shards:
        raise InputError(f"folder {folder} has no part {min(gap)} of split {name}: fetch all, or number them on")
    for entry in entries:
        if not entry.is_dir():
            check_regular(entry)
    return tuple(entries)


def _group(entry: Path) -> str:
    """A file's name in lower case, without the number of a shard or part: all parts of a split share it."""
    stem = _SHARD.sub("", bare_name(entry)).lower()
    return _MARKER.sub("", stem) or stem


def _is_data(entry: Path) -> bool:
    """True if a folder's entry is, by its name, a data file or the folder of a split."""
    if not _is_folder(entry):
        return _is_rows(entry)
    named = any(bare_name(entry).lower() in names for names in SPLIT_NAMES.values())
    return named and ((entry / SAVED).is_file() or any(map(_is_rows, _entries(entry))))


def _is_rows(entry: Path) -> bool:
    return bool(extension(entry)) and not _is_folder(entry) and entry.name not in _DESCRIPTIONS


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    # A folder that may not be entered, such as another user's.
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder without hidden ones, sorted with numbers in names by value."""
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror or error}") from error
    return sorted(found, key=lambda entry: (_in_words(entry.name), entry.name))


def _in_words(name: str) -> list[tuple[int, str]]:
    """Sort key of a name, split into words and numbers, so that part-10 comes after part-9."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0].isascii() and part[0].isdigit() else (-1, part) for part in parts]

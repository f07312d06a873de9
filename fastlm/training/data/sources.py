"""Finds the files of a text: files, directories, glob patterns, folders of `datasets`."""

import glob
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastlm.core.errors import mismatch
from fastlm.training.data.records import RECORDS, is_records

# What datasets.Dataset.save_to_disk and datasets.DatasetDict.save_to_disk write besides the Arrow files.
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


class Files(NamedTuple):
    found: list[Path]
    skipped: list[Path]  # hidden and binary files that no path names


def text_files(argument: str, paths: Iterable[str | Path]) -> Files:
    """find_files, of a text that must not be empty."""
    files = find_files(argument, paths)
    if not files.found:
        raise mismatch(argument, "at least one file, directory or pattern", "none")
    if not any(file.stat().st_size for file in files.found):
        count = len(files.found)
        got = f"{count} empty file{'s' * (count != 1)}, the first is {files.found[0]}"
        raise mismatch(argument, "a text that is not empty", got)
    return files


def find_files(argument: str, paths: Iterable[str | Path]) -> Files:
    """Expands directories (recursively) and glob patterns (with `**`) to sorted lists of files.

    Of a folder that `datasets` has saved, these are its Arrow files in their own order. Hidden and binary files are
    skipped unless a path names them. A file is read once, however often and by whichever path it is named.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if path.exists() and not path.is_dir():
            raise mismatch(argument, "a file, a directory or a pattern", path)
        matches = [path] if path.is_dir() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        files: list[Path] = []
        others: list[Path] = []
        for file in candidates(argument, matches, below=path if path.is_dir() else None):
            hidden = is_hidden(file.relative_to(path) if path.is_dir() else file)
            (others if hidden or (is_binary(file) and not is_records(file)) else files).append(file)
        if not files:
            raise FileNotFoundError(
                f"{argument}: expected a file, a directory with text files or a pattern that matches text files, "
                f"got {str(path)!r}"
            )
        found += files
        skipped += others
    once: dict[Path, Path] = {}
    for file in found:
        once.setdefault(file.resolve(), file)
    return Files(list(once.values()), skipped)


def candidates(argument: str, matches: Iterable[Path], *, below: Path | None) -> list[Path]:
    """The files among the matches, or below a directory; for each saved data set its Arrow files."""
    every = list(matches) if below is None else [below, *sorted(below.rglob("*"))]
    folders = [path for path in every if path.is_dir()]
    saved = {folder: saved_dataset(argument, folder) for folder in folders if is_dataset(argument, folder)}
    files: list[Path] = []
    for path in every:
        if path in saved:
            files += saved[path]
        elif path.is_file() and not any(folder in saved for folder in path.parents):
            files.append(path)
    return files


def is_dataset(argument: str, folder: Path) -> bool:
    if (folder / SPLITS).is_file():
        names = ", ".join(str(folder / split) for split in read_json(argument, folder / SPLITS).get("splits", []))
        raise mismatch(argument, f"one split of a data set ({names})", f"all of them in {str(folder)!r}")
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def saved_dataset(argument: str, folder: Path) -> list[Path]:
    """The Arrow files of a folder that datasets.Dataset.save_to_disk wrote, in the order of the records."""
    state = read_json(argument, folder / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise mismatch(argument, "a data set without indices (flatten_indices() removes them)", repr(str(folder)))
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise mismatch(argument, f"a list of files in {folder / STATE}", "another content") from None
    for file in files:
        if not file.is_file():
            raise mismatch(argument, f"the file {file}, which {folder / STATE} names", "none")
        if not is_records(file):
            raise mismatch(argument, f"{', '.join(RECORDS)} files in {folder / STATE}", file.name)
    return files


def read_json(argument: str, path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise mismatch(argument, f"JSON in {path}", f"a damaged file ({failure})") from None
    if not isinstance(content, dict):
        raise mismatch(argument, f"a JSON object in {path}", "another value")
    return content


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def is_binary(path: Path) -> bool:
    """Whether there is a NUL byte near the beginning, the criterion of git and grep."""
    with path.open("rb") as file:
        return b"\0" in file.read(8000)

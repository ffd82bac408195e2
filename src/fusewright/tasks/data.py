"""Data sets by name: a local folder, single files, or the Hugging Face Hub, in one layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import ParquetSplit
from fusewright.tasks.rows import DataSplit, Grouped, Part, Rows

VARIABLE = "FUSEWRIGHT_DATA"

Role = Literal["image", "text", "text2", "label", "target"]


class DataSource(BaseModel):
    """Where a data set is found, as suites write it.

    ``folder`` ("vision/mnist", with ``train.parquet`` and ``test.parquet``, or .jsonl, or .txt)
    and ``files`` (split -> path) lie below the data folder; ``hub`` is "org/name@revision", with
    ``config`` where the data set has several. A folder that exists wins over the Hub.
    ``columns`` maps "image", "text", "text2", "label", "target" to the data's own names;
    ``classes`` are the class names in the order of labels, where the data do not name them.
    ``shuffle`` is a seed: rows are put in its random order before they are cut, for data that are
    sorted by class. ``groups`` makes coarser classes: the name of each, and those of the data that
    it gathers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str | None = None
    files: Mapping[str, str] = Field(default_factory=dict)
    hub: str | None = None
    config: str | None = None
    columns: Mapping[Role, str] = Field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    shuffle: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    groups: Mapping[str, tuple[str, ...]] | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> DataSource:
        if not (self.folder or self.files or self.hub):
            raise ValueError("a data source needs a folder, files or a Hub id")
        return self


def open_split(source: DataSource, split: str, data: Path | None = None) -> DataSplit:
    """One split of a data set: "train", "test", or a slice "train[:3500]", "train[80%:]".

    ``data`` is the folder that holds data sets; None takes the environment variable
    FUSEWRIGHT_DATA. Without either, and where the source names a Hub id, ``datasets`` fetches it.
    Slices follow Python; percentages are rounded to the nearest row.

    Raises DataError if the folder, file, column or rows do not exist, a file is damaged, the Hub
    cannot be reached, or groups are not of the data's classes.
    """
    name, _, _ = _parse(split)
    root = data if data is not None else _from_environment()
    path = _local(source, name, root)
    if path is not None:
        whole = _open_file(path, source)
    elif source.hub:
        from fusewright.tasks.hub import open_hub

        whole = open_hub(source, name)
    else:
        raise _nowhere(source, name, root)
    if source.groups is not None:
        whole = Grouped(whole, source.groups)
    if source.shuffle is not None:
        whole = shuffled(whole, source.shuffle)
    return sliced(whole, split)


def shuffled(whole: DataSplit, seed: int) -> DataSplit:
    """All rows in an order that follows from ``seed`` and their number alone."""
    # RandomState's streams never change; those of newer generators may.
    return Part(whole, np.random.RandomState(seed).permutation(len(whole)), whole.name)


def sliced(whole: DataSplit, split: str) -> DataSplit:
    """The rows of a split that is at hand: "all[:80%]" of it, or all of it.

    Raises DataError if that is not understood, or no row.
    """
    _, start, stop = _parse(split)
    return whole if start is stop is None else _part(whole, start, stop, split)


def _from_environment() -> Path | None:
    value = os.environ.get(VARIABLE)
    return Path(value) if value else None


SUFFIXES = (".parquet", ".jsonl", ".txt")


def row_files(folder: Path) -> list[Path]:
    """Every file of a data set's folder that rows can come from; none if it is not there."""
    return sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))


def _local(source: DataSource, name: str, root: Path | None) -> Path | None:
    if root is None:
        return None
    if name in source.files:
        path = root / source.files[name]
        return path if path.is_file() else None
    candidates = (root / (source.folder or "") / (name + suffix) for suffix in SUFFIXES)
    return next((p for p in candidates if source.folder and p.is_file()), None)


def _nowhere(source: DataSource, name: str, root: Path | None) -> DataError:
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    asked = source.files.get(name) or (f"{source.folder}/{name}{kinds}" if source.folder else name)
    if root is None:
        return DataError(
            f"no data folder was given, and {asked} has to come from one", where=asked,
            fix=f"--data DIR, or export {VARIABLE}=DIR",
        )  # fmt: skip
    at = root / (source.folder or "")
    there = sorted(p.name for p in at.iterdir()) if at.is_dir() else None
    return DataError(
        "the data set is not in the data folder", where=root, expected=asked,
        found="no such folder" if there is None else ", ".join(there) or "an empty folder",
        fix=f"--data DIR or export {VARIABLE}=DIR with the folder that holds it"
            if there is None else "data of one of these kinds there, or another --data DIR",
    )  # fmt: skip


def _open_file(path: Path, source: DataSource) -> DataSplit:
    columns = {str(role): column for role, column in source.columns.items()}
    if path.suffix == ".parquet":
        return ParquetSplit(path, columns, source.classes)
    text = _text(path)
    if path.suffix == ".jsonl":  # strings of JSON may hold what Python takes for other line ends
        return _json_lines(path, list(StringIO(text)), columns, source.classes)
    lines = text.splitlines(keepends=True)
    return _filled(Rows({"text": lines}, name=str(path)))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "a text file cannot be read", where=path, expected="UTF-8", found=error
        ) from error


def _json_lines(
    path: Path, lines: list[str], columns: Mapping[str, str], classes: tuple[str, ...] | None
) -> DataSplit:
    """Every field of the objects is a column, under its own name or the role that it is given."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                "a line is no JSON object", where=f"{path}, line {number}", found=error
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                "a line is no JSON object", where=f"{path}, line {number}",
                expected='{"text": ...}', found=type(row).__name__,
            )  # fmt: skip
        found.append(row)
    names = list(found[0]) if found else []
    absent = [c for c in columns.values() if c not in names]
    uneven = next((i for i, row in enumerate(found) if row.keys() != found[0].keys()), None)
    if absent or uneven is not None:
        raise DataError(
            "a column is missing" if absent else "objects differ in their fields",
            where=path if absent else f"{path}, line {(uneven or 0) + 1}",
            expected=", ".join(absent or names), found=", ".join(found[uneven or 0]),
        )  # fmt: skip
    # A role's column is the one that was named, also where another has the role for its name.
    table = {name: name for name in names if name not in columns.values()} | dict(columns)
    held = {name: [row[column] for row in found] for name, column in table.items()}
    return _filled(Rows(held, classes, name=str(path)))


def _filled(split: Rows) -> Rows:
    if not len(split):
        raise DataError("the split is empty", where=split.name, expected="at least one row")
    return split


_SLICE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def _parse(split: str) -> tuple[str, str | None, str | None]:
    found = _SLICE.fullmatch(split.replace(" ", ""))
    if not found:
        raise DataError(
            "a split is not understood", where=split,
            expected='"train", "test", or a slice such as "train[:3500]" or "train[80%:]"',
        )  # fmt: skip
    sliced = "[" in split
    start, stop = found["start"], found["stop"]
    return found["name"], start or ("0" if sliced else None), stop


def _part(whole: DataSplit, start: str | None, stop: str | None, name: str) -> DataSplit:
    size = len(whole)
    first, last, _ = slice(_row(start, size), _row(stop, size)).indices(size)
    if first >= last:
        raise DataError(
            "the split is empty", where=f"{whole.name}, {name}", expected="at least one row",
            found=f"rows {first} to {last} of {size}",
        )  # fmt: skip
    return Part(whole, range(first, last), f"{whole.name}, {name}")


def _row(bound: str | None, size: int) -> int | None:
    if bound is None:
        return None
    return round(int(bound[:-1]) * size / 100) if bound.endswith("%") else int(bound)

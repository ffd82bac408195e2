"""Running text as data: whole files below the data folder, or Python's own standard library.

Where a task's ``data`` is no folder of parquet files, it may be

- a text file, ``lm/tinyshakespeare.txt``: its rows are lines, its one split is called ``all``;
- JSON lines, ``lm/gsm8k_{split}.jsonl``: one file for each split, the text of a row by a template
  of its fields, ``columns: {text: "{question}\\n{answer}\\n"}``;
- ``python: argparse.py ast.py``: lines of these files of the running interpreter's standard
  library, in that order, as one split called ``all``.

Held-out rows are slices of the same text: ``{train: "all[:90%]", test: "all[90%:]"}``.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fusewright.tasks.data import DataSource, open_split, sliced
from fusewright.tasks.errors import DataError
from fusewright.tasks.rows import DataSplit, Rows

if TYPE_CHECKING:
    from fusewright.bench.suite_file import TaskSpec

WHOLE = "all"
PYTHON = "python:"


def is_corpus(spec: TaskSpec) -> bool:
    """Whether a task's data are running text rather than a data set's folder."""
    data = spec.data or ""
    return data.startswith(PYTHON) or data.endswith((".txt", ".jsonl"))


def open_corpus(spec: TaskSpec, part: str, data: Path | None) -> DataSplit:
    """One part of a corpus, as rows that have a "text".

    Raises DataError for a file that is missing or damaged, a slice without rows, or a field that a
    template names and the rows lack.
    """
    said, split = str(spec.data), spec.splits[part]
    if said.startswith(PYTHON):
        return sliced(_standard_library(said), split)
    name = split.split("[")[0].strip()
    source = DataSource(files={name: said.replace("{split}", name)}, shuffle=spec.shuffle)
    rows = open_split(source, split, data)
    template = spec.columns.get("text")
    return rows if template is None else _filled(rows, template)


def files_of(
    spec: TaskSpec, data: Path | None, parts: Sequence[str] = ("train",)
) -> dict[str, str]:
    """SHA-256 of every file that these parts of a corpus are read from, by name; files that are
    not there are left out, since reading them is what refuses them."""
    said = str(spec.data)
    if said.startswith(PYTHON):
        root, names = _library(), said.removeprefix(PYTHON).split()
    else:
        splits = [spec.splits[part].split("[")[0].strip() for part in parts if part in spec.splits]
        root, names = data or Path(), [said.replace("{split}", split) for split in splits]
    paths = {name: root / name for name in names}
    return {n: sha256(p.read_bytes()).hexdigest() for n, p in paths.items() if p.is_file()}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _standard_library(said: str) -> Rows:
    lines: list[str] = []
    for name in said.removeprefix(PYTHON).split():
        try:
            text = (_library() / name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                "this Python's standard library has no such file", where=_library() / name,
                expected="a text of the corpus", found=error,
                fix="use a Python that has its sources, or name other files in the suite",
            ) from error  # fmt: skip
        lines += text.splitlines(keepends=True)
    return Rows({"text": lines}, name=f"Python's standard library ({_library()})")


def _filled(rows: DataSplit, template: str) -> Rows:
    from fusewright.tasks.tokens import filled

    numbers = range(len(rows))
    texts = filled(template, rows.rows(numbers), rows.name, numbers)
    return Rows({"text": texts}, name=rows.name)

"""Public experts whose embeddings were padded beyond the base's vocabulary, cut back to it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fusewright.bench.suite_file import Opens, SuiteError
from fusewright.extras import needs


def cropped(expert: Path, base: Path, opens: Opens, folder: Path) -> Path:
    """A model with the base's vocabulary: the expert, or a copy of it below ``folder`` without the
    rows of its embeddings and head that the base's tokenizer never names.

    Raises SuiteError for an expert with a smaller vocabulary, whose missing rows nothing can tell.
    """
    rows, wanted = _rows(expert), _rows(base)
    if rows == wanted:
        return expert
    if rows < wanted:
        raise SuiteError("the expert's vocabulary is smaller than the base's", where=expert,
                         expected=f"at least {wanted} rows", found=rows)  # fmt: skip
    out = folder / f"{expert.name}-{wanted}"
    if not out.is_dir():
        _write(expert, wanted, opens, out)
    return out


def _rows(path: Path) -> int:
    try:
        return int(json.loads((path / "config.json").read_text("utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuiteError("a model does not say how large its vocabulary is",
                         where=path / "config.json", expected="vocab_size",
                         found=repr(error)) from error  # fmt: skip


def _write(expert: Path, rows: int, opens: Opens, out: Path) -> None:
    transformers: Any = needs("transformers", "demo")
    module = getattr(transformers, opens.model).from_pretrained(expert, dtype="auto")
    module.resize_token_embeddings(rows)
    staged = out.with_name(f"{out.name}.{os.getpid()}")
    module.save_pretrained(staged)
    try:
        staged.rename(out)
    except OSError:  # another process was first
        shutil.rmtree(staged)
        if not out.is_dir():
            raise

"""Where an expert is made: beside its output, which it becomes whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.finetuning.recipe import FineTuning
from fusewright.errors import NumericError, OutputError

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite

FACTS = "finetune.json"
"""How an expert came about, beside it."""
CHECKPOINT, NEW = "checkpoint.pt", "new"
"""What is in the making: how far training is, and what becomes the output."""
_CLAIM = "claim.json"


def claim_of(suite: Suite, task: str, recipe: FineTuning, limit: int | None) -> dict[str, Any]:
    """All that an expert follows from, as JSON."""
    from fusewright.bench.sweep.identity import digest, files_digest

    spec = suite.spec.tasks[task]
    said = {
        "suite": suite.name, "task": task, "pool seed": suite.seed, "recipe": recipe.said(),
        "limit": limit, "question": digest(spec.model_dump(exclude={"question", "note"})),
        "base digest": files_digest(suite.base), "data": _data(suite, task),
        "head": _head(suite, task),
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(said))
    return found


def _data(suite: Suite, task: str) -> dict[str, Any]:
    """Where the rows come from, and the bytes of local files."""
    from fusewright.bench.corpora import files_of, is_corpus
    from fusewright.bench.sweep.identity import digest, files_digest
    from fusewright.tasks.data import row_files

    spec = suite.spec.tasks[task]
    where = {"folder": spec.data, "hub": spec.hub, "revision": spec.revision,
             "rows": dict(spec.splits)}  # fmt: skip
    if is_corpus(spec):
        return {**where, "digest": digest(files_of(spec, suite.data, list(spec.splits)))}
    folder = suite.data / spec.data if suite.data and spec.data else None
    if folder is None or not folder.is_dir():
        return where
    return {**where, "digest": digest([files_digest(f) for f in row_files(folder)])}


def _head(suite: Suite, task: str) -> str | None:
    from fusewright.bench.sweep.identity import digest

    head = suite.heads.get(task)
    if head is None:
        return None
    parts = head if isinstance(head, Mapping) else {"": head}
    return digest({name: tensor.tolist() for name, tensor in parts.items()})


def finished(target: Path, claim: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run of the same claim left. Raises OutputError if something else is there."""
    path = target / FACTS
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not path.is_file():
        raise OutputError("the output is there and is no expert of this command", where=target,
                          fix="choose another -o")  # fmt: skip
    held = json.loads(path.read_text("utf-8"))
    _check_same(held, claim, path, "choose another -o, or remove that folder")
    _clear(_beside(target))
    return dict(held["result"])


def _check_same(
    held: Mapping[str, Any], claim: Mapping[str, Any], where: Path, fix: str
) -> None:
    own, theirs = _flat(claim), _flat({key: held.get(key) for key in claim})
    odd = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
    if odd:
        raise OutputError(
            "this folder holds another run", where=where,
            expected=", ".join(f"{key} {own.get(key)}" for key in odd[:4]),
            found=", ".join(f"{key} {theirs.get(key)}" for key in odd[:4]), fix=fix,
        )  # fmt: skip


def _flat(said: Mapping[str, Any]) -> dict[str, Any]:
    recipe = said.get("recipe") or {}
    return {**{key: value for key, value in said.items() if key != "recipe"}, **recipe}


@contextmanager
def staging(target: Path, claim: Mapping[str, Any]) -> Iterator[Path]:
    """A locked sibling of the output, with what an earlier run of the same claim left there.

    The folder belongs to a claim as long as something was learned there: a run that ends with an
    error before its first checkpoint leaves nothing, nor does one that ends at a number that is
    none, where the same command would end again.
    """
    from fusewright.bench.finetuning.models import writing
    from fusewright.bench.pools import parts
    from fusewright.weights.lock import FolderLock

    folder = _beside(target)
    lock = FolderLock.acquire(folder)
    try:
        path = folder / _CLAIM
        if path.exists() and _learned(folder):
            held = json.loads(path.read_text("utf-8"))
            _check_same(held, claim, path, f"choose another -o, or rm -r '{folder}'")
        else:
            with writing(path):
                parts.write_json(path, claim)
        yield folder
    except NumericError:
        _clear(folder)
        raise
    finally:
        if not _learned(folder):
            _clear(folder)
        lock.release()


def publish(folder: Path, target: Path) -> None:
    """Put what is complete in the output's place, at once."""
    from fusewright.bench.finetuning.models import writing
    from fusewright.weights._fs import fs, sync_file

    with writing(target):
        for path in (folder / NEW).iterdir():
            sync_file(path)
        fs.fsync_folder(folder / NEW)
        (folder / NEW).rename(target)  # an empty folder there is replaced
        fs.fsync_folder(target.parent)
        _clear(folder)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.finetune")


def _learned(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CHECKPOINT, NEW))


def _clear(folder: Path) -> None:
    for name in (CHECKPOINT, _CLAIM):
        (folder / name).unlink(missing_ok=True)

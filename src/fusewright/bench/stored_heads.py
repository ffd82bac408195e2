"""Heads that are stored: all in one file of the pool, or each in its own expert's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusewright.bench.suite_file import SuiteError

if TYPE_CHECKING:
    from torch import Tensor

    from fusewright.bench.suite import Suite
    from fusewright.tasks.dense_maps import Head


def stored_heads(suite: Suite, path: Path, where: str) -> dict[str, Head]:
    """Each task's head (classes, width) from a file that holds one for every task; a decoder of
    many tensors is stored as NAME.TENSOR, by the names that its tensors have in the model.

    ``where`` is what errors call the file. Raises SuiteError for a task without a head, or one for
    other classes.
    """
    from fusewright.engine.state import read_state

    stored = read_state(path)
    found: dict[str, Head] = {}
    for name, task in suite.spec.tasks.items():
        key = task.head or name
        head = stored.get(key)
        if head is None and (decoder := _decoder(stored, f"{key}.")):
            found[name] = decoder
            continue
        if head is None:
            raise SuiteError(f"the task {name!r} has no head", where=where,
                             expected=key, found=", ".join(stored))  # fmt: skip
        found[name] = _for_its_classes(suite, name, head, where)
    return found


def heads_of_experts(suite: Suite) -> dict[str, Head]:
    """Each task's head (classes, width) from the checkpoint of its own expert, which carries the
    head that it was trained with: the tensor ``own_heads``, or the task's ``head``.

    Raises SuiteError if an expert has no such tensor, or it is for other classes.
    """
    from fusewright.engine.state import read_tensor

    found: dict[str, Head] = {}
    for name, task in suite.spec.tasks.items():
        path, tensor = suite.experts[name], task.head or str(suite.spec.own_heads)
        head = read_tensor(path, tensor)
        if head is None:
            raise SuiteError(f"the expert {name!r} has no head", where=path, expected=tensor,
                             fix="own_heads: TENSOR, as the checkpoints name it")  # fmt: skip
        found[name] = _for_its_classes(suite, name, head, str(path))
    return found


def classes_in(head: Head | None) -> int:
    """How many classes a head tells apart; 0 if it does not say, as a decoder's tensors do not."""
    return 0 if head is None or isinstance(head, Mapping) else len(head)


def _decoder(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}


def _for_its_classes(suite: Suite, name: str, head: Tensor, where: str) -> Tensor:
    spec = suite.spec.tasks[name]
    classes = spec.classes if spec.named is None else len(spec.named)
    if classes and classes != len(head):
        raise SuiteError(f"the head of {name!r} is for other classes", where=where,
                         expected=f"{classes} classes",
                         found=f"shape {tuple(head.shape)}")  # fmt: skip
    return head

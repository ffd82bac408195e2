"""What a batch must have to be learned from: rows, tokens that are no padding, answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

MASKS = ("attention_mask", "decoder_attention_mask")


def sound(task: str, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of an epoch, looked at one by one.

    Raises DataError naming the task where there is none, for one without rows, and for a row of
    padding alone: what a model says of nothing must not be learned from.
    """
    number = -1
    for number, batch in enumerate(batches):
        where = f"task {task}, batch {number}"
        _check_rows(batch, where)
        _check_tokens(batch, where)
        yield batch
    if number < 0:
        raise nothing(task)


def nothing(task: str) -> DataError:
    """The refusal of data that are empty, or that were when they were gone over again."""
    return DataError("there is nothing to learn from", where=f"task {task}",
                     expected="at least one batch each time the data are gone over",
                     fix="pass a list or a DataLoader, not an iterator")  # fmt: skip


def check_answers(task: str, answers: Tensor) -> Tensor:
    """The answers to a batch. Raises DataError if there is none, as of texts of one token whose
    next token is asked for."""
    if not answers.numel():
        raise DataError("a batch asks for no answer", where=f"task {task}",
                        expected="at least one answer", found=tuple(answers.shape),
                        fix="leave out texts that are too short to be asked about, or whose "
                            "labels are all -100")  # fmt: skip
    return answers


def rows_of(batch: Any) -> int | None:
    """How many items a batch has: the length of its first tensor. None where it has none."""
    from torch import Tensor

    lengths = (len(part) for part in _parts(batch).values()
               if isinstance(part, Tensor) and part.dim())  # fmt: skip
    return next(lengths, None)


def _parts(batch: Any) -> dict[str, Any]:
    if isinstance(batch, tuple | list):
        return {f"argument {at}": part for at, part in enumerate(batch)}
    return dict(batch) if isinstance(batch, Mapping) else {"the batch": batch}


def _check_rows(batch: Any, where: str) -> None:
    from torch import Tensor

    parts = _parts(batch)
    empty = [name for name, part in parts.items()
             if isinstance(part, Tensor) and part.dim() and not len(part)]  # fmt: skip
    if empty:
        raise DataError("a batch has no rows", where=where, expected="one row or more",
                        found=f"{empty[0]}: {tuple(parts[empty[0]].shape)}",
                        fix="leave it out")  # fmt: skip


def _check_tokens(batch: Any, where: str) -> None:
    from torch import Tensor

    for name in MASKS:
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        blank = (mask == 0).all(dim=1)
        if blank.any():
            raise DataError("a row is padding alone", where=f"{where}: {name}",
                            expected="a token that is no padding in each row",
                            found=f"rows {', '.join(map(str, blank.nonzero()[:8, 0].tolist()))}",
                            fix="leave empty texts out")  # fmt: skip

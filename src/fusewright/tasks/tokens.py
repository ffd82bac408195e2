"""Texts to token ids and padded batches, the same for every task on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusewright.tasks.batching import column
from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Ids = list[int]

IGNORED = -100
"""The label of positions that are not scored, as torch and ``transformers`` have it."""


def texts_in(
    rows: Mapping[str, Sequence[Any]], role: str, place: str, numbers: Sequence[int]
) -> list[str]:
    """A column of texts. Raises DataError if there is none, or a row has no text there."""
    found = list(column(rows, role, place, numbers))
    for number, text in zip(numbers, found, strict=True):
        if not isinstance(text, str):
            raise DataError(f"a {role} is no text", where=f"{place}, row {number}",
                            expected="a string", found=repr(text))  # fmt: skip
    return found


def filled(
    template: str, rows: Mapping[str, Sequence[Any]], place: str, numbers: Sequence[int]
) -> list[str]:
    """The template with each row's columns: "{text}", "{text2}" and others the split has.

    Raises DataError for a column that does not exist, a row that has nothing there, and a template
    that is none.
    """
    from string import Formatter

    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError as error:
        raise DataError("a template is not understood", where=template, found=error,
                        expected='such as "{text}", and {{ or }} for a brace') from error
    columns = [column(rows, name, place, numbers) for name in names]
    if not columns:
        raise DataError("a template names no column", where=template, expected='such as "{text}"')
    return [
        template.format_map(dict(zip(names, values, strict=True)))
        for values in zip(*columns, strict=True)
    ]


def tokenised(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    length: int,
    place: str,
    numbers: Sequence[int],
) -> dict[str, list[Ids]]:
    """"input_ids", and "token_type_ids" where the tokenizer has them; at most ``length`` tokens.

    Raises DataError if a text gives no token.
    """
    found = tokenizer(
        list(texts), *([] if pairs is None else [list(pairs)]), truncation=True, max_length=length
    )
    kept = {k: found[k] for k in ("input_ids", "token_type_ids") if k in found}
    for number, ids in zip(numbers, kept["input_ids"], strict=True):
        if not len(ids):
            raise DataError(
                "a text gives no token", where=f"{place}, row {number}", expected="some text"
            )
    return kept


def padded(
    lists: Sequence[Sequence[int]], pad: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and mask (n, longest) int64; the mask is 1 on real tokens."""
    import torch

    longest = max(len(ids) for ids in lists)
    found = torch.full((len(lists), longest), pad)
    mask = torch.zeros((len(lists), longest), dtype=torch.int64)
    for row, ids in enumerate(lists):
        at = slice(longest - len(ids), longest) if left else slice(len(ids))
        found[row, at] = torch.tensor(ids, dtype=torch.int64)
        mask[row, at] = 1
    return found, mask


def on_the_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (n, tokens) with the padding before each row's real tokens."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def positions(mask: Tensor) -> Tensor:
    """The place of each real token in its text, wherever the padding is: (n, tokens)."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def pad_id(tokenizer: Any) -> int:
    """What to pad with: masked, so that any id serves where the tokenizer names none."""
    found = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


def on_left(tokenizer: Any) -> bool:
    """The side on which a tokenizer pads."""
    return getattr(tokenizer, "padding_side", "right") == "left"


def tokens_of(tokenizer: Any, texts: Sequence[str], *, end: bool = True) -> list[Ids]:
    """Targets of a model: token ids and the end-of-text token, if there is one and it is asked
    for; nothing before."""
    last = getattr(tokenizer, "eos_token_id", None) if end else None
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, *([] if last is None else [last])] for ids in found]

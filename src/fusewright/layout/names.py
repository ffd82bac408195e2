"""Tensor names: natural order, patterns, siblings."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that compares runs of digits as numbers, and text as text."""
    pieces = _NUMBER.split(name)
    return tuple(
        (0, int(piece), piece) if index % 2 else (1, 0, piece)
        for index, piece in enumerate(pieces)
        if piece
    )


def canonical_order(names: Iterable[str]) -> list[str]:
    """Names in natural order: ``layers.2`` before ``layers.10``."""
    return sorted(names, key=natural_key)


def pattern(name: str) -> str:
    """The name with ``*`` for every numeric component: what repeated tensors share."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def leaf(name: str) -> str:
    """The last component."""
    return name.rpartition(".")[2]


def module(name: str) -> str:
    """The name of what owns the tensor, ``""`` at the top: all but the last component."""
    return name.rpartition(".")[0]


def bias_of(name: str) -> str:
    """The name that the bias of this weight has by convention."""
    return name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{name}_bias"


def weight_of(name: str) -> str:
    """The name that the weight of this bias has by convention."""
    return name.removesuffix("bias") + "weight"

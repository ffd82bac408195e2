"""Two sets of tensors: names and shapes that do not match."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from fusewright.layout.compare.finding import Finding, worst_first
from fusewright.layout.names import canonical_order, pattern

Shape = tuple[int, ...]

_LACKS = "merge only what both have, or complete the expert"
_ADDS = "leave it out of the expert, or extend the base"


def compare_shapes(base: Mapping[str, Shape], expert: Mapping[str, Shape]) -> list[Finding]:
    """Missing, extra and differently shaped tensors of the expert, one finding a pattern.

    Repeated tensors (the same name in every layer) are reported once, with their number.
    """
    missing = _grouped([name for name in base if name not in expert])
    extra = _grouped([name for name in expert if name not in base])
    lacks = [Finding("error", subject, "the expert lacks it", _LACKS) for subject in missing]
    adds = [Finding("error", subject, "the base lacks it", _ADDS) for subject in extra]
    return worst_first(lacks + adds + _different(base, expert))


def _different(base: Mapping[str, Shape], expert: Mapping[str, Shape]) -> list[Finding]:
    kinds: dict[tuple[Shape, Shape], list[str]] = {}
    for name in base:
        if name in expert and tuple(base[name]) != tuple(expert[name]):
            kinds.setdefault((tuple(base[name]), tuple(expert[name])), []).append(name)
    return [
        Finding("error", subject, f"{one} in the base, {other} in the expert", _fix(one, other))
        for (one, other), names in kinds.items()
        for subject in _grouped(names)
    ]


def _fix(one: Shape, other: Shape) -> str:
    if len(one) == 2 and one == other[::-1]:
        return "one of them is transposed: convert the expert with the base's model class"
    if one[1:] == other[1:] and len(one) == len(other) and one:
        return "only the number of rows differs: give both the same vocabulary or classes"
    return "choose models of one architecture and size"


def _grouped(names: list[str]) -> list[str]:
    """``layers.*.weight (22 tensors)`` for names that differ in numbers alone."""
    ordered = sorted(canonical_order(names), key=pattern)
    groups = [list(group) for _, group in groupby(ordered, key=pattern)]
    return [
        group[0] if len(group) == 1 else f"{pattern(group[0])} ({len(group)} tensors)"
        for group in groups
    ]

"""Independent matrices stored as one tensor: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fusewright.layout import rules
from fusewright.layout.config import integer, sections, sections_for
from fusewright.layout.names import leaf, module
from fusewright.layout.orientation import feed_forwards
from fusewright.layout.spec import Role

Shape = tuple[int, ...]
Packing = tuple[tuple[int, ...], int]  # sizes, and the axis along which they lie


def find_packed(
    shapes: Mapping[str, Shape],
    roles: Mapping[str, Role],
    in_first: Collection[str],
    config: Mapping[str, Any],
) -> tuple[dict[str, Packing], list[str]]:
    """Sizes and axis of every packed weight, and notes on those that are left whole.

    Sizes add up to the axis. Matrices whose rows alternate (head by head, element by element)
    are not ranges of an axis and stay whole; the note says so.
    """
    types = {section.get("model_type") for _, section in sections(config)}
    found: dict[str, Packing] = {}
    whole: dict[str, int] = {}
    for name, shape in shapes.items():
        words = {leaf(name), leaf(module(name))}
        if roles[name] is not Role.ATTENTION or len(shape) != 2:
            continue
        axis = 1 if name in in_first else 0
        if words & rules.QKV:
            sizes = () if _interleaved(types, config) else _qkv(name, shape, axis, config)
        elif words & rules.KV:
            sizes = _equal(shape[axis], 2)
        else:
            continue
        if sizes:
            found[name] = sizes, axis
        else:
            reason = leaf(module(name)) if leaf(name) == "weight" else leaf(name)
            whole[reason] = whole.get(reason, 0) + 1
    gates, alternating = _gates(shapes, roles, in_first, types)
    whole |= alternating
    notes = [
        f"{count} {what} weights interleave their matrices or have no known parts: treated as one"
        for what, count in whole.items()
    ]
    return found | gates, notes


def _interleaved(types: set[Any], config: Mapping[str, Any]) -> bool:
    one_key = config.get("multi_query") and not config.get("new_decoder_architecture")
    return bool(types & rules.INTERLEAVED_QKV) and not one_key


def _qkv(name: str, shape: Shape, axis: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of q, k, v by the config's heads; else thirds, or halves where only k, v fit."""
    total, inputs = shape[axis], shape[1 - axis]
    for section in sections_for(config, name):
        sizes = _grouped(section)
        if sizes and sum(sizes) == total:
            return sizes
    if total == 2 * inputs:
        return _equal(total, 2)  # cross-attention: queries come from elsewhere
    return _equal(total, 3)


def _grouped(section: Mapping[str, Any]) -> tuple[int, ...]:
    heads = integer(section, rules.HEADS_KEYS)
    hidden = integer(section, rules.HIDDEN_KEYS)
    if heads is None or hidden is None:
        return ()
    shared = 1 if section.get("multi_query") else heads
    keys = integer(section, rules.KV_HEADS_KEYS) if not section.get("multi_query") else None
    width = integer(section, ("head_dim",)) or hidden // heads
    return heads * width, (keys or shared) * width, (keys or shared) * width


def _equal(total: int, parts: int) -> tuple[int, ...]:
    return (total // parts,) * parts if total % parts == 0 else ()


def _gates(
    shapes: Mapping[str, Shape],
    roles: Mapping[str, Role],
    in_first: Collection[str],
    types: set[Any],
) -> tuple[dict[str, Packing], dict[str, int]]:
    """Feed-forwards whose first projection makes twice what the second takes."""
    found: dict[str, Packing] = {}
    whole: dict[str, int] = {}
    for up, down in feed_forwards(shapes):
        if roles[up] not in (Role.MLP, Role.EXPERT):
            continue
        out_axis, in_axis = (-1, -2) if up in in_first else (-2, -1)
        if len(shapes[up]) > 3 or shapes[up][out_axis] != 2 * shapes[down][in_axis]:
            continue
        if types & rules.INTERLEAVED_GATE:
            word = leaf(up)
            whole[word] = whole.get(word, 0) + 1
            continue
        half = shapes[up][out_axis] // 2
        found[up] = (half, half), out_axis % len(shapes[up])
    return found, whole

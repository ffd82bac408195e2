"""The layout of a whole model, from names, shapes and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewright.layout.blocks import Place, place_blocks
from fusewright.layout.config import integers, sections
from fusewright.layout.orientation import in_first
from fusewright.layout.packed import Packing, find_packed
from fusewright.layout.roles import assign_roles, is_after, is_matrix
from fusewright.layout.spec import ModelLayout, Role, TensorLayout
from fusewright.layout.tied import find_tied

Shape = tuple[int, ...]

_NOWHERE = Place("", 0, 0)
_WHOLE: Packing = ((), 0)


def describe(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> ModelLayout:
    """What is known of every tensor's place in its architecture.

    ``shapes`` are those of the whole model: places are relative to each other. ``dtypes`` are
    kinds ("float", "int", "bool"; absent ones are float). ``config`` is the parsed config.json
    ({} or None if there is none): it gives numbers of heads, vocabulary size and ties.
    """
    config = config or {}
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    places, notes = place_blocks(shapes, config)
    roles = assign_roles(shapes, dtypes or {}, places.keys(), config)
    matrices = {name: is_matrix(name, shape, roles[name]) for name, shape in shapes.items()}
    inverted, more = in_first(shapes, roles, matrices, places, config)
    packed, whole = find_packed(shapes, roles, inverted, config)
    vocabulary = _vocabulary(shapes, roles, config)
    tied, heads = find_tied(shapes, roles, vocabulary, config)
    tensors = {}
    for name in shapes:
        place = places.get(name, _NOWHERE)
        sizes, axis = packed.get(name, _WHOLE)
        tensors[name] = TensorLayout(
            name=name,
            role=roles[name],
            stack=place.stack,
            layer=place.layer if name in places else None,
            depth=place.depth,
            matrix=matrices[name],
            in_first=name in inverted,
            packed=sizes,
            packed_axis=axis,
            experts_first=roles[name] is Role.EXPERT and len(shapes[name]) == 3,
            vocabulary=vocabulary[name],
            after=name not in places and is_after(name, roles),
        )
    return ModelLayout(tensors, tied, (*notes, *more, *whole, *heads))


def _vocabulary(
    shapes: Mapping[str, Shape], roles: Mapping[str, Role], config: Mapping[str, Any]
) -> dict[str, bool]:
    """Which tensors have one row a vocabulary entry: token embeddings, heads and their biases.

    An embedding may have more rows than the config's vocabulary (padding), not fewer.
    """
    keys = {key for _, section in sections(config) for key in section if "vocab_size" in key}
    least = min(integers(config, sorted(keys)), default=1)
    rows = {
        shapes[name][0]
        for name, role in roles.items()
        if role is Role.EMBEDDING and shapes[name][0] >= least
    }
    wide = (Role.EMBEDDING, Role.HEAD)
    return {
        name: bool(shape)
        and shape[0] in rows
        and (roles[name] in wide or (roles[name] is Role.BIAS and is_after(name, roles)))
        for name, shape in shapes.items()
    }


def block_order(layout: ModelLayout) -> list[tuple[str, int]]:
    """Every block as (stack, layer): stacks in order of first appearance, layers ascending."""
    stacks: dict[str, set[int]] = {}
    for tensor in layout.values():
        if tensor.layer is not None:
            stacks.setdefault(tensor.stack, set()).add(tensor.layer)
    return [(stack, layer) for stack, layers in stacks.items() for layer in sorted(layers)]

"""What a tensor does, from its name, shape, dtype and neighbours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fusewright.layout import rules
from fusewright.layout.config import integers
from fusewright.layout.names import leaf, weight_of
from fusewright.layout.spec import Role

Shape = tuple[int, ...]

#: Looked up, added or measured rather than multiplied with: never linear maps.
_NOT_MAPS = frozenset(
    {Role.EMBEDDING, Role.POSITION, Role.NORM, Role.BIAS, Role.STATISTIC, Role.BUFFER}
)


def assign_roles(
    shapes: Mapping[str, Shape],
    kinds: Mapping[str, str],
    inside: Collection[str],
    config: Mapping[str, Any],
) -> dict[str, Role]:
    """The role of every tensor; ``inside`` are the names of those in blocks.

    ``kinds`` are dtype kinds; anything but "float" is a buffer.
    """
    moe = any("expert" in name for name in shapes)
    experts = integers(config, rules.EXPERTS_KEYS)
    roles: dict[str, Role] = {}
    for name, shape in shapes.items():
        where = {"any", "inside" if name in inside else "outside"} | ({"moe"} if moe else set())
        if kinds.get(name, "float") != "float":
            roles[name] = Role.BUFFER
        elif len(shape) == 3 and shape[0] in experts and name in inside and "conv" not in name:
            roles[name] = Role.EXPERT
        else:
            roles[name] = _first(name.lower(), len(shape), where)
    return roles | _norm_biases(roles)


def _first(name: str, axes: int, where: set[str]) -> Role:
    for rule in rules.ROLES:
        if rule.where in where and rule.least <= axes <= rule.most and rule.pattern.search(name):
            return rule.role
    return Role.OTHER


def _norm_biases(roles: Mapping[str, Role]) -> dict[str, Role]:
    """The shift of a norm belongs to it, as its scale does."""
    return {
        name: Role.NORM
        for name, role in roles.items()
        if role is Role.BIAS and roles.get(weight_of(name)) is Role.NORM
    }


def is_matrix(name: str, shape: Shape, role: Role) -> bool:
    """Whether the tensor acts as a linear map (or several): 2-D or more, and multiplied with."""
    if len(shape) < 2 or role in _NOT_MAPS:
        return False
    return role is Role.EXPERT or rules.MATRIX_LEAF.fullmatch(leaf(name)) is not None


def is_after(name: str, roles: Mapping[str, Role]) -> bool:
    """Whether a tensor outside blocks is used after the last one."""
    role, low = roles[name], name.lower()
    if Role.HEAD in (role, roles.get(weight_of(name))) or rules.AFTER.search(low):
        return True
    return role in (Role.NORM, Role.STATISTIC) and rules.BEFORE.search(low) is None

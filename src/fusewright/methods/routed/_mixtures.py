"""The parts of a model that become mixtures: linear maps that share one w."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from posixpath import commonpath

from pydantic import AfterValidator
from torch import nn

from fusewright.errors import PlanError
from fusewright.layout import Role
from fusewright.methods.routed._linears import Users, changed
from fusewright.modules.architecture import Architecture, describe_module
from fusewright.modules.linears import LinearMap
from fusewright.modules.vectors import TaskVectors

MLP, ALL = "mlp", "all"


def selects(*words: str) -> AfterValidator:
    """Refuses a field ``modules`` that is none of the words and no regular expression."""
    def checked(modules: str) -> str:
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(f"{', '.join(words)} or a regular expression ({error})") from error
        return modules

    return AfterValidator(checked)


@dataclass(frozen=True)
class Part:
    """One part: routed at the input of ``entry``, whose width is ``inputs``: the last axis, or the
    second of ``maps``."""

    entry: str
    inputs: int
    linears: tuple[LinearMap, ...]
    maps: bool = False


def parts_of(model: nn.Module, vectors: TaskVectors, modules: str) -> tuple[Part, ...]:
    """``modules`` "mlp": the feed-forward linear maps of every block, whatever they are called, or,
    in a model without any, the convolutions of its blocks; any other text is a regular expression,
    found anywhere in a module's path, of which the outermost are taken. Of linear maps that experts
    may change.

    Raises PlanError if there is none.
    """
    described = describe_module(model)
    groups = _owned(described, Users(described, model, vectors), modules)
    if not groups:
        raise PlanError("no linear layer is selected that experts change",
                        found=f"modules: {modules!r}",
                        expected="nn.Linear, Conv1D or a convolution inside them",
                        fix="modules='attn', or another part of the modules' paths")  # fmt: skip
    return tuple(_part(path, found, described, modules) for path, found in groups.items())


def left_of(model: nn.Module, vectors: TaskVectors, modules: str) -> list[str]:
    """The weights of selected linear maps that experts change and that no layer takes."""
    described = describe_module(model)
    users = Users(described, model, vectors)
    wanted = _groups([*described.linears.values(), *users.maps], described, modules)
    names = {users.stored(linear.weight) for found in wanted.values() for linear in found}
    taken = _owned(described, users, modules)
    names -= {linear.weight for found in taken.values() for linear in found}
    return changed(vectors.select(lambda name: name in names))


def _owned(described: Architecture, users: Users, modules: str) -> dict[str, list[LinearMap]]:
    """The selected maps that layers take, by the names that task vectors have for tensors."""
    linears = [each for each in users.maps if users.stored(each.weight) is not None]
    groups = _groups(linears, described, modules)
    owned = users.owned(linear for found in groups.values() for linear in found)
    by_path = {linear.module: linear for linear in owned}
    found = {path: [by_path[each.module] for each in group if each.module in by_path]
             for path, group in groups.items()}  # fmt: skip
    return {path: group for path, group in found.items() if group}


def _groups(
    linears: Sequence[LinearMap], described: Architecture, modules: str
) -> dict[str, list[LinearMap]]:
    """The selected ones by the block, or the module, that they are of."""
    if modules == MLP:
        inside = [each for each in linears if each.block is not None]
        if any(_feeds(each, described) for each in described.linears.values()):
            return _by_block([each for each in inside if _feeds(each, described)], described)
        return _by_block([each for each in inside if each.kernel], described)
    groups: dict[str, list[LinearMap]] = defaultdict(list)
    for linear in linears:
        if (outer := _outermost(linear.module, modules)) is not None:
            groups[outer].append(linear)
    return groups


def _feeds(linear: LinearMap, described: Architecture) -> bool:
    """Whether it is of a block's feed-forward part."""
    return linear.block is not None and described.layout[linear.weight].role is Role.MLP


def _by_block(
    linears: Sequence[LinearMap], described: Architecture
) -> dict[str, list[LinearMap]]:
    """By their block's path; convolutions outside its module (a stage's down-sampling) are left."""
    groups: dict[str, list[LinearMap]] = defaultdict(list)
    for linear in linears:
        assert linear.block is not None
        path = described.blocks[linear.block].path
        if not linear.kernel or f"{linear.module}.".startswith(f"{path}."):
            groups[path].append(linear)
    return groups


def _outermost(path: str, wanted: str) -> str | None:
    parts = path.split(".")
    outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((each for each in outer if re.search(wanted, each)), None)


def _part(
    path: str, linears: Sequence[LinearMap], described: Architecture, modules: str
) -> Part:
    """A block's feed-forward begins where its module does; where it has none, at its first map. All
    others begin where their module does, whose first map says how wide its input is."""
    entry, first = path, linears[0]
    if modules == MLP and not first.kernel:
        entry = commonpath([linear.module.replace(".", "/") for linear in linears])
        entry = entry.replace("/", ".")
        entry = entry if len(entry) > len(path) else first.module
    else:
        ours = {linear.module for linear in linears}
        known = described.linears.values()
        inside = (each for each in known if each.kernel or each.module in ours)
        first = next((each for each in inside if f"{each.module}.".startswith(f"{path}.")), first)
    return Part(entry, first.inputs, tuple(linears), bool(first.kernel))

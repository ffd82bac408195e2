"""The parts of a model that become mixtures: linear maps that share one w."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from posixpath import commonpath

from torch import nn

from fusewright.errors import PlanError
from fusewright.layout import Role
from fusewright.methods.routed._linears import is_routable
from fusewright.modules.architecture import describe_module
from fusewright.modules.linears import LinearMap
from fusewright.modules.vectors import TaskVectors

MLP = "mlp"


@dataclass(frozen=True)
class Part:
    """One part: routed at the input of ``entry``, whose width is ``inputs``."""

    entry: str
    inputs: int
    linears: tuple[LinearMap, ...]


def parts_of(model: nn.Module, vectors: TaskVectors, modules: str) -> tuple[Part, ...]:
    """``modules`` "mlp": the feed-forward linear maps of every block, whatever they are called; any
    other text is a regular expression, found anywhere in a module's path, of which the outermost
    are taken. Of linear maps that experts may change.

    Raises PlanError if there is none.
    """
    described = describe_module(model)
    linears = [linear for linear in described.linears.values()
               if is_routable(linear, model) and linear.weight in vectors.base]  # fmt: skip
    groups: dict[str, list[LinearMap]] = defaultdict(list)
    if modules == MLP:
        for linear in linears:
            if linear.block is not None and described.layout[linear.weight].role is Role.MLP:
                groups[described.blocks[linear.block].path].append(linear)
    else:
        for linear in linears:
            if (outer := _outermost(linear.module, modules)) is not None:
                groups[outer].append(linear)
    if not groups:
        raise PlanError("no linear layer is selected that experts change",
                        found=f"modules: {modules!r}", expected="nn.Linear or Conv1D inside them",
                        fix="modules='attn', or another part of the modules' paths")  # fmt: skip
    return tuple(_part(path, found, modules == MLP) for path, found in groups.items())


def _outermost(path: str, wanted: str) -> str | None:
    parts = path.split(".")
    outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((each for each in outer if re.search(wanted, each)), None)


def _part(path: str, linears: Sequence[LinearMap], inside: bool) -> Part:
    """A block's feed-forward begins where its module does; where it has none, at its first map."""
    entry = path
    if inside:
        entry = commonpath([linear.module.replace(".", "/") for linear in linears])
        entry = entry.replace("/", ".")
        entry = entry if len(entry) > len(path) else linears[0].module
    return Part(entry, linears[0].inputs, tuple(linears))

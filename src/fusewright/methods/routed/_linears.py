"""Which linear maps can be routed, and their task vectors as matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from warnings import warn

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning
from fusewright.layout.names import module as owner_of
from fusewright.modules.architecture import Architecture
from fusewright.modules.attention import INWARD, OUTWARD, OpenAttention, Rows, slot
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse
from fusewright.modules.layer import Layer
from fusewright.modules.linears import LinearMap
from fusewright.modules.vectors import TaskVectors

_KINDS = ("Linear", "Conv1D", "Conv1d", "Conv2d")


def routable(described: Architecture, model: nn.Module) -> list[LinearMap]:
    """The linear maps that a layer can take the place of: a Linear's, a Conv1D's or a convolution's
    of one group, which their module multiplies with by itself, and q, k, v and out of every
    ``nn.MultiheadAttention`` inside the model, each as one."""
    found: list[LinearMap] = []
    for linear in described.linears.values():
        if path := _attention_of(linear, model):
            found += _taken_apart(linear, path, model)
        elif linear.groups == 1 and type(model.get_submodule(linear.module)).__name__ in _KINDS:
            found.append(linear)
    return found


def _attention_of(linear: LinearMap, model: nn.Module) -> str:
    """The path of the attention whose map it is; "" if it is none's, or that of the whole model,
    in whose place nothing can go."""
    paths = (linear.module, owner_of(linear.module))
    return next((p for p in paths if type(model.get_submodule(p)) is nn.MultiheadAttention), "")


def _taken_apart(linear: LinearMap, path: str, model: nn.Module) -> list[LinearMap]:
    """Of an attention's tensor the maps that it holds."""
    of, found = model.get_submodule(path), []
    assert isinstance(of, nn.MultiheadAttention)
    known = of.state_dict()
    for name in (*INWARD, OUTWARD):
        (weight, rows), (bias, bias_rows) = slot(of, name, "weight"), slot(of, name, "bias")
        if f"{path}.{weight}" == linear.weight:
            found.append(replace(
                linear, module=f"{path}.{name}", outputs=len(known[weight][slice(*rows)]),
                packed=(), bias=f"{path}.{bias}" if bias in known else None, rows=rows,
                bias_rows=bias_rows,
            ))  # fmt: skip
    return found


def part_of(linear: LinearMap, model: nn.Module) -> nn.Module:
    """The module that a layer of the map takes the place of."""
    owner = model.get_submodule(owner_of(linear.module))
    if type(owner) is nn.MultiheadAttention:
        return Rows(owner, linear.module.rpartition(".")[2])
    return model.get_submodule(linear.module)


def opened(layers: Iterable[str], model: nn.Module) -> dict[str, Layer]:
    """What must be in the model for layers at these paths to have a place."""
    owners = {path: model.get_submodule(path) for path in dict.fromkeys(map(owner_of, layers))}
    return {path: OpenAttention(owner) for path, owner in owners.items()
            if isinstance(owner, nn.MultiheadAttention)}  # fmt: skip


def matrices(linear: LinearMap, vectors: TaskVectors, weight: str | None = None) -> list[Delta]:
    """Every expert's change of the map, (out, in); ``weight`` is what task vectors call it."""
    return [_matrix(delta, linear) for delta in vectors.at(weight or linear.weight)]


def _matrix(delta: Delta, linear: LinearMap) -> Delta:
    rows = slice(*linear.rows)
    if isinstance(delta, Factors):
        up, down = delta.up[rows], delta.down
        up, down = (down.T, up.T) if linear.in_first else (up, down)
        return Factors(up, down, torch.Size((len(up), down.shape[1])))
    if isinstance(delta, Sparse) and not len(delta.values):
        shape = linear.outputs, linear.inputs * prod(linear.kernel)
        return replace(delta, shape=torch.Size(shape))
    whole = delta.dense()[rows].flatten(1)
    return Dense(whole.T if linear.in_first else whole)


def changed(vectors: TaskVectors) -> list[str]:
    """The tensors that an expert changes."""
    return [n for n in vectors.names if any(bool(delta.norm2() > 0) for delta in vectors.at(n))]


def warn_of_left(names: Sequence[str], what: str) -> None:
    """Tell of maps in selected places that experts change, and that no layer can take."""
    if names:
        warn(f"{len(names)} linear maps cannot be routed ({names[0]}) and {what}",
             FusewrightWarning, stacklevel=3)  # fmt: skip


def shifts(linear: LinearMap, vectors: TaskVectors) -> list[Tensor] | None:
    """Every expert's change of the map's bias, (out,); None where there is none."""
    if linear.bias is None or linear.bias not in vectors.base:
        return None
    return [delta.dense()[slice(*linear.bias_rows)] for delta in vectors.at(linear.bias)]

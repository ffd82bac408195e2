"""Which linear maps can be routed, and their task vectors as matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from warnings import warn

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning
from fusewright.layout.names import module as owner_of
from fusewright.modules.architecture import Architecture
from fusewright.modules.attention import INWARD, OUTWARD, OpenAttention, Rows, slot
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse
from fusewright.modules.layer import Layer
from fusewright.modules.linears import LinearMap, Span
from fusewright.modules.tensors import tied_names
from fusewright.modules.vectors import TaskVectors

Place = tuple[int | str, ...]
"""A module that is in the model, and what it calls its child."""
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


class Users:
    """Which linear maps of a model use its tensors. Tied tensors have several names, and task
    vectors know one of them: the stored one."""

    def __init__(self, described: Architecture, model: nn.Module, vectors: TaskVectors) -> None:
        self.maps = routable(described, model)
        self._model, self._base = model, vectors.base
        self._groups = {name: group for group in described.tied for name in group}
        self._users: dict[str, list[tuple[Place, Span]]] = defaultdict(list)
        for linear in self.maps:
            place = self.place(linear.module)
            self._users[linear.weight].append((place, linear.rows))
            if linear.bias is not None:
                self._users[linear.bias].append((place, linear.bias_rows))

    def names(self, name: str) -> tuple[str, ...]:
        """All names of a tensor."""
        return self._groups.get(name, (name,))

    def stored(self, name: str) -> str | None:
        """What task vectors call a tensor; None if experts cannot change it."""
        return next((each for each in self.names(name) if each in self._base), None)

    def place(self, path: str) -> Place:
        """Where a layer goes: the same for all paths of a module that its parent holds once."""
        owner, name = owner_of(path), path.rpartition(".")[2]
        if owner and type(self._model.get_submodule(owner)) is nn.MultiheadAttention:
            return (*self.place(owner), name)
        return id(self._model.get_submodule(owner)), name

    def owned(self, linears: Iterable[LinearMap]) -> list[LinearMap]:
        """Of selected maps those whose weight nothing else uses, under any name: what else does (a
        table of embeddings, a part that is not selected) would get the wrong values; other rows of
        the tensor are no matter. Each place once; tensors by the names that task vectors have for
        them."""
        ours = self._places(linears := list(linears))
        found: dict[Place, LinearMap] = {}
        for linear in linears:
            stored = self.stored(linear.weight)
            if stored is not None and self._is_theirs(linear.weight, linear.rows, ours):
                found.setdefault(self.place(linear.module), replace(linear, weight=stored))
        return self.with_biases(list(found.values()))

    def with_biases(self, linears: Sequence[LinearMap]) -> list[LinearMap]:
        """The same maps, without the biases that something else uses, too."""
        ours = self._places(linears)
        biases = [self.stored(each.bias) if each.bias is not None
                  and self._is_theirs(each.bias, each.bias_rows, ours) else None
                  for each in linears]  # fmt: skip
        return [replace(each, bias=bias) for each, bias in zip(linears, biases, strict=True)]

    def _places(self, linears: Iterable[LinearMap]) -> set[Place]:
        return {self.place(linear.module) for linear in linears}

    def _is_theirs(self, name: str, rows: Span, places: set[Place]) -> bool:
        """Whether layers at these places are all that uses some rows of a tensor."""
        each = [self._users.get(other, []) for other in self.names(name)]
        return all(users and all(place in places or not _meet(rows, other)
                                 for place, other in users) for users in each)  # fmt: skip


def _meet(one: Span, two: Span) -> bool:
    """Whether two spans have a row in common; (None, None) are all rows."""
    (a, b), (c, d) = ((start or 0, inf if stop is None else stop) for start, stop in (one, two))
    return a < d and c < b


def untaken(
    vectors: TaskVectors, taken: Mapping[str, Sequence[Span]], model: nn.Module
) -> TaskVectors:
    """What layers leave over that take these rows of the model's tensors: other tensors, and task
    vectors that are zero in rows that are taken."""
    kept: dict[str, Tensor] = {}
    groups = {name: names for names in tied_names(model) for name in names}
    for name, spans in taken.items():
        left = torch.ones(len(vectors.base[name]), dtype=torch.bool)
        for rows in spans:
            left[slice(*rows)] = False
        kept |= dict.fromkeys(groups.get(name, (name,)), left)  # a checkpoint may hold it twice

    def read(expert: str, name: str) -> Delta:
        delta = vectors.read(expert, name)
        if name not in kept:
            return delta
        whole = delta.dense().clone()
        whole[~kept[name].to(whole.device)] = 0
        return Dense(whole)

    some = vectors.select(lambda name: name not in kept or bool(kept[name].any()))
    return replace(some, read=read)


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


def tensors_of(linear: LinearMap) -> tuple[object, ...]:
    """Equal for maps whose weight and bias are the same numbers: what is made of one's task vectors
    serves all."""
    return linear.weight, linear.rows, linear.in_first, linear.kernel, linear.bias, linear.bias_rows


def matrices(linear: LinearMap, vectors: TaskVectors) -> list[Delta]:
    """Every expert's change of the map, (out, in)."""
    return [matrix_of(delta, linear) for delta in vectors.at(linear.weight)]


def matrix_of(delta: Delta, linear: LinearMap) -> Delta:
    """What a delta of the map's tensor is of the map, (out, in)."""
    rows = slice(*linear.rows)
    if isinstance(delta, Factors):
        up, down = delta.up[rows], delta.down
        up, down = (down.T, up.T) if linear.in_first else (up, down)
        return Factors(up, down, torch.Size((len(up), down.shape[1])))
    if isinstance(delta, Sparse) and not len(delta.values):
        shape = linear.outputs, linear.inputs * prod(linear.kernel)
        return replace(delta, shape=torch.Size(shape))
    whole = delta.dense()[rows].flatten(1)
    stored = delta.stored if isinstance(delta, Dense) else None
    return Dense(whole.T if linear.in_first else whole, stored)


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

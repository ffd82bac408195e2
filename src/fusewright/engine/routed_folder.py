"""Routed models in folders: what is written beside their tensors, and how they are opened again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusewright.methods.routed  # noqa: F401  (the layers of this package are known by it)
from fusewright.engine.hollow import fill, mapped, zero
from fusewright.engine.opening import BY_MODULE, OPENS, empty
from fusewright.errors import PlanError, WeightsError
from fusewright.layout.names import module as owner_of
from fusewright.methods import registry
from fusewright.modules.layer import (
    Layer,
    Replacement,
    Saved,
    layer_kinds,
    listen,
    place,
    restorable,
)
from fusewright.modules.mixture import ROUTING, Routing
from fusewright.weights.json_text import read_object
from fusewright.weights.locate import DESCRIPTION

FORMAT = 1


def described(path: str, layer: Layer) -> dict[str, Any]:
    """What ``routed.json`` says of a layer. Raises PlanError if it has no kind of its own."""
    if not restorable(layer):
        raise PlanError("a layer has no kind of its own, so nothing could open it again",
                        where=f"{path}: {type(layer).__name__}",
                        expected="a class that names its kind",
                        fix='kind: ClassVar[str] = "a new name"')  # fmt: skip
    return {"kind": layer.kind, **layer.described()}


def precise(layers: Iterable[tuple[str, Layer]]) -> set[str]:
    """The tensors of layers that keep their dtype, by their names in the model."""
    return {f"{path}.{name}" for path, layer in layers for name in layer.precise}


def load_routed(path: Path, module: nn.Module | None = None) -> nn.Module:
    """A saved routed model, whose tensors are read when they are used. Raises WeightsError if its
    description or tensors do not fit."""
    said = _description(path / DESCRIPTION)
    state = _under_all_names(mapped(path), said["tied"])
    model = module
    if model is None:
        model = empty(path, said.get(OPENS), path / DESCRIPTION)
    layers = _restored(model, said, state, path)
    _check_shapes(model, state, path)
    absent, unexpected = fill(model, state)
    missing = [name for name in absent if name not in said["left"]]
    if missing or unexpected:
        raise WeightsError("the tensors are not those of the described model", where=path,
                           expected=", ".join(missing[:3]) or "no more",
                           found=", ".join(unexpected[:3]) or "without them",
                           fix=BY_MODULE)  # fmt: skip
    zero(model, absent, _dtype_of(model, layers))
    with _told(f"{path / DESCRIPTION}: layers"):
        listen(model, layers)
    return model.eval().requires_grad_(False)


def _description(file: Path) -> dict[str, Any]:
    """What the file says. Raises WeightsError if it is cut, of another format or without a key."""
    said = read_object(file)
    if said.get("routed") != FORMAT:
        raise WeightsError("the routed model is of another format", where=file,
                           expected=f"routed: {FORMAT}", found=f"routed: {said.get('routed')}",
                           fix="pip install --upgrade fusewright")  # fmt: skip
    layers, left = said.get("layers"), said.get("left")
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        raise _broken(file, "layers", "a description of each layer by its path", layers)
    if not _is_names(left):
        raise _broken(file, "left", "a list of tensors' names", left)
    tied = said.setdefault("tied", [])
    if not isinstance(tied, list) or not all(map(_is_names, tied)):
        raise _broken(file, "tied", "lists of names of one tensor", tied)
    return said


def _is_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _broken(file: Path, key: str, expected: str, found: Any) -> WeightsError:
    return WeightsError("the description of the routed model is not complete",
                        where=f"{file}: {key}", expected=expected,
                        found="nothing" if found is None else repr(found)[:80],
                        fix="save the model again, or copy the whole file")  # fmt: skip


def _under_all_names(
    tensors: Mapping[str, Tensor], tied: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """The tensors of files, of which those with several names are stored under one."""
    found = dict(tensors)
    for names in tied:
        if stored := next((name for name in names if name in tensors), None):
            found |= {name: tensors.get(name, tensors[stored]) for name in names}
    return found


def _dtype_of(model: nn.Module, layers: Mapping[str, Layer]) -> torch.dtype | None:
    """That of the base's own numbers, as they are stored."""
    kept = precise(layers.items())
    return next((p.dtype for n, p in model.named_parameters()
                 if n not in kept and not p.is_meta and p.is_floating_point()), None)  # fmt: skip


def _restored(
    model: nn.Module, said: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    described: Mapping[str, Mapping[str, Any]] = said["layers"]
    for at in sorted(described, key=lambda at: (at != ROUTING, at)):  # what others need is first
        kind = _kind(str(described[at].get("kind")), f"{path / DESCRIPTION}: {at}", said)
        tensors = {n.removeprefix(f"{at}."): t for n, t in state.items() if n.startswith(f"{at}.")}
        routing = layers.get(ROUTING)
        assert routing is None or isinstance(routing, Routing)
        with _told(f"{path / DESCRIPTION}: {at}"):
            model.get_submodule(at if issubclass(kind, Replacement) else owner_of(at))
            layers[at] = kind.restored(Saved(model, at, described[at], tensors, routing))
            place(model, {at: layers[at]})
    return layers


_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, PlanError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What layers raise of descriptions that do not fit them, their tensors or the module."""


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise WeightsError("a routed layer is not complete, or not of this module", where=where,
                           expected="the path of a module, and all that its kind was saved with",
                           found=f"{type(error).__name__}: {error}", fix=BY_MODULE
                           ) from error  # fmt: skip


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    other = [n for n, tensor in state.items() if n in own and own[n].shape != tensor.shape]
    if other:
        raise WeightsError("the routed model is of a base of other shapes",
                           where=f"{path}: {other[0]}", expected=tuple(own[other[0]].shape),
                           found=tuple(state[other[0]].shape),
                           fix="fw.load(path, module=the base's architecture)")  # fmt: skip


def _kind(kind: str, where: str, said: Mapping[str, Any]) -> type[Layer]:
    """The class of a kind. Only installed packages say what is imported, never a file: a layer is
    known where its module was imported, as that of its method is, if a package offers it."""
    if kind not in layer_kinds():
        registry.registry()
    known = layer_kinds()
    if kind not in known:
        method = ", ".join(said.get("method", {}))
        raise WeightsError("a routed layer is of a kind that is not known", where=where,
                           expected=", ".join(known),
                           found=f"{kind!r}, written by the method {method!r}",
                           fix=f"install the package that offers {method!r}, or import the module "
                               "that defines the layer before fw.load")  # fmt: skip
    return known[kind]

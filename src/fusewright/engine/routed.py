"""Routed models: built, saved as one folder, loaded again in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusewright.methods.routed  # noqa: F401  (the layers of this package are known by it)
from fusewright.engine.front import Merged, merge
from fusewright.engine.hollow import fill, hollow, mapped, zero
from fusewright.engine.state import MergedWeights, class_of
from fusewright.errors import PlanError, WeightsError
from fusewright.methods import registry
from fusewright.methods.contract import Context, Routed
from fusewright.modules.batchnorm import call
from fusewright.modules.layer import (
    Layer,
    Replacement,
    Saved,
    layer_kinds,
    listen,
    place,
    put_in,
    restorable,
)
from fusewright.modules.masked import MASKS, TaskMasks
from fusewright.modules.mixture import ROUTING, Routing, fixed
from fusewright.modules.preferences import PREFERENCES, Preference, Preferences
from fusewright.modules.surgery import SURGERY
from fusewright.plain import finite
from fusewright.weights import open_weights
from fusewright.weights.locate import ROUTED_STEM
from fusewright.weights.names import canonical_names

DESCRIPTION, FORMAT = "routed.json", 1
_TOLD = ("parameters", "fitted")
"""What the report of a saved model has of that in memory."""


@dataclass
class RoutedModel(Merged):
    """A model with routed layers, in memory; ``layers`` are their paths, ``left`` the tensors of
    the module that the base's checkpoint lacks (a pooler that transformers adds)."""

    routed: nn.Module = field(default_factory=nn.Module, repr=False)
    layers: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict, repr=False)
    """{the module's name: what the base's checkpoint calls it}, where they differ."""

    def module(self) -> nn.Module:
        return self.routed

    def _layers(self) -> Iterator[tuple[str, Layer]]:
        for path in self.layers:
            layer = self.routed.get_submodule(path)
            assert isinstance(layer, Layer)
            yield path, layer

    def state_dict(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.routed.state_dict().items() if n not in self.left}

    def save(self, out: str | Path, **options: Any) -> Merged:
        """Write it as a folder that :func:`fusewright.load` opens: the tensors of base and layers,
        the base's config and tokenizer, and ``routed.json``, which also says how the fit went.
        Other libraries find no weights in it: they would leave the layers out, and say so at most.
        Raises PlanError for a layer without a kind of its own, which nothing could open."""
        described = {path: _described(path, layer) for path, layer in self._layers()}
        said = {
            "routed": FORMAT, "method": self.report["method"], "left": list(self.left),
            "layers": described, "fitted": finite(self.report.get("fitted", {})),
        }  # fmt: skip
        files = {DESCRIPTION: json.dumps(said, indent=1).encode()}
        source = MergedWeights(self.state_dict(), self.source, files, ROUTED_STEM)
        made = merge("passthrough", experts={"merged": source}, out=out, **options)
        made.report |= {key: self.report[key] for key in _TOLD if key in self.report}
        return made

    def unload(self, inputs: Any = None) -> Merged:
        """A plain model of the base's architecture, with one w for each mixture: that of routers
        without input (depth 0), or the mean of what ``inputs`` are routed to, which are what the
        model is called with: keywords, a tuple of arguments, or one tensor.

        Raises PlanError for layers that send each token its own way, and for routers that depend
        on the input where none is given.
        """
        routing = getattr(self.routed, ROUTING, None)
        if not isinstance(routing, Routing):
            raise PlanError("every token has its own weights here, so no plain model is the same",
                            found=f"{len(self.layers)} routed layers",
                            expected="mixtures, as of wemoe")  # fmt: skip
        if inputs is not None:
            with torch.no_grad():
                call(self.routed, inputs)
        elif not fixed(routing):
            raise PlanError("the weights depend on the input", expected="routers of depth 0",
                            fix="unload(inputs), or WEMoE(router=0)")  # fmt: skip
        return Merged(None, self.report, {"recipe": {}}, self._plain(), self.source)

    def _plain(self) -> dict[str, Tensor]:
        state = self.state_dict()
        for path, layer in sorted(self._layers(), reverse=True):  # those inside others first
            state = {n: t for n, t in state.items() if not n.startswith(f"{path}.")}
            if isinstance(layer, Replacement):
                state |= {f"{path}.{name}": tensor for name, tensor in layer.plain().items()}
        return {self.stored.get(name, name): tensor for name, tensor in state.items()}


class ParetoModel(RoutedModel):
    """A model whose weights follow a preference over the tasks, in memory; see
    :class:`~fusewright.modules.preferences.Preferences`. What is saved has θ_0 and τ_t of the
    selected tensors, and not their merge; opened by :func:`fusewright.load`, the module has
    ``set_preference`` as well."""

    @property
    def preferences(self) -> Preferences:
        found = self.routed.get_submodule(PREFERENCES)
        assert isinstance(found, Preferences)
        return found

    def set_preference(self, preference: Preference) -> None:
        """From now on the model is the merge for r, which is divided by its sum: one number for
        each expert, in their order or by name. Raises PlanError for what is no preference."""
        self.preferences.set_preference(preference)

    def unload(self, preference: Preference | None = None) -> Merged:
        """The plain model of the base's architecture for r, or for what was set last."""
        if preference is not None:
            self.set_preference(preference)
        self.preferences.refresh()
        absent = set(self.left) - set(self.preferences.remade(self.routed))
        state = {self.stored.get(n, n): t.clone() for n, t in self.routed.state_dict().items()
                 if n not in absent and not n.startswith(f"{PREFERENCES}.")}  # fmt: skip
        r = self.preferences.preference.tolist()
        return Merged(None, {**self.report, "preference": r}, {"recipe": {}}, state, self.source)


class TaskModel(RoutedModel):
    """A model that must be told the task of its inputs, in memory; see
    :class:`~fusewright.modules.masked.TaskMasks`. Opened by :func:`fusewright.load`, the module has
    ``set_task`` as well."""

    @property
    def masks(self) -> TaskMasks:
        found = self.routed.get_submodule(MASKS)
        assert isinstance(found, TaskMasks)
        return found

    def set_task(self, task: str) -> None:
        """From now on the module answers as for that task. Raises PlanError if it is unknown."""
        self.masks.set_task(task)

    def unload(self, task: str | None = None) -> Merged:
        """The plain model of one task, that which was told last if none is named."""
        told = task or self.masks.task
        if told is None:
            raise PlanError("every task has its own plain model", fix="unload(task)",
                            expected=", ".join(self.masks.tasks))  # fmt: skip
        state = {n: t for n, t in self.state_dict().items() if not n.startswith(f"{MASKS}.")}
        state |= self.masks.weights(told)
        return Merged(None, {**self.report, "task": told}, {"recipe": {}}, state, self.source)


class SurgeryModel(RoutedModel):
    """A merge whose features are corrected for the task that it is told, in memory; see
    :class:`~fusewright.modules.surgery.Surgery`."""

    def set_task(self, task: str) -> None:
        """From now on the module answers as for that task. Raises PlanError if it is unknown."""
        self.routed.set_task(task)  # type: ignore[operator]

    def unload(self, inputs: Any = None) -> Merged:
        """Raises PlanError: the correction is no part of the base's architecture."""
        raise PlanError("the base's architecture has no place for a correction of features",
                        fix="merge by what the method's merger says")  # fmt: skip


_MODELS: dict[str, type[RoutedModel]] = {
    PREFERENCES: ParetoModel, MASKS: TaskModel, SURGERY: SurgeryModel,
}  # fmt: skip
"""What is built of a method that answers with a child of that name."""


def upscaled(method: Routed, context: Context) -> RoutedModel:
    """The base's module with what a method builds."""
    module = context.module()
    own = [name for name, _ in module.named_parameters()]
    stored = {name: context.stored(name) for name in module.state_dict()}
    with open_weights(context.base) as base:
        known = canonical_names(list(base), "base")[0]
    left = tuple(name for name in own if context.stored(name) not in known)
    parts = method.build(context)
    put_in(module, parts.layers, parts.tensors)
    module.cpu()
    left = (*left, *(name for layer in parts.layers.values() for name in layer.remade(module)))
    of_base = sum(tensor.numel() for tensor in context.vectors().base.values())
    replaced = sum(isinstance(e, Replacement) and e.added > 0 for e in parts.layers.values())
    sizes = {**counted(module, parts.layers.values(), left), "base": of_base, "layers": replaced}
    report = {"method": method.spec(), "parameters": sizes, "fitted": dict(parts.report)}
    made = next((_MODELS[child] for child in _MODELS if child in parts.layers), RoutedModel)
    return made(
        None, report, {}, None, context.base, module, tuple(parts.layers), left, stored
    )  # fmt: skip


def counted(
    module: nn.Module, layers: Collection[Layer], left: Collection[str] = ()
) -> dict[str, int]:
    """How large a routed model is: floating-point numbers that are ``stored`` (all tensors but
    those ``left`` out), those of them that a method ``trained`` and that one input's answer depends
    on (``active``), and ``bytes``."""
    state = {name: t for name, t in module.state_dict().items() if name not in left}
    stored = sum(t.numel() for t in state.values() if t.is_floating_point())
    return {
        "stored": stored,
        "trained": sum(layer.trained for layer in layers),
        "active": stored + sum(layer.active - layer.added for layer in layers),
        "bytes": sum(t.nbytes for t in state.values()),
    }


def load_routed(path: Path, module: nn.Module | None = None) -> nn.Module:
    """A saved routed model, whose tensors are read when they are used. Raises WeightsError if its
    description or tensors do not fit."""
    said = json.loads((path / DESCRIPTION).read_text("utf-8"))
    if said.get("routed") != FORMAT:
        raise WeightsError("the routed model is of another format", where=path / DESCRIPTION,
                           expected=f"routed: {FORMAT}", found=f"routed: {said.get('routed')}",
                           fix="pip install --upgrade fusewright")  # fmt: skip
    state = mapped(path)
    model = _empty(path) if module is None else module
    layers = _restored(model, said, state, path)
    _check_shapes(model, state, path)
    absent, unexpected = fill(model, state)
    missing = [name for name in absent if name not in said["left"]]
    if missing or unexpected:
        raise WeightsError("the tensors are not those of the described model", where=path,
                           expected=", ".join(missing[:3]) or "no more",
                           found=", ".join(unexpected[:3]) or "without them")  # fmt: skip
    zero(model, absent)
    listen(model, layers)
    return model.eval().requires_grad_(False)


def _described(path: str, layer: Layer) -> dict[str, Any]:
    if not restorable(layer):
        raise PlanError("a layer has no kind of its own, so nothing could open it again",
                        where=f"{path}: {type(layer).__name__}",
                        expected="a class that names its kind",
                        fix='kind: ClassVar[str] = "a new name"')  # fmt: skip
    return {"kind": layer.kind, **layer.described()}


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
        try:
            layers[at] = kind.restored(Saved(model, at, described[at], tensors, routing))
        except (KeyError, AttributeError) as error:
            raise WeightsError("a routed layer is not complete", where=f"{path}: {at}",
                               expected=str(error)) from error  # fmt: skip
        place(model, {at: layers[at]})
    return layers


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


def _empty(path: Path) -> nn.Module:
    """The architecture that the folder's config names, without weights."""
    from fusewright.extras import needs

    transformers: Any = needs("transformers", "transformers")
    cls = class_of(path)
    if cls is None:
        raise WeightsError("the config does not say what module the base is", where=path,
                           expected="architectures: [a class of transformers]",
                           fix="fw.load(path, module=...)")  # fmt: skip
    with hollow():
        model: nn.Module = cls(transformers.AutoConfig.from_pretrained(path))
    return model

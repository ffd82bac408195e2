"""Routed models in memory: built, saved as one folder, unloaded into a plain model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.engine.codec import Finite, narrowed
from fusewright.engine.front import Merged, write
from fusewright.engine.opening import OPENS
from fusewright.engine.options import Options
from fusewright.engine.recipe import Recipe
from fusewright.engine.routed_folder import FORMAT, described, precise
from fusewright.engine.state import MergedWeights
from fusewright.errors import PlanError
from fusewright.methods.contract import Context, Routed
from fusewright.modules.batchnorm import call
from fusewright.modules.layer import (
    Layer,
    Replacement,
    put_in,
)
from fusewright.modules.masked import MASKS, TaskMasks
from fusewright.modules.mixture import ROUTING, Routing, fixed
from fusewright.modules.preferences import PREFERENCES, Preference, Preferences
from fusewright.modules.surgery import SURGERY
from fusewright.modules.tensors import named_tensors, same_tensor, tied_names, wide_dtype
from fusewright.plain import finite
from fusewright.weights import DType, open_weights
from fusewright.weights.locate import DESCRIPTION, ROUTED_STEM
from fusewright.weights.memory import tied_groups
from fusewright.weights.names import canonical_names

_COMPUTED = (DType.F64, DType.F32, DType.F16, DType.BF16)
_TOLD = ("parameters", "fitted", "fit_seconds")
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
    opens: Mapping[str, Any] | None = None
    """How the base became a module; see :func:`fusewright.engine.opening.opening`."""

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
        the base's config and tokenizer, a card of the models that it was made of, and
        ``routed.json``, which also says how the base was opened and how the fit went.
        Other libraries find no weights in it: they would leave the layers out, and say so at most.
        ``out_dtype`` is that of all but what was learned and what scales masks. Raises PlanError
        for a layer without a kind of its own, which nothing could open."""
        layers = {path: described(path, layer) for path, layer in self._layers()}
        said = {
            "routed": FORMAT, "method": self.report["method"], OPENS: self.opens,
            "left": list(self.left), "tied": tied_groups(self.state_dict()),
            "layers": layers, "fitted": finite(self.report.get("fitted", {})),
        }  # fmt: skip
        files = {DESCRIPTION: json.dumps(said, indent=1).encode()}
        wanted = stored_dtype(options.pop("out_dtype", None), options.pop("dtype", None))
        rule = Finite(options.get("allow_nonfinite", False), options.get("allow_overflow", False))
        state = self._stored_in(wanted, rule)
        source = MergedWeights(state, self.source, files, ROUTED_STEM)
        made = write(source, out, self.origin, **options)
        made.report |= {key: self.report[key] for key in _TOLD if key in self.report}
        return made

    def _stored_in(self, dtype: torch.dtype | None, rule: Finite) -> dict[str, Tensor]:
        state = self.state_dict()
        if dtype is None:
            return state
        kept = precise(self._layers())
        found = {
            n: narrowed(t, dtype, n, rule)
            if t.dtype != dtype and t.is_floating_point() and n not in kept else t
            for n, t in state.items()
        }  # fmt: skip
        for names in tied_groups(state):
            found |= dict.fromkeys(names, found[names[0]])
        return found

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
        return self._unloaded(self._plain())

    def _unloaded(self, state: dict[str, Tensor], **told: Any) -> Merged:
        report = {**self.report, **told}
        return Merged(None, report, {"recipe": {}}, state, self.source, self.origin)

    def _plain(self) -> dict[str, Tensor]:
        """The base's tensors as the layers make them. Where several make one tensor (linear maps
        that share it, a table of embeddings that is a head), it is their mean: that of the mean of
        their w."""
        named = self.routed.named_modules(remove_duplicate=False)
        layers = {path: part for path, part in named if isinstance(part, Layer)}
        made: dict[str, Tensor] = {}
        for path in sorted(layers, reverse=True):  # those inside others first
            made = _outside(made, path)
            layer = layers[path]
            if isinstance(layer, Replacement):
                made |= {f"{path}.{name}": tensor for name, tensor in layer.plain().items()}
        state = self.state_dict()
        for path in layers:
            state = _outside(state, path)
        state |= made
        for tied in tied_names(self.routed):
            names = [name for each in tied if (name := _in_base(each, layers)) in state]
            if each := [made[name] for name in names if name in made]:
                state |= dict.fromkeys(names, _mean(each))
        return {self.stored.get(name, name): tensor for name, tensor in state.items()}


def _outside(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.")}


def _in_base(name: str, layers: Mapping[str, nn.Module]) -> str:
    """What the base calls a tensor of the model."""
    for path in layers:
        if name.startswith(f"{path}.base."):
            name = f"{path}.{name.removeprefix(f'{path}.base.')}"
    return name


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first
    wide = wide_dtype(first)
    return torch.stack([tensor.to(wide) for tensor in tensors]).mean(dim=0).to(first.dtype)


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
        return self._unloaded(state, preference=r)


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
        state = {self.stored.get(name, name): tensor for name, tensor in state.items()}
        return self._unloaded(state, task=told)


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


def stored_dtype(out_dtype: str | None, dtype: str | None) -> torch.dtype | None:
    """What a routed model is stored in; None for the base's. Raises PlanError for what no module
    computes with."""
    wanted = out_dtype or dtype
    if wanted is None:
        return None
    found = DType.of(wanted)
    if found not in _COMPUTED:
        raise PlanError("a routed model is run as it is stored, and nothing runs in that dtype",
                        found=wanted, expected=", ".join(d.torch_name for d in _COMPUTED),
                        fix="out_dtype: bfloat16")  # fmt: skip
    return found.torch


def upscaled(
    method: Routed, context: Context, recipe: Recipe, options: Options
) -> RoutedModel:
    """The base's module with what a method builds, in the dtype that the recipe asks for.

    Raises PlanError for a dtype that no module computes with, and for ``dtype: float64`` where the
    base is not: layers are built as precisely as the models are.
    """
    wanted = stored_dtype(recipe.out_dtype, recipe.dtype)
    module = context.module()
    _check_precision(module, recipe)
    own = [name for name, _ in module.named_parameters()]
    stored = {name: context.stored(name) for name in module.state_dict()}
    with open_weights(context.base) as base:
        known = canonical_names(list(base), "base")[0]
    left = tuple(name for name in own if context.stored(name) not in known)
    parts = method.build(context)
    put_in(module, parts.layers, parts.tensors)
    module.cpu()
    if wanted is not None:
        _cast(module, parts.layers, wanted, Finite(options.allow_nonfinite, options.allow_overflow))
    left = (*left, *(name for layer in parts.layers.values() for name in layer.remade(module)))
    of_base = sum(tensor.numel() for tensor in context.vectors().base.values())
    replaced = sum(isinstance(e, Replacement) and e.added > 0 for e in parts.layers.values())
    sizes = {**counted(module, parts.layers.values(), left), "base": of_base, "layers": replaced}
    report = {"method": method.spec(), "parameters": sizes, "fitted": dict(parts.report)}
    made = next((_MODELS[child] for child in _MODELS if child in parts.layers), RoutedModel)
    return made(
        None, report, {}, routed=module, layers=tuple(parts.layers), left=left, stored=stored,
    )  # fmt: skip


def _check_precision(module: nn.Module, recipe: Recipe) -> None:
    wide = all(p.dtype == torch.float64 for p in module.parameters())
    if recipe.dtype is not None and DType.of(recipe.dtype) is DType.F64 and not wide:
        raise PlanError("routed layers are built as precisely as the models are",
                        found="dtype: float64", expected="a base in float64",
                        fix="out_dtype: float64 stores it so, or models in float64")  # fmt: skip


def _cast(
    module: nn.Module, layers: Mapping[str, Layer], dtype: torch.dtype, rule: Finite
) -> None:
    """Have a model's stored tensors in a dtype, but for those that layers keep."""
    kept = precise(layers.items())
    stored = module.state_dict().keys() - kept
    own = dict(named_tensors(module))
    for names in same_tensor(module):
        tensor, named = own[names[0]], [name for name in names if name in stored]
        if named and tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = narrowed(tensor, dtype, named[0], rule)


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

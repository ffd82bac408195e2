"""Routed models: built, saved as one folder, loaded again in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusewright.engine.front import Merged, merge
from fusewright.engine.state import MergedWeights, class_of, read_state
from fusewright.errors import WeightsError
from fusewright.methods.contract import Context, Routed
from fusewright.modules.routed import RoutedLinear
from fusewright.weights import open_weights
from fusewright.weights.names import canonical_names

DESCRIPTION, FORMAT = "routed.json", 1
_KINDS: dict[str, type[RoutedLinear]] = {"linear": RoutedLinear}


@dataclass
class RoutedModel(Merged):
    """A model with routed layers, in memory; ``layers`` are their paths, ``left`` the tensors of
    the module that the base's checkpoint lacks (a pooler that transformers adds)."""

    routed: nn.Module = field(default_factory=nn.Module, repr=False)
    layers: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def module(self) -> nn.Module:
        return self.routed

    def state_dict(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.routed.state_dict().items() if n not in self.left}

    def save(self, out: str | Path, **options: Any) -> Merged:
        """Write it as a folder that :func:`fusewright.load` opens: the tensors of base and layers,
        the base's config and tokenizer, and ``routed.json``."""
        said = {
            "routed": FORMAT, "method": self.report["method"], "left": list(self.left),
            "layers": {path: _said(self.routed.get_submodule(path)) for path in self.layers},
        }  # fmt: skip
        files = {DESCRIPTION: json.dumps(said, indent=1).encode()}
        source = MergedWeights(self.state_dict(), self.source, files)
        return merge("passthrough", experts={"merged": source}, out=out, **options)


def upscaled(method: Routed, context: Context) -> RoutedModel:
    """The base's module with the layers that a method builds."""
    module = context.module()
    layers, own = method.build(context), dict(module.named_parameters())
    with open_weights(context.base) as base:
        known = canonical_names(list(base), "base")[0]
    left = tuple(name for name in own if context.stored(name) not in known)
    replaced(module, layers)
    of_base = sum(tensor.numel() for tensor in context.vectors().base.values())
    sizes = {"stored": _count(module), "base": of_base, "layers": len(layers)}
    report = {"method": method.spec(), "parameters": sizes}
    return RoutedModel(None, report, {}, None, context.base, module, tuple(layers), left)


def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers at their paths, in place."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer)


def load_routed(path: Path, module: nn.Module | None = None) -> nn.Module:
    """A saved routed model. Raises WeightsError if its description or tensors do not fit."""
    said = json.loads((path / DESCRIPTION).read_text("utf-8"))
    if said.get("routed") != FORMAT:
        raise WeightsError("the routed model is of another format", where=path / DESCRIPTION,
                           expected=f"routed: {FORMAT}", found=f"routed: {said.get('routed')}",
                           fix="pip install --upgrade fusewright")  # fmt: skip
    state = read_state(path)
    model = _empty(path) if module is None else module
    layers = {}
    for at, layer in said["layers"].items():
        dtype = state[f"{at}.up"].dtype
        layers[at] = _KINDS[layer.pop("kind")].like(model.get_submodule(at), layer, dtype)
    replaced(model, layers)
    missing, unexpected = model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters())
    persistent = [n for n in missing if n in parameters and n not in said["left"]]
    if persistent or unexpected:
        raise WeightsError("the tensors are not those of the described model", where=path,
                           expected=", ".join(persistent[:3]) or "no more",
                           found=", ".join(list(unexpected)[:3]) or "without them")  # fmt: skip
    return model.eval()


def _empty(path: Path) -> nn.Module:
    """The architecture that the folder's config names, with any weights."""
    from fusewright.extras import needs

    transformers: Any = needs("transformers", "transformers")
    cls = class_of(path)
    if cls is None:
        raise WeightsError("the config does not say what module the base is", where=path,
                           expected="architectures: [a class of transformers]",
                           fix="fw.load(path, module=...)")  # fmt: skip
    model: nn.Module = cls(transformers.AutoConfig.from_pretrained(path))
    return model


def _said(layer: nn.Module) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if type(layer) is cls)
    assert isinstance(layer, RoutedLinear)
    return {"kind": kind, **layer.described()}


def _count(module: nn.Module) -> int:
    return sum(t.numel() for t in module.state_dict().values())

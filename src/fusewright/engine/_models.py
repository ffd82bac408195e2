"""Models opened side by side, matched by name without refusing what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewright.engine._pairs import Source, make_source
from fusewright.layout import ModelLayout, describe
from fusewright.weights import Alignment, TensorInfo, Weights, align, canonical, open_weights

Ref = Any
"""A path, a Hub id, a module, a state dict or Weights."""


@dataclass(frozen=True)
class Matched:
    """A base and experts under canonical names; ``alignment`` holds no refusals: whatever is
    missing or extra is in each expert's ``absent`` and ``skipped``."""

    base: Weights
    experts: Mapping[str, Weights]
    layout: ModelLayout
    alignment: Alignment

    def info(self, expert: str, name: str) -> TensorInfo | None:
        own = self.alignment.experts[expert].names.get(name)
        return None if own is None else self.experts[expert][own]

    def base_info(self, name: str) -> TensorInfo | None:
        assert self.alignment.base is not None
        own = self.alignment.base.names.get(name)
        return None if own is None else self.base[own]

    def sources(self) -> list[Source]:
        """What can be compared: tensors of the same shape and kind; tied ones once."""
        found = []
        for name in self.alignment.names:
            info = self.base_info(name)
            if info is not None:
                own = tuple(self._comparable(key, name, info) for key in self.experts)
                if any(own):
                    found.append(make_source(name, info, tuple(self.experts.values()), own))
        return found

    def _comparable(self, expert: str, name: str, base: TensorInfo) -> str | None:
        info = self.info(expert, name)
        return info.name if info is not None and comparable(base, info) else None


def comparable(base: TensorInfo, expert: TensorInfo) -> bool:
    """Whether a difference of the two means something."""
    return base.shape == expert.shape and base.dtype.kind == expert.dtype.kind


def match(base: Weights, experts: Mapping[str, Weights]) -> Matched:
    """Describe the base and find every expert's tensors by the rules of
    :func:`fusewright.weights.align`. Raises WeightsError where a name is ambiguous."""
    layout = described(base)
    alignment = align(base, experts, layout.tied, untie=True, optional=("*",))
    return Matched(base, experts, layout, alignment)


def described(weights: Weights) -> ModelLayout:
    """The layout that a model's names, shapes and config tell."""
    shapes = {name: info.shape for name, info in weights.items()}
    kinds = {name: info.dtype.kind for name, info in weights.items()}
    return describe(shapes, kinds, weights.config)


@contextmanager
def opened(refs: Sequence[Ref], base: Ref | None = None) -> Iterator[list[Weights]]:
    """Open the base (or the first) and the others over it; close what was opened here."""
    with ExitStack() as stack:
        first: Weights | None = None
        found = []
        for ref in refs if base is None else [base, *refs]:
            weights = open_weights(ref, base=first)
            if weights is not ref:
                stack.callback(weights.close)
            first = first if first is not None else weights
            found.append(canonical(weights))
        yield found


def names_of(labels: Sequence[str]) -> list[str]:
    """A short, unique name for each label: its last part, or itself, or with a number."""
    short = [Path(label).name or label for label in labels]
    pairs = zip(labels, short, strict=True)
    names = [label if short.count(name) > 1 else name for label, name in pairs]
    return [
        f"{name}#{names[: at + 1].count(name)}" if names.count(name) > 1 else name
        for at, name in enumerate(names)
    ]

"""Models opened side by side, matched by name without refusing what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewright.engine._pairs import Source
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
                    found.append(Source(name, info.name, own, info.numel, info.dtype.is_float))
        return found

    def _comparable(self, expert: str, name: str, base: TensorInfo) -> str | None:
        info = self.info(expert, name)
        same = info is not None and info.shape == base.shape
        return info.name if info and same and info.dtype.kind == base.dtype.kind else None


def match(base: Weights, experts: Mapping[str, Weights]) -> Matched:
    """Describe the base and find every expert's tensors by the rules of
    :func:`fusewright.weights.align`. Raises WeightsError where a name is ambiguous."""
    layout = described(base)
    alignment = align(base, experts, layout.tied, untie=True, optional=("*",))
    return Matched(base, experts, layout, alignment)


def described(weights: Weights) -> ModelLayout:
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


def names_of(weights: Sequence[Weights]) -> list[str]:
    """A short, unique name for each: the last part of its label, the label, or a number."""
    short = [Path(w.label).name or w.label for w in weights]
    labels = [w.label if short.count(s) > 1 else s for w, s in zip(weights, short, strict=True)]
    return [
        f"{label}#{labels[: at + 1].count(label)}" if labels.count(label) > 1 else label
        for at, label in enumerate(labels)
    ]

"""The models of a recipe, opened, aligned by name and described."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewright.engine.recipe import Recipe
from fusewright.errors import OutputError, PlanError
from fusewright.layout import ModelLayout, describe
from fusewright.weights import Alignment, TensorInfo, Weights, align, canonical, open_weights

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Inputs:
    """Opened models. ``vectors`` are the names of those that are merged, in order; ``reference``
    names the one whose tensors, buffers and files the output takes ("" for the base)."""

    base: Weights | None
    experts: Mapping[str, Weights]
    alignment: Alignment
    layout: ModelLayout
    tied: Groups = ()
    """Groups of names that share one tensor in the model."""

    @property
    def reference(self) -> Weights:
        return self.base if self.base is not None else next(iter(self.experts.values()))

    def name_in(self, model: str | None, tensor: str) -> str | None:
        """What ``tensor`` is called in a model (None = base); None where it is absent."""
        of = self.alignment.base if model is None else self.alignment.experts[model]
        return of.names.get(tensor) if of is not None else None

    def weights(self, model: str | None) -> Weights:
        if model is None:
            assert self.base is not None
            return self.base
        return self.experts[model]

    def info(self, model: str | None, tensor: str) -> TensorInfo | None:
        name = self.name_in(model, tensor)
        return None if name is None else self.weights(model)[name]

    def all(self) -> dict[str, Weights]:
        named = {} if self.base is None else {"base": self.base}
        return {**named, **{f"expert {k}": w for k, w in self.experts.items()}}

    @property
    def untied(self) -> bool:
        """Whether embeddings that the model ties are stored apart in the output."""
        names = {name for name in self.alignment.names if not name.endswith(".bias")}
        return any(len(names.intersection(group)) > 1 for group in self.tied)

    def paths(self) -> list[Path]:
        """Every folder and file that is read: the output may be none of them."""
        found: dict[Path, None] = {}
        for weights in self.all().values():
            if weights.root is not None:
                found[Path(weights.root)] = None
            found.update({identity.path: None for identity in weights.identities()})
        return list(found)

    def check_unchanged(self) -> None:
        """Refuse to publish a merge of files that changed while they were read."""
        for label, weights in self.all().items():
            for was in weights.identities():
                try:
                    now = was.path.stat()
                except OSError as error:
                    raise OutputError("an input vanished during the run", where=was.path,
                                      found=error) from error  # fmt: skip
                if (now.st_size, now.st_mtime_ns) != (was.size, was.mtime_ns):
                    raise OutputError(
                        "an input changed while it was read, so the result would be of no model",
                        where=f"{label}: {was.path}", fix="run the same command again",
                    )  # fmt: skip


@contextmanager
def open_inputs(recipe: Recipe, untie: bool = False) -> Iterator[Inputs]:
    """Open, align and describe the models of a recipe; close them afterwards."""
    if not recipe.experts:
        raise PlanError("there is nothing to merge", expected="at least one expert", found="none")
    with ExitStack() as stack:
        raw_base = None if recipe.base is None else _open(stack, recipe.base, None)
        base = None if raw_base is None else canonical(raw_base)
        experts = {
            name: canonical(_open(stack, entry.model, raw_base))
            for name, entry in recipe.experts.items()
        }
        reference = base if base is not None else next(iter(experts.values()))
        layout = _describe(reference)
        tied = _tied(reference, experts.values(), layout)
        alignment = align(base, experts, tied, untie=untie, optional=tuple(recipe.optional))
        layout = _covering(layout, alignment, reference, tied)
        yield Inputs(base, experts, alignment, layout, tied)


def _open(stack: ExitStack, ref: Any, base: Weights | None) -> Weights:
    weights = open_weights(ref, base=base)
    if weights is not ref:
        stack.callback(weights.close)
    return weights


def _describe(weights: Weights) -> ModelLayout:
    shapes = {name: info.shape for name, info in weights.items()}
    kinds = {name: info.dtype.kind for name, info in weights.items()}
    return describe(shapes, kinds, weights.config)


def _tied(reference: Weights, experts: Iterable[Weights], layout: ModelLayout) -> Groups:
    """Groups of names that share one tensor in the reference's model: by its config, over every
    name that some input stores; and by storage, where it is in memory."""
    groups = layout.tied
    shapes = {name: info.shape for w in experts for name, info in w.items()}
    if shapes.keys() - set(reference):
        shapes |= {name: info.shape for name, info in reference.items()}
        found = describe(shapes, None, reference.config).tied
        groups = tuple(group for group in found if group[0] in reference)
    taken = {name for group in groups for name in group}
    shared: Groups = getattr(reference, "tied", ())
    return (*groups, *(tuple(group) for group in shared if taken.isdisjoint(group)))


def _covering(
    layout: ModelLayout, alignment: Alignment, reference: Weights, tied: Groups
) -> ModelLayout:
    """The layout of the output, which may hold untied names that the reference does not store."""
    if all(name in layout for name in alignment.names):
        return layout
    shapes = {name: reference[name].shape for name in reference}
    for group in tied:
        stored = next((n for n in group if n in shapes), None)
        shapes.update({n: shapes[stored] for n in group if stored is not None})
    return describe(shapes, None, reference.config)

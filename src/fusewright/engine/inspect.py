"""What is in models, and how they differ: tensors, norms, cosines and sign conflicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fusewright.engine._models import Matched, Ref, described, match, names_of, opened
from fusewright.engine._pairs import Pairs, all_spans, compare
from fusewright.engine.options import parse_size
from fusewright.engine.progress import Listener
from fusewright.engine.subspaces import Subspaces, measure
from fusewright.engine.tables import Table
from fusewright.errors import PlanError
from fusewright.layout import Role, TensorLayout, canonical_order
from fusewright.modules.critical import kind_of
from fusewright.weights import Weights


@dataclass(frozen=True)
class TensorRow:
    """One stored tensor. ``layer`` is its block ("model.layers.3"), or its role outside blocks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    role: str
    layer: str


@dataclass(frozen=True)
class Model:
    """A model as its headers tell it."""

    name: str
    label: str
    tensors: tuple[TensorRow, ...]
    notes: tuple[str, ...]

    def totals(self, of: Callable[[TensorRow], str]) -> dict[str, tuple[int, int, int]]:
        """Tensors, elements and bytes, for each value of ``of``."""
        sums: dict[str, tuple[int, int, int]] = {}
        for row in self.tensors:
            count, elements, nbytes = sums.get(of(row), (0, 0, 0))
            sums[of(row)] = (count + 1, elements + _elements(row), nbytes + row.nbytes)
        return sums

    def to_json(self) -> dict[str, Any]:
        columns = ("tensors", "elements", "bytes")
        return {
            **asdict(self),
            "by_role": {k: dict(zip(columns, v, strict=True))
                        for k, v in self.totals(lambda row: row.role).items()},
            "by_dtype": {k: dict(zip(columns, v, strict=True))
                         for k, v in self.totals(lambda row: row.dtype).items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A tensor that is missing or extra in an expert, or of another shape or dtype there."""

    expert: str
    tensor: str
    kind: str
    base: str | None
    found: str | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Task vectors τ_t = θ_t - θ0 of experts over a base: for each tensor, each layer, each kind of
    module (a bias is of its weight's kind), and over the model. Tied tensors count once; a tensor
    of another shape is listed in ``differences`` and counts as unchanged in that expert."""

    base: str
    experts: tuple[str, ...]
    tensors: Mapping[str, Pairs]
    layers: Mapping[str, Pairs]
    kinds: Mapping[str, Pairs]
    whole: Pairs
    differences: tuple[Difference, ...]

    def numbers(self, pairs: Pairs) -> dict[str, Any]:
        """Norms ‖τ‖ and ‖τ‖/‖θ0‖, changed fractions, cosines between experts, and the fraction of
        coordinates, of those that two experts or more change, on which signs disagree."""
        keys = list(enumerate(self.experts))
        return {
            "norm": {key: pairs.norm(t) for t, key in keys},
            "relative_norm": {key: pairs.relative(t) for t, key in keys},
            "changed": {key: pairs.changed_fraction(t) for t, key in keys},
            "cosines": {a: {b: pairs.cosine(i, j) for j, b in keys} for i, a in keys},
            "shared": pairs.shared,
            "sign_conflicts": pairs.conflict_rate,
            "nonfinite": dict(zip((self.base, *self.experts), pairs.bad.tolist(), strict=True)),
        }

    def critical(self, pairs: Pairs) -> dict[str, float | None]:
        """What E-WEMoE (2410.21804) calls modules critical by, means over experts: "l2" ‖τ‖, and,
        because that grows with the ``elements`` n, "rms" ‖τ‖/√n and "relative" ‖τ‖/‖θ0‖."""
        each = range(len(self.experts))
        l2, n = fmean(pairs.norm(t) for t in each), int(pairs.elements.max())
        relative = [value for t in each if (value := pairs.relative(t)) is not None]
        return {
            "elements": n, "l2": l2, "rms": l2 / n**0.5 if n else None,
            "relative": fmean(relative) if relative else None,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "experts": list(self.experts),
            "model": self.numbers(self.whole),
            "layers": {name: self.numbers(pairs) for name, pairs in self.layers.items()},
            "kinds": {name: self.critical(pairs) for name, pairs in self.kinds.items()},
            "tensors": {name: self.numbers(pairs) for name, pairs in self.tensors.items()},
            "differences": [asdict(one) for one in self.differences],
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """Models, and how the later ones differ from the first (None for a single one); in which of its
    singular directions, where that was asked for."""

    models: tuple[Model, ...]
    comparison: Comparison | None
    subspaces: Subspaces | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers; None where a number does not apply."""
        done = self.comparison
        return {
            "models": [model.to_json() for model in self.models],
            "comparison": None if done is None else done.to_json(),
            "subspaces": None if self.subspaces is None else self.subspaces.to_json(),
        }

    def tables(self) -> list[Table]:
        """What :meth:`to_json` holds, for reading: one model's tensors and totals; or the models,
        their task vectors, cosines, kinds of modules, subspaces, layers, tensors, differences."""
        from fusewright.engine import _inspect_tables as tables

        if self.comparison is None:
            return tables.of_model(self.models[0])
        return tables.of_comparison(self.models, self.comparison, self.subspaces)

    def save_png(self, path: str | Path) -> None:
        """A picture: norms and sign conflicts by layer and the cosines of task vectors, and their
        subspaces; for one model, its bytes by role. Needs matplotlib."""
        from fusewright.engine._plot import draw

        draw(self, Path(path))


def inspect_models(
    refs: Sequence[Ref],
    *,
    base: Ref | None = None,
    subspace: bool = False,
    threads: int = 2,
    memory: int | str = 2**30,
    progress: Listener | None = None,
) -> Inspection:
    """Look into one model (headers only), or compare several with the first or with ``base``.

    ``refs`` are paths, Hub ids, adapters (over the base), modules or state dicts. Comparing reads
    every byte once, in chunks of at most 262,144 elements, with no more than ``memory`` bytes in
    all threads; ``progress`` hears of the bytes of all models. NaN and infinities are counted and
    left out of the sums. ``subspace`` also decomposes every matrix of the base, one after the other
    (half a second of one core for 3072 x 768), and says in which of its singular directions the
    task vectors lie.

    Raises WeightsError, and PlanError if ``memory`` is too small or ``subspace`` has no expert.
    """
    with opened(refs, base) as weights:
        names = names_of([one.label for one in weights])
        layouts = [described(one) for one in weights]
        models = tuple(
            _model(name, one, layout)
            for name, one, layout in zip(names, weights, layouts, strict=True)
        )
        if len(weights) == 1:
            if subspace:
                raise PlanError("task vectors need a base and an expert", found=names[0],
                                fix="fusewright inspect BASE EXPERT... --subspace")  # fmt: skip
            return Inspection(models, None)
        experts = dict(zip(names[1:], weights[1:], strict=True))
        matched = match(weights[0], experts)
        spans = all_spans(matched.sources(), len(experts), threads, parse_size(memory))
        found = compare(weights[0], weights[1:], spans, threads=threads, progress=progress)
        order = _in_order(matched, found)
        done = _comparison(names[0], matched, {name: found[name] for name in order})
        subspaces = measure(
            names[0], matched, order, layer_of, threads=threads, memory=parse_size(memory),
            progress=progress,
        ) if subspace else None  # fmt: skip
        return Inspection(models, done, subspaces)


def _model(name: str, weights: Weights, layout: Mapping[str, TensorLayout]) -> Model:
    rows = tuple(
        TensorRow(key, info.dtype.torch_name, info.shape, info.nbytes,
                  str(layout[key].role), layer_of(layout[key]))
        for key in canonical_order(weights)
        for info in (weights[key],)
    )  # fmt: skip
    return Model(name, weights.label, rows, weights.notes)


def layer_of(place: TensorLayout) -> str:
    """The name under which a tensor is summed up: its block, or its role outside of blocks."""
    return str(place.role) if place.layer is None else f"{place.stack}.{place.layer}"


def _comparison(base: str, matched: Matched, found: Mapping[str, Pairs]) -> Comparison:
    experts, n = tuple(matched.experts), len(matched.experts)

    def summed(of: Callable[[str], str]) -> dict[str, Pairs]:
        groups: dict[str, list[Pairs]] = {}
        for name, pairs in found.items():
            groups.setdefault(of(name), []).append(pairs)
        return {group: Pairs.total(parts, n) for group, parts in groups.items()}

    return Comparison(
        base, experts, {name: found[name] for name in canonical_order(found)},
        summed(lambda name: layer_of(matched.layout[name])),
        summed(lambda name: kind_of(matched.layout, name)),
        Pairs.total(list(found.values()), n), tuple(differences(matched)),
    )  # fmt: skip


def _in_order(matched: Matched, names: Iterable[str]) -> list[str]:
    """By layer, then as names are ordered."""
    return sorted(canonical_order(names), key=lambda name: _depth(matched.layout[name]))


def _depth(place: TensorLayout) -> tuple[int, str, int]:
    """Embeddings and what else is outside first, then blocks in order, heads last."""
    if place.layer is not None:
        return 1, place.stack, place.layer
    return (2 if place.fraction else 0), str(place.role is Role.HEAD), 0


def differences(matched: Matched) -> Iterable[Difference]:
    """Missing, extra, reshaped and retyped tensors of every expert."""
    for expert, aligned in matched.alignment.experts.items():
        for name in aligned.absent:
            yield Difference(expert, name, "missing", _said(matched.base_info(name)), None)
        for own in aligned.skipped:
            found = matched.experts[expert][own]
            yield Difference(expert, own, "extra", None, _said(found))
        for name in aligned.names:
            base, info = matched.base_info(name), matched.info(expert, name)
            if base is None or info is None:
                continue
            if base.shape != info.shape:
                yield Difference(expert, name, "shape", _said(base), _said(info))
            elif base.dtype != info.dtype and not _computed(matched, expert, name):
                yield Difference(expert, name, "dtype", _said(base), _said(info))


def _computed(matched: Matched, expert: str, name: str) -> bool:
    """Whether an adapter makes this tensor, in a dtype of its own choice."""
    own = matched.alignment.experts[expert].names[name]
    return matched.experts[expert].delta(own) is not None


def _said(info: Any) -> str | None:
    return None if info is None else f"{info.dtype.torch_name} {list(info.shape)}"


def _elements(row: TensorRow) -> int:
    count = 1
    for size in row.shape:
        count *= size
    return count

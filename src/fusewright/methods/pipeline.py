"""Maps: stages composed with ``>>``, executed unit by unit.

θ = θ0 + F_k(… F_1(M(T(τ_1), …, T(τ_n)))) for a merger of task vectors, θ = M(θ_1, …, θ_n) for a
merger of weights. One rounding, to the storage dtype, comes after all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from fusewright.errors import PlanError, RecipeError
from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import (
    At,
    Card,
    Composite,
    Finish,
    Merger,
    Method,
    Program,
    Round,
    Seen,
    Stage,
    Transform,
    Unit,
)
from fusewright.methods.partials import Partial
from fusewright.methods.settings import Reach, reach_of, resolve, varies

Key = tuple[int, str]
"""A round's identity in a pipeline: (index of its stage, its name)."""


@dataclass(frozen=True)
class Step:
    """A round together with the stage that asks for it."""

    index: int
    round: Round

    @property
    def key(self) -> Key:
        return self.index, self.round.name


class Pipeline(Method):
    """Transforms, then one merger, then finishes; itself a Map."""

    name: ClassVar[str] = "pipeline"
    card: ClassVar[Card] = Card(title="Pipeline of stages", paper="")

    chain: tuple[Any, ...]

    @field_validator("chain")
    @classmethod
    def _is_typed(cls, chain: tuple[Any, ...]) -> tuple[Any, ...]:
        _check_chain(chain)
        return chain

    def stages(self) -> tuple[Stage, ...]:
        return self.chain

    def __rshift__(self, other: Stage | Pipeline | Composite) -> Pipeline:
        return Pipeline(chain=(*self.chain, *other.stages()))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.chain))

    def spec(self) -> Any:
        return [stage.spec() for stage in self.chain]

    @property
    def merger(self) -> Merger:
        return next(s for s in self.chain if isinstance(s, Merger))

    @property
    def frame(self) -> str:
        return self.merger.frame

    def steps(self, dtype: torch.dtype) -> tuple[Step, ...]:
        """Every round of every stage, in the order in which they run."""
        return tuple(
            Step(i, round_) for i, s in enumerate(self.chain) for round_ in s.rounds(dtype)
        )

    def unit(self, shape: tuple[int, ...], layout: TensorLayout) -> Unit:
        """The widest unit that any stage asks for."""
        order = list(Unit)
        return max((s.unit(shape, layout) for s in self.chain), key=order.index)

    def vectors(self, weights: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
        """What the merger merges: task vectors, or the weights as they are."""
        if self.frame == "weights" or base is None:
            return list(weights)
        return [w - base for w in weights]

    def measure(
        self, step: Step, vectors: Sequence[Tensor], base: Tensor | None, place: Place
    ) -> Partial:
        """One round's partial over one unit; earlier rounds must be solved."""
        stage, at = self.chain[step.index], place.at(step.index)
        if not isinstance(stage, Finish):
            return step.round.measure(Seen(self._apply(vectors, place, step.index), base), at)
        merged = self._merge(vectors, base, place, step.index)
        return step.round.measure(Seen(vectors, base, merged), at)

    def combine(self, vectors: Sequence[Tensor], base: Tensor | None, place: Place) -> Tensor:
        """The merged weights of one unit, in the dtype of the arithmetic."""
        merged = self._merge(vectors, base, place, len(self.chain))
        return merged if self.frame == "weights" or base is None else base + merged

    def _apply(self, vectors: Sequence[Tensor], place: Place, stop: int) -> list[Tensor]:
        vectors = list(vectors)
        for i, stage in enumerate(self.chain[:stop]):
            if isinstance(stage, Transform):
                at = place.at(i)
                vectors = [_shaped(stage, stage.apply(v, k, at), v) for k, v in enumerate(vectors)]
        return vectors

    def _merge(
        self, vectors: Sequence[Tensor], base: Tensor | None, place: Place, stop: int
    ) -> Tensor:
        at_merger = self.chain.index(self.merger)
        applied = self._apply(vectors, place, at_merger)
        merged = self.merger.merge(applied, base, place.at(at_merger))
        merged = _shaped(self.merger, merged, applied[0])
        for i, stage in enumerate(self.chain[:stop]):
            if isinstance(stage, Finish):
                merged = _shaped(stage, stage.finish(merged, vectors, place.at(i)), merged)
        return merged


def _shaped(stage: Stage, found: Tensor, given: Tensor) -> Tensor:
    # Broadcasting would hide a wrong shape when the result is added to the base.
    if found.shape != given.shape or found.dtype != given.dtype:
        raise PlanError(
            f"{stage.name} must keep the shape and dtype of what it is given",
            expected=f"{tuple(given.shape)} {given.dtype}",
            found=f"{tuple(found.shape)} {found.dtype}",
        )
    return found


def _check_chain(chain: tuple[Any, ...]) -> None:
    mergers = [s for s in chain if isinstance(s, Merger)]
    ranks = [next((r for r, k in enumerate(_ORDER) if isinstance(s, k)), -1) for s in chain]
    if len(mergers) != 1 or ranks != sorted(ranks) or -1 in ranks:
        raise RecipeError(
            "these stages do not compose",
            expected="transforms of task vectors, then one merger, then finishes",
            found=" >> ".join(f"{type(s).__name__} ({_kind(s)})" for s in chain),
            fix=None if mergers else "add a merger, such as >> Sum() or >> Elect()",
        )
    if mergers[0].frame == "weights" and len(chain) > 1:
        raise RecipeError(
            f"{mergers[0].name} merges weights, not task vectors, so no other stage can join it",
            fix="use Sum() or Mean() in a pipeline",
        )


_ORDER = (Transform, Merger, Finish)


def _kind(stage: Any) -> str:
    return next((k.__name__.lower() for k in _ORDER if isinstance(stage, k)), "not a stage")


def as_pipeline(method: Method) -> Pipeline:
    """Any Map as a pipeline."""
    if isinstance(method, Pipeline):
        return method
    if isinstance(method, Stage | Composite):
        return Pipeline(chain=method.stages())
    raise PlanError(
        f"{method.name} is not a Map",
        fix="run it through fw.merge" if isinstance(method, Program) else None,
    )


@dataclass(frozen=True)
class Place:
    """A unit's place, with the parameters and solved rounds of every stage of a pipeline."""

    where: At
    params: tuple[SimpleNamespace, ...]
    solved: Mapping[Key, Any]

    def at(self, index: int) -> At:
        """What stage ``index`` sees."""
        solved = {name: value for (i, name), value in self.solved.items() if i == index}
        params = self.params[index]
        seed = getattr(params, "seed", None)
        where = self.where
        return where.replaced(
            params=params, solved=solved, seed=where.seed if seed is None else seed
        )


def resolved(
    stage: Stage, layout: TensorLayout, experts: tuple[str, ...]
) -> SimpleNamespace:
    """A stage's parameters for one tensor: scalars, and tuples over experts for PerExpert."""
    found: dict[str, Any] = {}
    for name, info in type(stage).model_fields.items():
        value, reach = getattr(stage, name), reach_of(info.metadata)
        if reach is Reach.EXPERT:
            default = info.get_default()
            found[name] = tuple(resolve(value, layout, e, default) for e in experts)
        else:
            found[name] = resolve(value, layout) if reach is Reach.TENSOR else value
    return SimpleNamespace(**found)


def check_uniform(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """Refuse parameters that vary over tensors where a round needs one value for the model."""
    for step in pipeline.steps(dtype):
        stage = pipeline.chain[step.index]
        for name in step.round.uniform if step.round.scope == "model" else ():
            if varies(getattr(stage, name)):
                raise PlanError(
                    f"{stage.name}: {name!r} varies over tensors, but its {step.round.name} is "
                    "found over the whole model",
                    fix="give one value, or set scope: tensor",
                )

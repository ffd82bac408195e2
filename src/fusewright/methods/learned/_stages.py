"""Task vectors as the stages of a pipeline leave them, for what is learned to weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright.errors import RecipeError
from fusewright.methods.contract import At, Context, Finish, Merger, Method, Transform, Unit
from fusewright.methods.door import unit_shape, with_solved
from fusewright.methods.partials import Partial
from fusewright.methods.pipeline import Pipeline, Place, Step, as_pipeline, resolved
from fusewright.methods.static._agree import Agree
from fusewright.methods.static._sum import Sum
from fusewright.modules.vectors import TaskVectors


def adding(method: Method) -> Pipeline:
    """A Map that transforms task vectors one by one and adds them by weights. Raises RecipeError
    for any other."""
    pipeline = as_pipeline(method)
    merger = pipeline.merger
    plain = type(merger)()
    own = {k: getattr(merger, k) for k in ("weight", "scale", "normalize") if hasattr(merger, k)}
    fits = type(merger) in (Sum, Agree) and all(getattr(plain, k) == v for k, v in own.items())
    if not fits or any(isinstance(stage, Finish) for stage in pipeline.chain):
        raise RecipeError(
            "only weights of task vectors that are added can be learned",
            expected="transforms, then sum or agree, their weight and scale as they are",
            found=repr(pipeline), fix='merger="trim >> agree"',
        )  # fmt: skip
    return pipeline


def with_weight(pipeline: Pipeline, weight: Mapping[str, Any]) -> Pipeline | Merger:
    """The same, adding by these weights."""
    merger = pipeline.merger
    fields = {k: getattr(merger, k) for k in type(merger).model_fields}
    weighted = type(merger)(**{**fields, "weight": weight})
    if len(pipeline.chain) == 1:
        return weighted
    return Pipeline(chain=tuple(weighted if s is merger else s for s in pipeline.chain))


class Staged:
    """What a pipeline's merger adds: task vectors after its transforms, and after the election."""

    def __init__(self, pipeline: Pipeline, vectors: TaskVectors, context: Context) -> None:
        self._pipeline, self._given, self._context = pipeline, vectors, context
        self._solved: dict[tuple[int, str], Any] = {}
        wide = any(t.dtype == torch.float64 for t in vectors.base.values())
        self._dtype = torch.float64 if wide else torch.float32
        for step in pipeline.steps(self._dtype):
            if step.round.scope == "model":
                self._solved[step.key] = self._solve_model(step)

    def vectors(self) -> TaskVectors:
        """The changed task vectors, held in memory if the given ones are."""
        if self._pipeline.chain == (Sum(),):
            return self._given
        changed = self._given.together(self._changed)
        return changed.kept() if self._given.held else changed

    def _changed(self, name: str, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        place, merger = self._place(name), self._pipeline.merger
        shape = vectors[0].shape
        cut = self._cut(name, vectors)
        solved = self._solve_tensor(name, cut)
        at = self._pipeline.chain.index(merger)
        for index, stage in enumerate(self._pipeline.chain[:at]):
            assert isinstance(stage, Transform)
            where = with_solved(place, solved).at(index)
            cut = [stage.apply(vector, t, where) for t, vector in enumerate(cut)]
        if isinstance(merger, Agree):
            cut = merger.kept(cut, with_solved(place, solved).at(at))
        return [vector.reshape(shape) for vector in cut]

    def _solve_model(self, step: Step) -> Any:
        where = self._model_place().at(step.index)
        if not step.round.needed(where):
            return step.round.solve(None, where)
        total: Partial | None = None
        for name in self._given.names:
            cut = self._cut(name, [delta.dense() for delta in self._given.at(name)])
            solved = self._solve_tensor(name, cut, step.key)
            part = self._measured(step, name, cut, solved)
            total = part if total is None else total + part
        assert total is not None
        return step.round.solve(total.rounded(), where)

    def _solve_tensor(
        self, name: str, cut: Sequence[Tensor], until: tuple[int, str] | None = None
    ) -> Mapping[tuple[int, str], Any]:
        solved = dict(self._solved)
        for step in self._pipeline.steps(self._dtype):
            if step.key == until:
                break
            if step.round.scope == "tensor":
                where = with_solved(self._place(name), solved).at(step.index)
                if step.round.needed(where):
                    found = self._measured(step, name, cut, solved).rounded()
                    solved[step.key] = step.round.solve(found, where)
                else:
                    solved[step.key] = step.round.solve(None, where)
        return solved

    def _measured(
        self, step: Step, name: str, cut: Sequence[Tensor], solved: Mapping[tuple[int, str], Any]
    ) -> Partial:
        return self._pipeline.measure(step, cut, None, with_solved(self._place(name), solved))

    def _cut(self, name: str, vectors: Sequence[Tensor]) -> list[Tensor]:
        shape = tuple(vectors[0].shape)
        unit = self._pipeline.unit(shape, self._context.layout(name))
        shaped = unit_shape(shape, unit, vectors[0].numel()) if unit is not Unit.TENSOR else shape
        return [vector.to(self._dtype).reshape(shaped) for vector in vectors]

    def _place(self, name: str) -> Place:
        layout, tensor = self._context.layout(name), self._given.base[name]
        keys = self._given.experts
        params = tuple(resolved(stage, layout, keys) for stage in self._pipeline.chain)
        where = At(self._context.stored(name), tuple(tensor.shape), 0, tensor.numel(), keys, layout,
                   self._dtype, self._context.seed)  # fmt: skip
        return Place(where, params, {})

    def _model_place(self) -> Place:
        place = self._place(self._given.names[0])
        total = sum(tensor.numel() for tensor in self._given.base.values())
        where = place.where.replaced(tensor="", shape=(total,), stop=total)
        return Place(where, place.params, dict(self._solved))

"""The tensor door: a Map on bare tensors, with the arithmetic and the chunks of the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusewright.errors import PlanError
from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At, Method, Unit
from fusewright.methods.partials import BLOCK, Partial
from fusewright.methods.pipeline import Key, Pipeline, Place, as_pipeline, resolved

CHUNK = 4 * BLOCK
"""Elements a chunk: small enough that a worker's temporaries stay in its cache."""


def on_tensors(
    method: Method,
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    keys: Sequence[str] | None = None,
    name: str = "tensor",
    layout: TensorLayout | None = None,
    seed: int = 0,
) -> Tensor:
    """Merge bare tensors of one shape; "over the model" means over this tensor.

    Returns the base's dtype (the first expert's without a base). Arithmetic is in float32, or
    float64 if any input is. ``keys`` name the experts ("0", "1", … by default) and, with ``name``
    and ``seed``, decide random draws.
    """
    pipeline = as_pipeline(method)
    keys = tuple(keys or map(str, range(len(experts))))
    if base is not None and counts_base(pipeline, len(experts)):
        keys, experts = ("base", *keys), [base, *experts]
    given = [t for t in (base, *experts) if t is not None]
    check_tensors(pipeline, base, experts)
    like = given[0]
    if not like.is_floating_point():
        return like.clone()
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    layout = layout or TensorLayout(name, matrix=like.dim() == 2)
    where = At(name, tuple(like.shape), 0, like.numel(), keys, layout, dtype, seed)
    params = tuple(resolved(stage, layout, keys) for stage in pipeline.chain)
    place = Place(where, params, {})
    for index, stage in enumerate(pipeline.chain):
        stage.check(place.at(index))
    return _run(pipeline, base, experts, place).to(like.dtype).reshape(like.shape)


def counts_base(pipeline: Pipeline, experts: int) -> bool:
    """Whether a base is merged as the first model: a merger of weights needs one more than given
    (slerp between the base and its one expert)."""
    merger = pipeline.merger
    return merger.frame == "weights" and experts == merger.card.experts[0] - 1 > 0


def check_tensors(pipeline: Pipeline, base: Tensor | None, experts: Sequence[Tensor]) -> None:
    """Refuse what the merger's card refuses, and shapes that differ."""
    merger = pipeline.merger
    check_counts(merger, base is not None, len(experts))
    shapes = {tuple(t.shape) for t in (base, *experts) if t is not None}
    if len(shapes) > 1:
        raise PlanError("tensors of one shape are expected", found=sorted(shapes))


def check_counts(method: Method, has_base: bool, experts: int) -> None:
    """Refuse a missing base and too few or too many experts."""
    card = method.card
    if card.base == "required" and not has_base:
        raise PlanError(
            f"{method.name} needs a base", found="none",
            fix="give base=..., the model that the experts were fine-tuned from",
        )  # fmt: skip
    low, high = card.experts
    if experts < low or (high is not None and experts > high):
        wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low}-{high}"
        raise PlanError(f"{method.name} merges another number of experts",
                        expected=wanted, found=experts)  # fmt: skip


def _run(
    pipeline: Pipeline, base: Tensor | None, experts: Sequence[Tensor], place: Place
) -> Tensor:
    solved: dict[Key, Any] = {}
    units = list(_units(pipeline, base, experts, place))
    for step in pipeline.steps(place.where.dtype) if units else ():
        where = with_solved(place, solved).at(step.index)
        if not step.round.needed(where):
            solved[step.key] = step.round.solve(None, where)
            continue
        partial: Partial | None = None
        for b, vectors, spot in units[:: step.round.every]:
            part = pipeline.measure(step, vectors, b, with_solved(spot, solved))
            partial = part if partial is None else partial + part
        if partial is not None:
            solved[step.key] = step.round.solve(partial.rounded(), where)
    done = [
        pipeline.combine(vectors, b, with_solved(spot, solved)).reshape(-1)
        for b, vectors, spot in units
    ]
    return torch.cat(done) if done else experts[0].reshape(-1)


def with_solved(place: Place, solved: Mapping[Key, Any]) -> Place:
    """The same place, knowing what was solved by now."""
    return Place(place.where, place.params, dict(solved))


def _units(
    pipeline: Pipeline, base: Tensor | None, experts: Sequence[Tensor], place: Place
) -> Any:
    where = place.where
    unit = pipeline.unit(where.shape, where.layout)
    for start, stop in spans(where.shape, unit):

        def cut(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
            flat = t.reshape(-1)[start:stop].to(where.dtype)
            return flat.reshape(unit_shape(where.shape, unit, stop - start))

        spot = Place(where.replaced(start=start, stop=stop), place.params, place.solved)
        seen = None if base is None else cut(base)
        yield seen, pipeline.vectors([cut(t) for t in experts], seen), spot


def spans(
    shape: tuple[int, ...], unit: Unit, chunk: int | None = None
) -> list[tuple[int, int]]:
    """The element ranges in which a tensor is treated; ``chunk`` (whole canonical blocks; CHUNK by
    default) is how many elements of one that can be cut anywhere."""
    numel = int(torch.Size(shape).numel())
    if numel == 0:
        return []
    if unit is Unit.TENSOR:
        return [(0, numel)]
    size = chunk or CHUNK
    if unit is Unit.ROWS:
        # Whole rows and whole canonical blocks: what is written is hashed by blocks.
        common = math.lcm(shape[-1] if shape else 1, BLOCK)
        size = max(CHUNK // common, 1) * common
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


def unit_shape(shape: tuple[int, ...], unit: Unit, elements: int) -> tuple[int, ...]:
    """The shape in which a unit of ``elements`` elements is given to the stages."""
    if unit is Unit.TENSOR:
        return shape
    if unit is Unit.ROWS:
        columns = shape[-1] if shape else 1
        return (elements // columns, columns)
    return (elements,)

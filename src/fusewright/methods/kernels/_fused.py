"""The pipelines that have fused twins: weighted sums, with or without Drop, and TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.methods.contract import At, Merger, Stage
from fusewright.methods.kernels import _tiles
from fusewright.methods.order import (
    DIGIT,
    measure_bracket,
    measure_sample,
    stands_for,
)
from fusewright.methods.partials import BLOCK, Partial
from fusewright.methods.pipeline import Pipeline, Place, Step
from fusewright.methods.random import Stream, threshold
from fusewright.methods.static import Drop, Elect, ModelStock, Slerp, Trim
from fusewright.methods.static._weighted import Weighted
from fusewright.weights.spec import DType

_STORED = {DType.BF16: (np.uint16, 16), DType.F32: (np.uint32, 0)}
Raw = NDArray[Any]


@dataclass(frozen=True)
class Raws:
    """A unit's raw inputs, all of one storage dtype, and their shift to float32."""

    base: Raw | None
    vectors: tuple[Raw, ...]
    shift: int

    @classmethod
    def of(cls, base: Tensor | None, vectors: Sequence[Tensor], stored: DType) -> Raws:
        kind, shift = _STORED[stored]
        arrays = tuple(v.numpy().view(kind) for v in vectors)
        return cls(None if base is None else base.numpy().view(kind), arrays, shift)


class Twin(Protocol):
    """The part of a kernel that differs: how a unit is combined and measured."""

    def combine(self, raws: Raws, out: Raw, out_shift: int, place: Place) -> int: ...

    def measures(self, step: Step) -> bool: ...

    def measure(
        self, step: Step, raws: Raws, place: Place, into: Partial | None
    ) -> Partial | None: ...


@dataclass(frozen=True)
class FusedKernel:
    """A :class:`~fusewright.methods.kernels.Kernel` for bfloat16 and float32 storage."""

    name: str
    twin: Twin

    def takes(self, inputs: Sequence[DType], output: DType) -> bool:
        return len(set(inputs)) == 1 and inputs[0] in _STORED and output in _STORED

    def measures(self, step: Step) -> bool:
        return self.twin.measures(step)

    def run(
        self, base: Tensor | None, vectors: Sequence[Tensor], dtypes: Sequence[DType],
        out: Tensor, out_dtype: DType, place: Place,
    ) -> bool:  # fmt: skip
        kind, out_shift = _STORED[out_dtype]
        raws = Raws.of(base, vectors, dtypes[0])
        return not self.twin.combine(raws, out.numpy().view(kind), out_shift, place)

    def measure(
        self, step: Step, base: Tensor | None, vectors: Sequence[Tensor],
        dtypes: Sequence[DType], place: Place, into: Partial | None = None,
    ) -> Partial | None:  # fmt: skip
        return self.twin.measure(step, Raws.of(base, vectors, dtypes[0]), place, into)


@dataclass(frozen=True)
class SumTwin:
    """[Drop >>] a weighted sum of weights or of task vectors."""

    pipeline: Pipeline
    drop: Drop | None

    def measures(self, step: Step) -> bool:
        return isinstance(self.pipeline.chain[step.index], Slerp | ModelStock)

    def measure(
        self, step: Step, raws: Raws, place: Place, into: Partial | None
    ) -> Partial | None:
        many, blocks = len(raws.vectors), -(-len(raws.vectors[0]) // BLOCK)
        sums = np.zeros((many * (many + 1) // 2, blocks))
        base = raws.base if self.pipeline.frame == "deltas" else None
        if _tiles.gram(base, raws.vectors, raws.shift, sums):
            return None
        return Partial({"gram": torch.from_numpy(sums)})

    def combine(self, raws: Raws, out: Raw, out_shift: int, place: Place) -> int:
        merger: Any = self.pipeline.merger
        at = place.at(self.pipeline.chain.index(merger))
        numbers = _numbers(merger, at)
        has_base = raws.base is not None
        keys, limits, factors = self._draws(place, len(raws.vectors))
        return int(_tiles.weighted_sum(
            raws.base if raws.base is not None else raws.vectors[0], raws.vectors, has_base,
            np.array(numbers, np.float32), self.drop is not None, keys, limits, factors,
            at.start, raws.shift, out, out_shift,
        ))  # fmt: skip

    def _draws(self, place: Place, many: int) -> tuple[Raw, Raw, Raw]:
        keys, limits = np.zeros((many, 4), np.uint32), np.full(many, 2**32, np.uint64)
        factors = np.ones(many, np.float32)
        if self.drop is not None:
            at = place.at(0)
            for t, density in enumerate(at.params.density):
                stream = Stream.of(at.seed, at.experts[t], at.tensor)
                keys[t] = (*stream.key, *stream.counter_high)
                limits[t] = threshold(density)
                factors[t] = self.drop._factor(t, at)
        return keys, limits, factors


@dataclass(frozen=True)
class TiesTwin:
    """Trim >> Elect, and Trim's histograms."""

    pipeline: Pipeline

    def measures(self, step: Step) -> bool:
        return True

    def measure(
        self, step: Step, raws: Raws, place: Place, into: Partial | None
    ) -> Partial | None:
        if step.index == 0:
            return self._magnitudes(step, raws, place.at(0), into)
        net = np.zeros(1, np.int64)
        weights = np.array(place.at(1).params.weight, np.float32)
        if _tiles.net_sign(
            raws.base, raws.vectors, self._limits(raws, place), weights, raws.shift, net
        ):
            return None
        return Partial(counts={"net": torch.tensor(int(net[0]))})

    def _limits(self, raws: Raws, place: Place) -> Raw:
        found = place.at(0).solved.get("threshold", [0.0] * len(raws.vectors))
        return np.array(found, np.float32)

    def _magnitudes(
        self, step: Step, raws: Raws, at: At, into: Partial | None
    ) -> Partial | None:
        how: Any = step.round.measure
        if how.func is measure_bracket:
            return self._bracket(raws, at, at.solved[how.keywords["sample"]]["bins"], into)
        sampled = how.func is measure_sample
        previous = None if sampled else how.keywords["previous"]
        prefixes = at.solved[previous]["prefix"] if previous else [-1] * len(raws.vectors)
        into = into or Partial(counts={"histogram": _counters(at, len(raws.vectors))})
        bad = _tiles.histograms(
            raws.base, raws.vectors, raws.shift, how.keywords["shift"],
            np.array(prefixes, np.int64), stands_for(at) if sampled else 1, into["histogram"],
        )  # fmt: skip
        return None if bad else into

    def _bracket(
        self, raws: Raws, at: At, bins: Sequence[Sequence[int]], into: Partial | None
    ) -> Partial | None:
        places = np.array(bins, np.int64)
        above = torch.zeros(places.shape, dtype=torch.int64)
        into = into or Partial(counts={"above": above, "inside": _counters(at, *places.shape)})
        bad = _tiles.bracket(
            raws.base, raws.vectors, raws.shift, places, into["above"], into["inside"]
        )
        return None if bad else into

    def combine(self, raws: Raws, out: Raw, out_shift: int, place: Place) -> int:
        at = place.at(1)
        elect: Any = self.pipeline.merger
        instead = {"positive": 1.0, "zero": 0.0}.get(elect.zero_sign)
        if instead is None:
            instead = float(at.solved["majority"])
        return int(_tiles.elect(
            raws.base, raws.vectors, self._limits(raws, place),
            np.array(at.params.weight, np.float32), elect.normalize, np.float32(instead),
            np.float32(at.params.scale), raws.shift, out, out_shift,
        ))  # fmt: skip


def _counters(at: At, *shape: int) -> Tensor:
    """A zero for each value of a digit: large, so made once for each thread and tensor."""
    kind = torch.int32 if at.numel < 2**31 else torch.int64
    return torch.zeros((*shape, 2**DIGIT), dtype=kind)


def _numbers(merger: Merger, at: Any) -> Sequence[float]:
    if isinstance(merger, Weighted):
        return merger.coefficients(at)
    weights: Sequence[float] = at.solved["arc"]["weights"]
    return weights


def fused(pipeline: Pipeline) -> FusedKernel | None:
    """The kernel of a pipeline, if its stages are exactly those of a twin."""
    chain: tuple[Stage, ...] = pipeline.chain
    if not all(map(_has_twin, chain)):
        return None
    match chain:
        case (Weighted() | Slerp(),):
            return FusedKernel("weighted_sum", SumTwin(pipeline, None))
        case (Drop() as drop, Weighted()):
            return FusedKernel("drop_sum", SumTwin(pipeline, drop))
        case (Trim(), Elect()):
            return FusedKernel("ties", TiesTwin(pipeline))
    return None


def _has_twin(stage: Stage) -> bool:
    # A subclass may do something else; a weighted sum may choose its numbers.
    if isinstance(stage, Weighted):
        return type(stage).merge is Weighted.merge
    return type(stage) in (Slerp, Drop, Trim, Elect)

"""One unit's work: read it, measure it or combine it, hash it and write it."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fusewright.engine.codec import Finite, check_input, decode, encode
from fusewright.engine.inputs import Inputs
from fusewright.engine.jobs import Action, Job, Model, memory_of_tensors
from fusewright.engine.planner import Plan
from fusewright.engine.read_digests import ReadDigests
from fusewright.errors import NumericError
from fusewright.methods.contract import At
from fusewright.methods.door import CHUNK, unit_shape
from fusewright.methods.partials import Partial
from fusewright.methods.pipeline import Key, Pipeline, Place, Step, resolved
from fusewright.weights import DType, LowRank, Weights
from fusewright.weights.digest import block_digests
from fusewright.weights.sink import Sink

Solved = Mapping[Key, Any]
Kept = dict[tuple[Model, int], tuple[Tensor, bytes]]
"""Bytes of a tensor's units that stay in memory between its waves, with their leaves."""


@dataclass(frozen=True)
class Unit:
    """Elements [start, stop) of one output tensor."""

    job: Job
    start: int
    stop: int
    kept: Kept | None = None

    @property
    def name(self) -> str:
        return self.job.info.name

    @property
    def task(self) -> str:
        return f"{self.name}:{self.start}:{self.stop}"

    def pieces(self) -> Iterator[Unit]:
        """Its chunks: a kernel's units are longer than the definition's temporaries should be."""
        for start in range(self.start, self.stop, CHUNK) if self.job.kernel else [self.start]:
            stop = min(start + CHUNK, self.stop) if self.job.kernel else self.stop
            yield replace(self, start=start, stop=stop, kept=None if self.job.kernel else self.kept)


class Worker:
    """Does units; one for all threads, each of which has its own read buffers."""

    def __init__(self, plan: Plan, inputs: Inputs, sink: Sink) -> None:
        self.plan, self.inputs, self.sink = plan, inputs, sink
        self.rule = Finite(plan.options.allow_nonfinite, plan.options.allow_overflow)
        self.device = torch.device(plan.options.device)
        self.disagreements: dict[str, int] = {}
        self.spare = Spare(memory_of_tensors(plan.options, plan.kernel) // 2)
        self._local = threading.local()
        self._count = threading.Lock()
        self.bytes_read = self.bytes_written = 0
        self.read = ReadDigests(plan, inputs)
        self._params: dict[tuple[str, Action], Any] = {}

    def measure(
        self, step: Step, unit: Unit, solved: Solved, into: Partial | None = None
    ) -> Partial:
        """One round's partial over a unit, or ``into`` (of earlier units) with it added."""
        kernel = self.plan.kernel
        if kernel is not None and unit.job.kernel and kernel.measures(step):
            base, vectors, dtypes = self._raws(unit, None)
            # What is not finite and allowed is measured again, and must not have been added.
            into = None if self.plan.options.allow_nonfinite else into
            place = self.place(unit, solved)
            partial = kernel.measure(step, base, vectors, dtypes, place, into)
            if partial is not None:
                return partial
        parts = [self._measured(step, piece, solved) for piece in unit.pieces()]
        return reduce(operator.add, parts)

    def _measured(self, step: Step, unit: Unit, solved: Solved) -> Partial:
        base, vectors, _ = self._numbers(unit, hashed=False)
        return self._pipeline(unit).measure(step, vectors, base, self.place(unit, solved))

    def combine(self, unit: Unit, solved: Solved) -> None:
        """Make a unit of the output, write it and commit it."""
        if unit.job.action is Action.COPY:
            raw, leaves = self._copied(unit)
        elif unit.job.kernel:
            raw, leaves = self._by_kernel(unit, solved)
        else:
            raw, leaves = self._by_definition(unit, solved, hashed=True)
        self._put(unit, raw, leaves)

    def _by_definition(
        self, unit: Unit, solved: Solved, hashed: bool
    ) -> tuple[Tensor, dict[str, str]]:
        base, vectors, leaves = self._numbers(unit, hashed)
        x = self._pipeline(unit).combine(vectors, base, self.place(unit, solved))
        raw = encode(x.reshape(-1).cpu(), unit.job.info.dtype, self._where(unit), self.rule)
        return raw, leaves

    def place(self, unit: Unit, solved: Solved) -> Place:
        """The unit's place for every stage."""
        job, plan = unit.job, self.plan
        at = At(job.info.name, job.info.shape, unit.start, unit.stop, plan.keys, job.layout,
                plan.dtype, plan.recipe.seed)  # fmt: skip
        key = (unit.name, job.action)
        if key not in self._params:
            self._params[key] = tuple(
                resolved(s, job.layout, plan.keys) for s in plan.pipeline(job.action).chain
            )
        return Place(at, self._params[key], solved)

    # -- reading -----------------------------------------------------------------------------

    def _pipeline(self, unit: Unit) -> Pipeline:
        return self.plan.pipeline(unit.job.action)

    def _where(self, unit: Unit) -> str:
        return f"{unit.name}, elements {unit.start}:{unit.stop}"

    def _numbers(
        self, unit: Unit, hashed: bool
    ) -> tuple[Tensor | None, list[Tensor], dict[str, str]]:
        """The base (where it is needed) and the vectors of a unit, in the dtype of arithmetic."""
        leaves: dict[str, str] = {}
        deltas = self._pipeline(unit).frame == "deltas"
        shape = unit_shape(unit.job.info.shape, unit.job.unit, unit.stop - unit.start)
        base = self._weights(None, unit, leaves if hashed else None, 0) if deltas else None
        vectors = []
        for slot, model in enumerate(self.plan.vectors, start=1):
            vector = self._known_delta(model, unit) if deltas else None
            if vector is None:
                vector = self._weights(model, unit, leaves if hashed else None, slot)
                vector = vector - base if base is not None else vector
            vectors.append(vector.reshape(shape))
        return (None if base is None else base.reshape(shape)), vectors, leaves

    def _weights(
        self, model: Model, unit: Unit, leaves: dict[str, str] | None, slot: int
    ) -> Tensor:
        raw = self.raw(model, unit, leaves, slot)
        info = self.inputs.info(model, unit.name)
        assert info is not None
        x = decode(raw, info.dtype, self.plan.dtype)
        check_input(x, f"{self.inputs.weights(model).label}: {self._where(unit)}", self.rule)
        return x.to(self.device)

    def raw(self, model: Model, unit: Unit, leaves: dict[str, str] | None, slot: int) -> Tensor:
        """A model's bytes of a unit, in this thread's buffer number ``slot``."""
        weights, name = self.inputs.weights(model), self.inputs.name_in(model, unit.name)
        assert name is not None
        size = weights[name].dtype.itemsize
        if unit.kept is None:
            raw = self._buffer(slot, (unit.stop - unit.start) * size)
            digests = self._fill(raw, weights, name, unit, leaves is not None)
        elif (model, unit.start) in unit.kept:
            raw, digests = unit.kept[model, unit.start]
        else:
            raw = self.spare.take((unit.stop - unit.start) * size)
            digests = self._fill(raw, weights, name, unit, hashed=True)
            unit.kept[model, unit.start] = raw, digests
        if leaves is not None:
            leaves[label_of(model)] = digests.hex()
        return raw

    def _fill(
        self, raw: Tensor, weights: Weights, name: str, unit: Unit, hashed: bool
    ) -> bytes:
        """Read a unit; its leaves, each piece hashed while it is in the cache."""
        leaves, view, size = [], raw.numpy().data, weights[name].dtype.itemsize
        for start in range(unit.start, unit.stop, CHUNK):
            stop = min(start + CHUNK, unit.stop)
            piece = view[(start - unit.start) * size : (stop - unit.start) * size]
            weights.read(name, start, stop, piece)
            if hashed:
                leaves.append(block_digests(piece, size))
        with self._count:
            self.bytes_read += raw.numel()
        return b"".join(leaves)

    def _known_delta(self, model: Model, unit: Unit) -> Tensor | None:
        """A task vector that is known without reading: untouched, or LoRA factors."""
        if model is None or (name := self.inputs.name_in(model, unit.name)) is None:
            return None
        delta = self.inputs.weights(model).delta(name)
        if isinstance(delta, LowRank):
            return low_rank_range(delta, unit.start, unit.stop, self.plan.dtype).to(self.device)
        if delta == 0.0:
            return torch.zeros(unit.stop - unit.start, dtype=self.plan.dtype, device=self.device)
        return None

    def _buffer(self, slot: int, size: int) -> Tensor:
        buffers: dict[int, Tensor] = self._local.__dict__.setdefault("buffers", {})
        if unit_is_large(size):
            return torch.empty(size, dtype=torch.uint8)
        if slot not in buffers or buffers[slot].numel() < size:
            buffers[slot] = torch.empty(size, dtype=torch.uint8)
        return buffers[slot][:size]

    # -- writing -----------------------------------------------------------------------------

    def _raws(
        self, unit: Unit, leaves: dict[str, str] | None
    ) -> tuple[Tensor | None, list[Tensor], list[DType]]:
        base = self.raw(None, unit, leaves, 0) if self.plan.needs_base else None
        vectors = [self.raw(m, unit, leaves, i) for i, m in enumerate(self.plan.vectors, 1)]
        infos = [self.inputs.info(m, unit.name) for m in self.plan.vectors]
        return base, vectors, [i.dtype for i in infos if i is not None]

    def _by_kernel(self, unit: Unit, solved: Solved) -> tuple[Tensor, dict[str, str]]:
        leaves: dict[str, str] = {}
        kernel, stored = self.plan.kernel, unit.job.info.dtype
        assert kernel is not None
        base, vectors, dtypes = self._raws(unit, leaves)
        out = self._buffer(-1, (unit.stop - unit.start) * stored.itemsize)
        if not kernel.run(base, vectors, dtypes, out, stored, self.place(unit, solved)):
            # NaN, infinity or overflow somewhere: the definition says where, or lets it pass.
            for piece in unit.pieces():
                raw, _ = self._by_definition(piece, solved, hashed=False)
                at = (piece.start - unit.start) * stored.itemsize
                out[at : at + raw.numel()] = raw
        return out, leaves

    def _copied(self, unit: Unit) -> tuple[Tensor, dict[str, str]]:
        leaves: dict[str, str] = {}
        model = None if self.inputs.base is not None else next(iter(self.inputs.experts))
        raw = self.raw(model, unit, leaves, 0)
        others = [e for e in self.inputs.experts if e != model]
        for other in others:
            info = self.inputs.info(other, unit.name)
            if info is not None and info.dtype is unit.job.info.dtype:
                differ = int((self.raw(other, unit, leaves, 1) != raw).any())
                with self._count:
                    if differ:
                        self.disagreements[unit.name] = self.disagreements.get(unit.name, 0) + 1
        return raw, leaves

    def _put(self, unit: Unit, raw: Tensor, leaves: dict[str, str]) -> None:
        size = unit.job.info.dtype.itemsize
        view = raw.numpy().data
        own = block_digests(view, size)
        self.sink.write(unit.name, unit.start * size, view)
        self.sink.commit(
            unit.task, [(unit.name, unit.start * size, unit.stop * size, own)], {"inputs": leaves}
        )
        with self._count:
            self.read.add(unit.task, leaves)
            self.bytes_written += len(view)


def label_of(model: Model) -> str:
    """A model as reports name it: "base" (None), or "expert NAME"."""
    return "base" if model is None else f"expert {model}"


class Spare:
    """Buffers for tensors that are kept between waves, at most ``limit`` bytes with those in use.
    Used ones wait for the next tensor: fresh pages would have to be cleared by the system."""

    def __init__(self, limit: int) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._room = limit
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A buffer of ``size`` bytes; the caller sees to it that those in use fit the limit."""
        with self._lock:
            if self._free.get(size):
                return self._free[size].pop()
            self._room -= size
            while self._room < 0 and (waiting := next(filter(None, self._free.values()), None)):
                self._room += waiting.pop().numel()
        return torch.empty(size, dtype=torch.uint8)

    def give(self, buffers: Iterable[Tensor]) -> None:
        """Take buffers back."""
        with self._lock:
            for buffer in buffers:
                self._free.setdefault(buffer.numel(), []).append(buffer)


LARGE = 8 * 2**20


def unit_is_large(size: int) -> bool:
    """Whether a buffer should go back to the system after use."""
    return size > LARGE


def low_rank_range(delta: LowRank, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Elements [start, stop) of scale·up@down, computed on whole groups of rows from row 0, so
    that they do not depend on the range asked for."""
    columns = delta.down.shape[1]
    group = -(-65_536 // columns)
    first, last = start // columns // group * group, -(-stop // columns)
    up, down = delta.up.to(dtype), delta.down.to(dtype)
    rows = [up[r : r + group] @ down * delta.scale for r in range(first, last, group)]
    flat = torch.cat(rows).reshape(-1)
    return flat[start - first * columns : stop - first * columns]


def ensure_finite_solution(name: str, value: Any, where: str) -> Any:
    """Refuse a solved statistic that holds a NaN: it would poison what it is of."""
    if _holds_nan(value):
        raise NumericError(
            f"the statistic {name!r} is NaN", where=where, expected="a number", found=value,
            fix="look for huge or broken weights with `fusewright inspect`",
        )  # fmt: skip
    return value


def _holds_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_nan, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_nan, value))
    return isinstance(value, float) and math.isnan(value)

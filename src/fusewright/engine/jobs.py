"""What happens to each output tensor, decided from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from fusewright.engine.inputs import Inputs
from fusewright.engine.options import Options
from fusewright.engine.recipe import Recipe
from fusewright.errors import PlanError
from fusewright.layout import Role, TensorLayout
from fusewright.methods.contract import Unit
from fusewright.methods.door import CHUNK, spans
from fusewright.methods.kernels import Kernel
from fusewright.methods.partials import BLOCK
from fusewright.methods.pipeline import Pipeline
from fusewright.weights import DType, TensorInfo

Model = str | None
"""A model by its name; None is the base."""

WIDEST = 8 * CHUNK
"""Elements of a kernel's unit: its temporaries are tiles, so that a longer unit costs no cache and
spreads what each unit costs over more of them."""

COMPILED = 24 * 2**20
"""Bytes that compiled kernels, and what they count in, take beside tensors."""


def memory_of_tensors(options: Options, kernel: Kernel | None) -> int:
    """What a budget leaves to tensors: to units alone, or to units and to kept tensors, half
    each."""
    return max(options.memory - (COMPILED if kernel is not None else 0), 0)


class Action(StrEnum):
    """What happens to an output tensor."""

    MERGE = "merge"  # by the method
    MEAN = "mean"  # running statistics: the plain mean of the experts
    COPY = "copy"  # integers, booleans, and buffers that some input lacks: from the reference


@dataclass(frozen=True)
class Job:
    """One output tensor: what it becomes, and the units in which."""

    info: TensorInfo
    action: Action
    layout: TensorLayout
    unit: Unit
    spans: tuple[tuple[int, int], ...]
    memory: int
    """Bytes that one unit of it needs."""
    reads: tuple[Model, ...]
    """The models that are read for it, each once in every round."""
    nbytes: int
    """Bytes of it in all of these."""
    kernel: bool
    """Whether the plan's kernel combines it."""
    kept: bool
    """Whether its inputs stay in memory between rounds of its own."""

    def sampled(self, every: int) -> tuple[tuple[int, int], ...]:
        """One canonical block in ``every``, or all units where they cannot be cut anywhere."""
        if self.unit is not Unit.CHUNK:
            return self.spans
        size = self.info.numel
        return tuple((at, min(at + BLOCK, size)) for at in range(0, size, every * BLOCK))

    def sampled_bytes(self, every: int) -> int:
        """What a sample of it reads."""
        seen = sum(stop - start for start, stop in self.sampled(every))
        return self.nbytes * seen // max(self.info.numel, 1)


@dataclass(frozen=True)
class Jobs:
    """Decides the jobs of a plan, one after another."""

    pipeline: Pipeline
    inputs: Inputs
    recipe: Recipe
    options: Options
    vectors: tuple[Model, ...]
    dtype: torch.dtype
    kernel: Kernel | None

    def all(self) -> dict[str, Job]:
        """Every output tensor's, by name."""
        jobs = {name: self.of(name) for name in self.inputs.alignment.names}
        units = self.options.workers * max((job.memory for job in jobs.values()), default=0)
        if units <= self._memory // 2:
            return jobs
        return {name: replace(job, kept=False) for name, job in jobs.items()}

    def of(self, name: str) -> Job:
        """The job of one output tensor. Raises PlanError where models disagree on it."""
        stored, layout = _reference_info(self.inputs, name), self.inputs.layout[name]
        found = {v: self.inputs.info(v, name) for v in self.vectors}
        action = _action(stored, layout, found)
        for model, info in found.items():
            _check_same(name, stored, info, model, self.inputs)
        out = stored.dtype if action is Action.COPY else _out_dtype(self.recipe, stored)
        merged = action is Action.MERGE
        unit = self.pipeline.unit(stored.shape, layout) if merged else Unit.CHUNK
        reads = self._reads(name, stored, action)
        infos = [i for model in reads if (i := self.inputs.info(model, name))]
        fused = merged and self._is_fused(name, [i.dtype for i in infos], out)
        sizes = sum(i.dtype.itemsize for i in infos) + out.itemsize
        cuts = spans(stored.shape, unit, self._chunk(sizes) if fused else CHUNK)
        largest = max((stop - start for start, stop in cuts), default=0)
        memory = largest * sizes if fused else largest * self._bytes_an_element(unit)
        if fused:  # what is not finite goes through the definition, a chunk at a time
            memory += min(largest, CHUNK) * self._bytes_an_element(unit)
        nbytes = sum(i.nbytes for i in infos)
        kept = merged and self._stays(nbytes, fused)
        return Job(TensorInfo(name, out, stored.shape), action, layout, unit, tuple(cuts), memory,
                   reads, nbytes, fused, kept)  # fmt: skip

    def _reads(self, name: str, stored: TensorInfo, action: Action) -> tuple[Model, ...]:
        if action is Action.COPY:
            bases: list[Model] = [None] if self.inputs.base is not None else []
            models: list[Model] = [*bases, *self.inputs.experts]
            found = {model: self.inputs.info(model, name) for model in models[1:]}
            same = [m for m, info in found.items() if info and info.dtype is stored.dtype]
            return (models[0], *same)
        if action is Action.MEAN or self.pipeline.frame == "weights":
            return tuple(dict.fromkeys(self.vectors))
        return (None, *(v for v in self.vectors if not self._is_known(v, name)))

    def _is_known(self, model: Model, name: str) -> bool:
        """Whether a task vector is known without reading: untouched, or LoRA factors."""
        own = self.inputs.name_in(model, name)
        return own is not None and self.inputs.weights(model).has_delta(own)

    def _is_fused(self, name: str, inputs: Sequence[DType], out: DType) -> bool:
        if self.kernel is None or any(self._is_known(m, name) for m in (None, *self.vectors)):
            return False
        return self.kernel.takes(inputs, out)

    def _chunk(self, sizes: int) -> int:
        """Elements of a kernel's units: as many as a quarter of it allows."""
        elements = WIDEST
        while elements > CHUNK and elements * sizes * self.options.workers > self._memory // 4:
            elements //= 2
        return elements

    @property
    def _memory(self) -> int:
        return memory_of_tensors(self.options, self.kernel)

    def _bytes_an_element(self, unit: Unit) -> int:
        # Raw bytes and numbers of every vector and the base, and a few temporaries;
        # decompositions of whole matrices work on float64 copies.
        temporaries = 4 if unit is Unit.CHUNK else 14
        width = self.dtype.itemsize
        return (len(self.vectors) + 1) * (4 + width) + temporaries * width

    def _stays(self, nbytes: int, fused: bool) -> bool:
        """Whether a tensor's inputs are to stay in memory between its own rounds."""
        own = [s for s in self.pipeline.steps(self.dtype) if s.round.scope == "tensor"]
        # Where a kernel combines and the definition measures, the two cut units differently.
        alike = not fused or (self.kernel is not None and all(map(self.kernel.measures, own)))
        return bool(own) and alike and nbytes <= self._memory // 2


def _action(
    stored: TensorInfo, layout: TensorLayout, found: Mapping[Model, TensorInfo | None]
) -> Action:
    if not stored.dtype.is_float or any(info is None for info in found.values()):
        return Action.COPY
    return Action.MEAN if layout.role is Role.STATISTIC else Action.MERGE


def _reference_info(inputs: Inputs, name: str) -> TensorInfo:
    model = None if inputs.base is not None else next(iter(inputs.experts))
    info = inputs.info(model, name)
    if info is None:  # an output that untying adds is found under its tied name everywhere
        info = next(i for e in inputs.experts if (i := inputs.info(e, name)) is not None)
    return TensorInfo(name, info.dtype, info.shape)


def _check_same(
    name: str, stored: TensorInfo, info: TensorInfo | None, model: Model, inputs: Inputs
) -> None:
    if info is None:
        return
    where = f"{name} in {inputs.weights(model).label}"
    if info.shape != stored.shape:
        vocabulary = inputs.layout[name].vocabulary
        raise PlanError(
            "a tensor has another shape than the base's" if inputs.base is not None
            else "a tensor has another shape than the first expert's",
            where=where, expected=list(stored.shape), found=list(info.shape),
            fix="these vocabularies differ: resize the expert's embeddings to the base's tokenizer"
            if vocabulary else "fusewright check BASE EXPERT shows what differs",
        )  # fmt: skip
    if info.dtype.is_float != stored.dtype.is_float:
        raise PlanError(
            "a tensor is a float in one model and an integer in another",
            where=where, expected=stored.dtype.code, found=info.dtype.code,
        )  # fmt: skip


def _out_dtype(recipe: Recipe, stored: TensorInfo) -> DType:
    wanted = recipe.out_dtype or recipe.dtype
    return stored.dtype if wanted is None else DType.of(wanted)

"""ProDistill: every element's coefficient, block after block, by the experts' own features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.errors import FusewrightError, PlanError
from fusewright.methods.contract import Card, Context, Fitted, Program
from fusewright.methods.learned._fitting import asked
from fusewright.methods.learned._guard import holding
from fusewright.methods.learned._rest import is_statistic, summed
from fusewright.methods.learned._resume import digest
from fusewright.methods.learned.fitter import Fitter
from fusewright.methods.learned.processes import Processes
from fusewright.methods.settings import PerTensor, resolve
from fusewright.methods.static._fields import Number
from fusewright.modules.architecture import describe_module
from fusewright.modules.calls import Call, copied, counted, hidden, inputs_of, outputs_of
from fusewright.modules.elementwise import ElementWise, Granularity
from fusewright.modules.functional import with_weights
from fusewright.modules.layer import put_in
from fusewright.modules.tensors import wide_dtype
from fusewright.weights.checkpoint import read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question


class ProDistill(Program):
    """Learn a coefficient for every element of every task vector, block after block, by which the
    merge's features follow each expert's on its own task (*Scalable Model Merging with Progressive
    Layer-wise Distillation*, arXiv 2502.12706).

    In each block l, in the order in which they answer, Adam descends on
    Σ_t ‖h_l(z; θ0 + Σ_s Λ_s ∘ τ_s) - h_l(z_t; θ_t)‖² over inputs of every task t: z enters the
    block in the merge of the blocks before, z_t in expert t. Tensors outside blocks are
    θ0 + ``start`` Σ τ_t, running statistics the experts' mean.

    ``start``: 0.3, of all or by tensor. ``inputs`` of each task: 64. ``batch`` of each task in a
    step: 16; ``steps`` in each block: 400; ``rate``: 0.01. So the official code for images: 100
    epochs of eight tasks' inputs, 128 at a time. ``granularity``: Λ of each "element", as
    published, or, in less memory, of each "row" or whole "tensor". ``every``: how often the block's
    loss on all inputs is asked, of which the smallest is kept, so that it does not rise; 100, since
    it costs a pass over them.

    No labels, heads or answers are needed. Padding counts as text does, as in the code.

    Memory: base, merge, an expert; of one block Λ (5 times while it is learned), the task vectors,
    what enters it and the experts' answers. Raises PlanError where an expert has no data, the model
    no blocks or a block no features; NumericError for a loss that is not finite.
    """

    name: ClassVar[str] = "prodistill"
    card: ClassVar[Card] = Card(
        "ProDistill", "Scalable Model Merging with Progressive Layer-wise Distillation",
        "2502.12706", data="unlabelled",
        cost="a forward and backward pass of each block of each task a step; "
        "for each block a forward pass of merge and experts",
    )  # fmt: skip

    granularity: Granularity = "element"
    start: PerTensor[Number] = 0.3
    steps: int = Field(400, ge=0)
    rate: float = Field(0.01, gt=0)
    batch: int = Field(16, ge=1)
    inputs: int = Field(64, ge=1)
    every: int = Field(100, ge=1)

    def fit(self, context: Context) -> Fitted:
        return _Distillation(self, context).run()


@dataclass
class _Lesson:
    """What a block learns from on one task: batches, each of one call or more of the block."""

    calls: list[list[Call]]
    wanted: list[list[Tensor]]

    def error(self, part: nn.Module, number: int) -> tuple[Tensor, int]:
        """Σ (h - h_t)² of a batch, and over how many numbers."""
        errors = []
        for (args, kwargs), wanted in zip(map(copied, self.calls[number]), self.wanted[number],
                                          strict=True):  # fmt: skip
            found = hidden(part(*args, **kwargs))
            wide = wide_dtype(found)
            errors.append((found.to(wide) - wanted.to(wide)).square().sum())
        return torch.stack(errors).sum(), sum(wanted.numel() for wanted in self.wanted[number])


@dataclass
class _Unit:
    """A module that is learned as a whole, but for the ``inner`` ones, and how often each task
    calls it."""

    path: str
    calls: dict[str, int] = field(default_factory=dict)
    inner: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        inner = any(_inside(name, path) for path in self.inner)
        return _inside(name, self.path) and not inner

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names that tensors have inside."""
        return {name[len(self.path) + 1 :]: tensor for name, tensor in tensors.items()}


class _Distillation:
    """One fit under way: ``model`` has the weights of the merge as far as it was learned."""

    def __init__(self, method: ProDistill, context: Context) -> None:
        self.method, self.context = method, context
        self.questions, self.processes = asked(context), Processes.started()
        self.model, self.vectors = context.module(), context.vectors()
        self.batches = {task: self._few(question) for task, question in self.questions.items()}
        self.state = summed(context, self.vectors, method.start, wide=True)
        put_in(self.model, {}, self.state)
        self.units = self._units()

    def run(self) -> Fitted:
        found: dict[str, Any] = {}
        for at, unit in enumerate(self.units):
            found[unit.path] = self._learned(at, unit)
        most = max(each["trained"] for each in found.values())
        inside = {n for n in self.state if any(unit.holds(n) for unit in self.units)}
        report = {"blocks": found, "trained": most, "outside": len(self.state) - len(inside)}
        return Fitted(state=self.state, report=report)

    def _few(self, question: Question) -> list[Any]:
        """The first inputs of a task, in batches."""
        size, seed = self.method.batch, self.context.seed
        return list(holding(question, question.epoch(size, seed), self.method.inputs, size))

    def _units(self) -> list[_Unit]:
        """The model's blocks, as far as the tasks call them, in the order in which they answer."""
        blocks = describe_module(self.model).blocks
        paths = dict.fromkeys(path for block in blocks for path in (block.path, *block.beside))
        units: dict[str, _Unit] = {}
        for task in self.questions:
            counts: dict[str, int] = {}
            try:
                counted(self.model, paths, partial(self._ask, task, 0), counts)
            except FusewrightError:  # a model without a head: its blocks have run all the same
                if not counts:
                    raise
            for path, count in counts.items():
                units.setdefault(path, _Unit(path)).calls[task] = count
        if not units:
            raise PlanError("the model has no blocks that could learn one after the other",
                            where=type(self.model).__name__, expected="numbered blocks (layers.0)",
                            found=", ".join(paths) or "none",
                            fix="a method that needs no blocks: adamerging, concrete")  # fmt: skip
        for unit in units.values():
            unit.inner = tuple(path for path in units if _inside(path, unit.path))
        return list(units.values())

    def _ask(self, task: str, number: int) -> Tensor:
        return self.questions[task].logits(self.model, self.batches[task][number])

    def _learned(self, at: int, unit: _Unit) -> dict[str, Any]:
        """Learn a block, or take what a killed fit has learned of it."""
        path = self.context.checkpoint(f"block-{at}", lambda: self.digest)
        if path is not None and path.exists():
            held = read_checkpoint(path, self.context.device)
        else:
            held = self._taught(at, unit)
            if path is not None and self.processes.first:
                write_checkpoint(path, held)
        self.state.update(held["state"])
        put_in(self.model, {}, held["state"])
        found: dict[str, Any] = held["report"]
        return found

    def _taught(self, at: int, unit: _Unit) -> dict[str, Any]:
        vectors = self.vectors.select(
            lambda name: unit.holds(name) and not is_statistic(self.context, name))
        starts = {n: resolve(self.method.start, self.context.layout(n)) for n in vectors.names}
        merge = ElementWise(vectors, self.method.granularity, starts)
        lessons = {task: self._lesson(unit, task) for task in self.processes.mine(unit.calls)}
        pupil = _Pupil(self.model.get_submodule(unit.path), unit, merge, lessons, self.processes)
        before = pupil.errors()
        kept = self._descended(at, pupil)
        report = {"before": before, "after": pupil.errors(), "kept": kept,
                  "trained": sum(values.numel() for values in merge.values)}  # fmt: skip
        with torch.no_grad():
            return {"state": merge.tensors(wide=True), "report": report}

    def _descended(self, at: int, pupil: _Pupil) -> int:
        """Adam on Λ of a block; the step whose Λ is kept."""
        if not pupil.merge.names:
            return 0
        steps, tell = self.method.steps, self.context.tell
        whole, before = steps * len(self.units), steps * at
        path = self.context.checkpoint(f"fit-{at}", lambda: self.digest)
        fitter = Fitter(
            steps, self.method.rate, every=self.method.every, checkpoint=path, score=pupil.score,
            tell=tell and (lambda done, _, loss: tell(before + done, whole, loss)),
        )  # fmt: skip
        fit = fitter.run(pupil.merge, pupil.step)
        if path is not None and self.processes.first:
            path.unlink(missing_ok=True)
        return fit.kept

    def _lesson(self, unit: _Unit, task: str) -> _Lesson:
        count, numbers = unit.calls[task], range(len(self.batches[task]))
        asks = [partial(self._ask, task, number) for number in numbers]
        calls = [inputs_of(self.model, unit.path, count, ask) for ask in asks]
        with with_weights(self.model, self.vectors.expert(task)):
            wanted = [outputs_of(self.model, unit.path, count, ask) for ask in asks]
        return _Lesson(calls, wanted)

    @cached_property
    def digest(self) -> str:
        """Of what is learned from."""
        return digest(self.batches)


@dataclass
class _Pupil:
    """A block that learns: the live module, its coefficients and its lessons."""

    part: nn.Module
    unit: _Unit
    merge: ElementWise
    lessons: Mapping[str, _Lesson]
    processes: Processes

    def step(self, number: int) -> dict[str, float]:
        """Leave in Λ the gradient of Σ_t ‖h - h_t‖² on each task's batch; the mean errors."""
        merged = self.merge.tensors()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
        losses: dict[str, float] = {}
        with with_weights(self.part, self.unit.local(leaves)):
            for task, lesson in self.lessons.items():
                error, count = lesson.error(self.part, number % len(lesson.calls))
                if error.requires_grad:
                    error.backward(inputs=list(leaves.values()))
                losses[task] = float(error.detach()) / count
        reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
        if reached:
            torch.autograd.backward([merged[n] for n in reached], [leaves[n].grad for n in reached])
        self.processes.summed(self.merge.parameters())
        return self.processes.gathered(losses, self.unit.calls)

    def errors(self) -> dict[str, float]:
        """The mean error on all inputs, by task."""
        return {task: total / count for task, (total, count) in self._totals().items()}

    def score(self) -> float:
        """-Σ_t ‖h - h_t‖² over all inputs."""
        return -sum(total for total, _ in self._totals().values())

    @torch.no_grad()
    def _totals(self) -> dict[str, tuple[float, int]]:
        found: dict[str, tuple[float, int]] = {}
        with with_weights(self.part, self.unit.local(self.merge.tensors())):
            for task, lesson in self.lessons.items():
                each = [lesson.error(self.part, number) for number in range(len(lesson.calls))]
                found[task] = sum(float(e) for e, _ in each), sum(count for _, count in each)
        return self.processes.gathered(found, self.unit.calls)


def _inside(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")

"""What learned methods share: data, model, guards, and the descent."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.contract import Context, Data, Method, Parts
from fusewright.methods.learned import objectives, scalarisers
from fusewright.methods.learned._guard import (
    Agreement,
    collapsed,
    first_batches,
    warn_of_one_class,
)
from fusewright.methods.learned._rest import is_statistic, summed
from fusewright.methods.learned._resume import Numbered, digest
from fusewright.methods.learned.fitter import Fit, Fitter, Step
from fusewright.methods.learned.processes import Processes
from fusewright.modules.functional import with_weights
from fusewright.modules.layer import put_in
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.tensors import named_tensors
from fusewright.tasks.errors import DataError
from fusewright.tasks.tokens import IGNORED

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question


Loss = Callable[[nn.Module, str, int], Tensor]
"""Of (model, task, batch's number)."""


LOOKED = 128
"""Inputs of each task that are looked at before and after a fit, where no guard says how many."""


class Learner(Method, ABC):
    """A method that descends on few numbers by the answers to every task's inputs. What it answers
    with says what it is beside: a :class:`~fusewright.methods.contract.Program`, or a
    :class:`~fusewright.methods.contract.Routed`.

    ``objective``: "entropy"; "diverse_entropy", for which one class for everything is the worst,
    not the best (:func:`~fusewright.methods.learned.objectives.diverse_entropy`); "self_label"
    (what each task's own expert predicts), "soft_label" (how sure it is of each class) and
    "matching" (its logits) cost a forward pass of the expert more; "cross_entropy" needs labels.
    ``batch``: inputs of each task in a step. ``guard``: inputs of each task on which the merge's
    predictions are compared with those of the task's own expert, every ``every`` steps; the numbers
    that agreed best are kept, since entropy can fall while errors rise. 0 turns it off; some inputs
    are then looked at in the end alone, to warn where all are given one class.

    Where a loss or a gradient is no longer finite, the fit ends with a FusewrightWarning and what
    agreed best, its step is reported as "stopped"; without a guard, or before it has looked twice,
    nothing says that what was learned is any good: NumericError. Warns of data that are all of one
    class, and where agreement had fallen by more than a quarter and that was undone. Raises
    DataError for data without batches or rows and for rows of padding alone, MemoryShortage where
    memory runs out; beside an output folder a checkpoint is then gone on from.
    """

    objective: objectives.Name = "entropy"
    batch: int = Field(32, ge=1)
    guard: int = Field(128, ge=0)
    every: int = Field(50, ge=1)

    @property
    def needs(self) -> Data:
        """Labels, if the objective compares with them."""
        labels = objectives.OBJECTIVES[self.objective].target == "labels"
        return "labelled" if labels else "unlabelled"


class Fitting:
    """One fit under way: ``model`` is run with the weights of merges of ``vectors``, or with layers
    that a method puts into it. Running statistics are the experts' mean already."""

    def __init__(self, context: Context, method: Learner) -> None:
        self.context, self.method = context, method
        self.questions, self.processes = asked(context), Processes.started()
        _check_numbers(self.questions, method)
        self.model = context.module()
        self._experts = context.vectors()
        averaged = self._experts.select(lambda name: is_statistic(context, name))
        self.vectors = self._experts.select(lambda name: name not in averaged.base)
        self.statistics = summed(context, averaged, 0.0, wide=True)
        put_in(self.model, {}, self.statistics)
        self._batches = {task: Numbered(question.stream(method.batch, context.seed))
                         for task, question in self.questions.items()}  # fmt: skip
        self._plain: nn.Module | None = None
        self._trained = 0  # numbers, in the largest stage
        self._agreement = self._asked_experts()
        if method.needs == "labelled":
            self._look_at_labels()

    def _asked_experts(self) -> Agreement | None:
        """What a guard compares with; without one, what is looked at before and after the fit,
        unless answers are numbers or features."""
        method = self.method
        if not method.guard and method.objective == "matching":
            return None
        return Agreement(self.model, self._experts, self.questions, method.batch,
                         method.guard or LOOKED, self.context.seed, self.processes)  # fmt: skip

    def _look_at_labels(self) -> None:
        """Warn of labels that are all one class; refuse those that are of other answers."""
        how = self.method.batch, LOOKED, self.context.seed
        found = {}
        for task in self.processes.mine(self.questions):
            question, model = self.questions[task], self.model
            each = list(first_batches(question, *how))
            found[task] = [(b, _classes(question.labels(model, b))) for b in each]
            question.check_labels(model, each[0])
        warn_of_one_class(found, "the labels answer")

    def put_in(self, parts: Parts) -> None:
        """Put layers and tensors into the model; experts are asked in its plain form still, which
        shares all other tensors with it."""
        own = {id(t): t for _, t in named_tensors(self.model)}
        self._plain = deepcopy(self.model, own)
        put_in(self.model, parts.layers, parts.tensors)

    def batch(self, task: str, number: int) -> Any:
        """Batch ``number`` of a task; numbers ascend, some may be left out, and the last may be
        asked for again."""
        return self._batches[task][number]

    def held_out(self, task: str) -> Iterator[Any]:
        """The guard's batches of a task that this process asks about; without a guard its first
        ones."""
        if self._agreement is not None:
            return (batch for batch, _ in self._agreement.asked[task])
        return first_batches(self.questions[task], self.method.batch, LOOKED, self.context.seed)

    def loss(self, model: nn.Module, task: str, number: int) -> Tensor:
        """The objective of a task's batch ``number``."""
        return self.loss_on(model, task, self.batch(task, number))

    def loss_on(self, model: nn.Module, task: str, batch: Any) -> Tensor:
        """The objective of a task's batch. Raises PlanError where no gradient can come back."""
        found = self._loss_on(model, task, batch)
        if not found.requires_grad:
            raise PlanError(
                "the answers say nothing of how they depend on the weights",
                where=f"task {task}", expected="logits that gradients flow through",
                found="logits without", fix="heads without torch.no_grad() and .detach()",
            )  # fmt: skip
        return found

    def _loss_on(self, model: nn.Module, task: str, batch: Any) -> Tensor:
        objective = objectives.OBJECTIVES[self.method.objective]
        question = self.questions[task]
        logits = question.logits(model, batch)
        if objective.target == "none":
            return objective.loss(_uncertain(task, logits))
        if objective.target == "labels":
            return objective.loss(logits, _matched(task, question.labels(model, batch), logits))
        plain = model if self._plain is None else self._plain
        with with_weights(plain, self._experts.expert(task)), torch.no_grad():
            expert = question.logits(plain, batch)
        return objective.loss(logits, expert)

    def gradients(
        self, merge: ParametrisedMerge, number: int, weights: Mapping[str, float] | None = None,
        scalarise: scalarisers.Scalariser | None = None, loss: Loss | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Leave in the coefficients the gradient of Σ w_t L_t, or of what ``scalarise`` makes of
        the w_t L_t, on every task's batch ``number``; answers with the L_t: the objective's, or
        ``loss(model, task, number)``."""
        weights, loss = weights or {}, loss or self.loss
        learned = [p for p in merge.coefficients.parameters() if p.requires_grad]
        losses: dict[str, float] = {}
        each: dict[str, list[Tensor]] = {}
        with merge.live() as live, self._shared([] if scalarise else learned):
            for task in self.processes.mine(self.questions):
                found = loss(live.model, task, number)
                losses[task] = float(found.detach())
                live.backward(weights.get(task, 1.0) * found)
                if scalarise is not None:
                    live.collect()
                    each[task] = [_taken(p) for p in learned]
            live.collect()
        losses = self.processes.gathered(losses, self.questions)
        if scalarise is not None:
            gathered = self.processes.gathered(each, self.questions)
            scaled = [torch.tensor(weights.get(t, 1.0) * value) for t, value in losses.items()]
            scalarisers.combine(learned, scaled, list(gathered.values()), scalarise)
        return losses

    def gradients_in(self, trained: nn.Module, number: int) -> dict[str, float]:
        """Leave in ``trained``, a part of the model, the gradient of Σ L_t on every task's batch
        ``number``; answers with the L_t."""
        losses: dict[str, float] = {}
        with self._shared(list(trained.parameters())):
            for task in self.processes.mine(self.questions):
                loss = self.loss(self.model, task, number)
                loss.backward()
                losses[task] = float(loss.detach())
        return self.processes.gathered(losses, self.questions)

    @contextmanager
    def _shared(self, learned: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gradients of all processes' tasks are summed, and added to what was there before."""
        if self.processes.count == 1:
            yield
            return
        before = [_taken(p) for p in learned]
        yield
        self.processes.summed(learned)
        for parameter, gradient in zip(learned, before, strict=True):
            assert parameter.grad is not None
            parameter.grad += gradient

    def descend(
        self, stage: str, trained: nn.Module, step: Step, score: Callable[[], float], *,
        steps: int, rate: float, constrain: Callable[[], None] | None = None,
        ending: Callable[[], Any] | None = None,
        schedule: Literal["constant", "cosine"] = "constant", floor: float = 0.0,
    ) -> Fit:  # fmt: skip
        """Adam on ``trained``; a killed stage goes on where the context keeps checkpoints.
        ``ending``: see :class:`~fusewright.methods.learned.fitter.Fitter`."""
        self._trained = max(self._trained, _learned(trained))
        fitter = Fitter(
            steps, rate, schedule=schedule, floor=floor, every=self.method.every,
            constrain=constrain, ending=ending, tell=self.context.tell, advice=self._advice(),
            score=score if self.method.guard else None,
            checkpoint=self.context.checkpoint(stage, lambda: self.digest),
        )  # fmt: skip
        return fitter.run(trained, step)

    def _advice(self) -> str:
        """How a fit keeps what it had learned before a number was no longer finite."""
        if not self.method.guard:
            return "; guard=128 keeps the state that agreed best before"
        return f"; a smaller `every` than {self.method.every} keeps a state before"

    def score(self, merge: ParametrisedMerge | nn.Module) -> float:
        """The mean agreement with the experts, where there is a guard."""
        assert self._agreement is not None
        with _live(merge) as model:
            return self._agreement.score(model)

    def report(self, merge: ParametrisedMerge | nn.Module, fit: Fit) -> dict[str, Any]:
        """How the fit went; warns where the merge's predictions collapsed."""
        guard = {}
        if self._agreement is not None:
            with _live(merge) as model:
                guard = self._agreement.measured(model)
        if fell := _fell(fit):
            warn(
                f"the merge collapsed: agreement with the experts is {fell[0]:.2f} in the state of "
                f"step {fit.kept}, which is kept, and was {fell[1]:.2f} in the last; a smaller "
                "rate is worth a try", FusewrightWarning, stacklevel=2,
            )  # fmt: skip
        if fallen := collapsed(guard):
            entropy = self.method.objective == "entropy"
            warn(
                f"the merge names one class of {', '.join(fallen)} far more often than the expert "
                f"does: {in_report('guard')}"
                + ("; objective=diverse_entropy counts it against the merge" if entropy else ""),
                FusewrightWarning, stacklevel=2,
            )  # fmt: skip
        return {
            "losses": list(fit.losses), "agreement": [list(s) for s in fit.scores],
            "kept": fit.kept, "stopped": fit.stopped, "guard": guard, "trained": self._trained,
            "tasks": {task: list(losses) for task, losses in fit.tasks.items()},
        }  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Of what is asked: the first inputs of every task, and how the base answers them."""
        found = {}
        with torch.no_grad():
            for task, question in self.questions.items():
                first = next(question.stream(self.method.batch, self.context.seed))
                found[task] = (first, question.logits(self.model, first))
        return digest(found)


def in_report(key: str) -> str:
    """Where a part of a fit's report is found."""
    return f"look at {key!r} of the fit's report (fusewright.json: fitted; report['fitted'])"


def _fell(fit: Fit) -> tuple[float, float] | None:
    """(the score that was kept, the last one), where that is less than three quarters."""
    scores = dict(fit.scores)
    if not scores or scores[max(scores)] >= 0.75 * scores[fit.kept]:
        return None
    return scores[fit.kept], scores[max(scores)]


def _classes(labels: Tensor) -> Tensor:
    """Labels that are looked at by a loss."""
    return labels[labels != IGNORED]


def _learned(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def asked(context: Context) -> Mapping[str, Question]:
    """The questions of the experts' tasks. Raises PlanError if an expert has none, DataError as
    soon as data show that nothing can be learned from them."""
    found: Mapping[str, Any] = getattr(context.data, "questions", {})
    missing = [name for name in context.experts if name not in found]
    if missing:
        raise PlanError(
            "there are no data of an expert's task to learn from", where=", ".join(missing),
            expected="data={expert: batches}", found=", ".join(found) or "no data",
            fix="name experts as the data's tasks" if found else
                "data=suite.unlabelled(), or batches under the experts' names; "
                "in a recipe data: {suite: NAME}",
        )  # fmt: skip
    return {name: found[name].sound().on(context.device) for name in context.experts}


def _check_numbers(questions: Mapping[str, Question], method: Learner) -> None:
    wrong = [name for name, question in questions.items() if question.numbers]
    if wrong and (method.guard or method.objective != "matching"):
        raise PlanError(
            "tasks are answered in numbers, which have no classes to be sure of or to agree on",
            where=", ".join(wrong), expected="objective=matching, guard=0",
            found=f"objective={method.objective}, guard={method.guard}",
            fix=f"{method.name}(objective=matching, guard=0)",
        )  # fmt: skip


def _matched(task: str, labels: Tensor, logits: Tensor) -> Tensor:
    """The labels, if there is one for each answer, of its classes or none."""
    if labels.numel() != logits[..., 0].numel():
        raise PlanError(
            "there is not one label for each answer", where=f"task {task}",
            expected=f"{logits[..., 0].numel()}, for logits {tuple(logits.shape)}",
            found=f"{labels.numel()}, of shape {tuple(labels.shape)}",
            fix="an objective without labels: entropy, self_label, matching",
        )  # fmt: skip
    looked, classes = _classes(labels), logits.shape[-1]
    wrong = looked[(looked < 0) | (looked >= classes) | (looked != looked.long())]
    if len(wrong):
        raise DataError(
            "a label is no class of the answers", where=f"task {task}", found=wrong[0].item(),
            expected=f"whole numbers from 0 to {classes - 1}, or {IGNORED} for none",
            fix="the head of this task and the numbers of its classes",
        )  # fmt: skip
    return labels


def _uncertain(task: str, logits: Tensor) -> Tensor:
    if logits.shape[-1] < 2:
        raise PlanError(
            "answers of one class have no entropy to learn from", where=f"task {task}",
            expected="logits of two classes or more", found=tuple(logits.shape),
            fix="another objective, or the head of the whole task",
        )  # fmt: skip
    return logits


@contextmanager
def _live(merge: ParametrisedMerge | nn.Module) -> Iterator[nn.Module]:
    if isinstance(merge, ParametrisedMerge):
        with merge.live() as live:
            yield live.model
    else:
        yield merge


def _taken(parameter: Tensor) -> Tensor:
    found, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if found is None else found


"""Representation Surgery: a merge whose features are corrected for the task that it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.methods.contract import Card, Context, Method, Parts, Routed
from fusewright.methods.learned._fitting import asked
from fusewright.methods.learned._resume import Numbered, digest
from fusewright.methods.learned.fitter import Fitter
from fusewright.methods.learned.processes import Processes
from fusewright.methods.routed._named import check_finite
from fusewright.methods.settings import AnyMethod
from fusewright.modules.functional import with_weights
from fusewright.modules.surgery import SURGERY, Surgery, head_of, seen_by


class RepresentationSurgery(Routed):
    """Bring a merge's features back to each expert's, by a small correction of each task's own
    (*Representation Surgery for Multi-Task Model Merging*, arXiv 2402.02705).

    z' = z - U_t ReLU(D_t z) of the features z that the head sees
    (:class:`~fusewright.modules.surgery.Surgery`), U_t = 0 at first; trained by
    mean |z' - z_t| to the features z_t of task t's expert, on unlabelled inputs of the task, of
    texts those of tokens that are no padding.

    ``merger``: any merge that it mends, task arithmetic of 0.3; a learned one is given the same
    data. ``rank``: 16. ``steps``, ``rate``, ``batch`` (features of each task in a step): 1000,
    Adam's 1e-3 and 16, as the official code. ``inputs``: most features of a task that are
    collected, once, 5500. The task of every input must be told: ``model.set_task("mnist")``.

    Raises PlanError where an expert has no data or the model no features, DataError for batches
    that are empty, NumericError for features or a loss that are not finite.
    """

    name: ClassVar[str] = "surgery"
    card: ClassVar[Card] = Card(
        "Representation Surgery", "Representation Surgery for Multi-Task Model Merging",
        "2402.02705", data="unlabelled", output="routed", task_id=True,
        cost="the merge's, and a forward pass of merge and expert over the inputs",
    )  # fmt: skip

    merger: AnyMethod = Field({"task_arithmetic": {"scale": 0.3}})
    rank: int = Field(16, ge=1)
    steps: int = Field(1000, ge=0)
    rate: float = Field(1e-3, gt=0)
    batch: int = Field(16, ge=1)
    inputs: int = Field(5500, ge=1)

    @field_validator("merger")
    @classmethod
    def _written(cls, merger: Any) -> Any:
        from fusewright.methods.registry import parse_method

        parse_method(merger)
        return merger.spec() if isinstance(merger, Method) else merger

    def build(self, context: Context) -> Parts:
        from fusewright.methods.registry import parse_method

        questions, model, vectors = asked(context), context.module(), context.vectors()
        state = context.merge(parse_method(self.merger))
        merged = {n: state[context.stored(n)].to(context.device) for n in vectors.names}
        head, processes = head_of(model), Processes.started()
        mine: dict[str, tuple[Tensor, Tensor]] = {}
        for task in processes.mine(questions):
            ours, theirs = (self._seen(model, weights, questions[task], head, context.seed)
                            for weights in (merged, vectors.expert(task)))  # fmt: skip
            for features in (ours, theirs):
                check_finite(task, features)
            mine[task] = ours, theirs
        pairs = list(processes.gathered(mine, questions).values())
        surgery = Surgery(list(questions), pairs[0][0].shape[1], self.rank, head, context.seed)
        report = self._trained(surgery, list(questions), pairs, context)
        return Parts({SURGERY: surgery}, merged, report)

    def _seen(
        self, model: nn.Module, weights: Mapping[str, Tensor], question: Any, head: str, seed: int
    ) -> Tensor:
        """The features of a task's inputs under some weights; few, so learnt from on the CPU."""
        with with_weights(model, weights), seen_by(model, head) as found, torch.no_grad():
            for batch in question.epoch(min(64, self.inputs), seed):
                question.logits(model, batch)
                if sum(len(each) for each in found) >= self.inputs:
                    break
        if not found:
            raise PlanError("a task's answers do not come by the model's head",
                            where=f"task {question.name}", expected=f"a call of {head or 'it'}",
                            fix="heads that call the whole model")  # fmt: skip
        return torch.cat(found)[: self.inputs].cpu()

    def _trained(
        self, surgery: Surgery, tasks: list[str], pairs: list[tuple[Tensor, Tensor]],
        context: Context,
    ) -> dict[str, Any]:  # fmt: skip
        rows = Numbered(self._rows(pairs, context.seed))
        before = self._distances(surgery, pairs)

        def step(number: int) -> dict[str, float]:
            losses = {}
            for place, ((mine, wanted), some) in enumerate(zip(pairs, rows[number], strict=True)):
                loss = (surgery(mine[some], place) - wanted[some]).abs().mean()
                loss.backward()
                losses[tasks[place]] = float(loss.detach())
            return losses

        checkpoint = context.checkpoint("surgery", lambda: digest(pairs))
        fit = Fitter(
            self.steps, self.rate, checkpoint=checkpoint, tell=context.tell
        ).run(surgery, step)
        after = self._distances(surgery, pairs)
        return {"losses": list(fit.losses), "before": dict(zip(tasks, before, strict=True)),
                "after": dict(zip(tasks, after, strict=True))}  # fmt: skip

    def _rows(self, pairs: list[tuple[Tensor, Tensor]], seed: int) -> Iterator[list[Tensor]]:
        """Some of each task's features, of every step."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            yield [torch.randint(len(mine), (self.batch,), generator=draw) for mine, _ in pairs]

    def _distances(self, surgery: Surgery, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
        """Mean |z' - z_t| of each task."""
        with torch.no_grad():
            return [float((surgery(mine, place) - wanted).abs().mean())
                    for place, (mine, wanted) in enumerate(pairs)]  # fmt: skip

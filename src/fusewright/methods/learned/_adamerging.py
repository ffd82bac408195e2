"""AdaMerging: coefficients learned by the entropy of predictions on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fusewright.errors import PlanError
from fusewright.methods.contract import Card, Context, Fitted, Program
from fusewright.methods.learned._guard import Agreement
from fusewright.methods.learned.coefficients import LinearCoefficients
from fusewright.methods.learned.fitter import Fitter
from fusewright.methods.learned.objectives import entropy
from fusewright.methods.static._sum import Sum
from fusewright.modules.parametrised import ParametrisedMerge


class AdaMerging(Program):
    """Learn how much of each task vector to add from unlabelled inputs (*AdaMerging: Adaptive
    Model Merging for Multi-Task Learning*, arXiv 2310.02575).

    θ^l = θ0^l + Σ_t λ_t^l τ_t^l, where λ minimises Σ_t mean H(softmax f_t(x; θ)) over inputs x of
    every task t, by Adam.

    ``granularity``: λ of each tensor ("layer", the paper's best) or one of all ("task").
    ``start``: 0.3. ``steps``, ``rate`` (Adam's), ``batch`` (inputs of each task in a step):
    500, 1e-3, 32, as the official code. ``low``, ``high``: λ is kept in [0, 1] after each step, as
    there, where λ outside has no gradient any more. ``guard``: inputs of each task on which
    the merge's predictions are compared with those of the task's own expert, every ``every`` steps;
    the λ that agreed best are kept, since entropy can fall while errors rise. 0 turns it off.

    Raises PlanError where an expert has no data, NumericError for a loss that is not finite.
    """

    name: ClassVar[str] = "adamerging"
    card: ClassVar[Card] = Card(
        "AdaMerging", "AdaMerging: Adaptive Model Merging for Multi-Task Learning", "2310.02575",
        data="unlabelled", cost="a forward and backward pass of each task a step, then one pass",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"steps": 1000, "batch": 16, "low": None, "high": None, "guard": 0},
    }

    granularity: Literal["layer", "task"] = "layer"
    start: float = 0.3
    steps: int = Field(500, ge=0)
    rate: float = Field(1e-3, gt=0)
    batch: int = Field(32, ge=1)
    low: float | None = 0.0
    high: float | None = 1.0
    guard: int = Field(128, ge=0)
    every: int = Field(50, ge=1)

    def fit(self, context: Context) -> Fitted:
        questions = asked(context)
        model, vectors = context.module(), context.vectors()
        per_tensor = self.granularity == "layer"
        coefficients = LinearCoefficients(
            vectors.names, vectors.experts, lambda name: name if per_tensor else "", self.start
        )
        merge = ParametrisedMerge(model, vectors, coefficients)
        streams = {t: q.stream(self.batch, context.seed) for t, q in questions.items()}

        def step(number: int) -> dict[str, float]:
            losses = {}
            with merge.live() as live:
                for task, question in questions.items():
                    loss = entropy(question.logits(live.model, next(streams[task])))
                    live.backward(loss)
                    losses[task] = float(loss.detach())
                live.collect()
            return losses

        agreement = None
        if self.guard:
            agreement = Agreement(model, vectors, questions, self.batch, self.guard, context.seed)

        def score() -> float:
            assert agreement is not None
            with merge.live() as live:
                found = agreement.of(live.model)
            return sum(found.values()) / len(found)

        fitter = Fitter(
            self.steps, self.rate, every=self.every, score=score if self.guard else None,
            constrain=self._constrained(coefficients), tell=context.tell,
        )  # fmt: skip
        fit = fitter.run(coefficients, step)
        report = {"losses": list(fit.losses), "agreement": [list(s) for s in fit.scores],
                  "kept": fit.kept}  # fmt: skip
        return Fitted(Sum(weight=coefficients.written(context.stored)), report=report)

    def _constrained(self, coefficients: LinearCoefficients) -> Any:
        if self.low is None and self.high is None:
            return None
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return lambda: coefficients.clamp(low, high)


def asked(context: Context) -> Mapping[str, Any]:
    """The questions of the experts' tasks. Raises PlanError if an expert has none."""
    found: Mapping[str, Any] = getattr(context.data, "questions", {})
    missing = [name for name in context.experts if name not in found]
    if missing:
        raise PlanError(
            "there are no data of an expert's task to learn from", where=", ".join(missing),
            expected="data={expert: batches}", found=", ".join(found) or "no data",
            fix="data=suite.unlabelled(), or batches under the experts' names",
        )  # fmt: skip
    return {name: found[name] for name in context.experts}

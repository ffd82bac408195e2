"""AdaMerging: coefficients learned by the entropy of predictions on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fusewright.errors import PlanError
from fusewright.methods.contract import Card, Context, Fitted, Method, Program
from fusewright.methods.learned import scalarisers
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned._stages import Staged, adding, with_weight
from fusewright.methods.learned.coefficients import LinearCoefficients, check_bounds
from fusewright.methods.learned.fitter import Fit
from fusewright.methods.settings import AnyMethod
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.vectors import TaskVectors


class AdaMerging(Learner, Program):
    """Learn how much of each task vector to add from unlabelled inputs (*AdaMerging: Adaptive
    Model Merging for Multi-Task Learning*, arXiv 2310.02575).

    θ^l = θ0^l + Σ_t λ_t^l τ_t^l, where λ minimises Σ_t mean H(softmax f_t(x; θ)) over inputs x of
    every task t, by Adam.

    ``granularity``: λ of each tensor ("layer", the paper's best) or one of all ("task").
    ``start``: 0.3. ``steps``, ``rate`` (Adam's), ``batch``: 500, 1e-3, 32, as the official code.
    ``low``, ``high``: λ is kept in [0, 1] after each step, as there, where λ outside has no
    gradient any more. ``merger``: stages before the learned sum; profile "plus" is AdaMerging++,
    ``trim >> agree``. ``objective``, ``guard``, ``every``: see :class:`Learner`.
    ``combine``: how tasks' losses become one step: "sum", "mgda" (the shortest combined gradient)
    or "tchebycheff" (the largest loss alone); ``importance``: a factor of each task's loss, 1.

    Raises PlanError where an expert has no data, RecipeError where ``low`` is above ``high`` or
    "tchebycheff" would weigh "diverse_entropy", which is negative, and as :class:`Learner`.
    """

    name: ClassVar[str] = "adamerging"
    card: ClassVar[Card] = Card(
        "AdaMerging", "AdaMerging: Adaptive Model Merging for Multi-Task Learning", "2310.02575",
        data="unlabelled", cost="a forward and backward pass of each task a step, then one pass",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"steps": 1000, "batch": 16, "low": None, "high": None, "guard": 0},
        "plus": {"merger": ["trim", "agree"]},
    }

    granularity: Literal["layer", "task"] = "layer"
    start: float = 0.3
    steps: int = Field(500, ge=0)
    rate: float = Field(1e-3, gt=0)
    low: float | None = 0.0
    high: float | None = 1.0
    merger: AnyMethod = "sum"
    combine: scalarisers.Name = "sum"
    importance: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        check_bounds(self.low, self.high)
        if self.importance and self.combine == "tchebycheff":
            scalarisers.check_weighable(self.combine, self.objective, "combine: sum")
        return self

    @field_validator("merger")
    @classmethod
    def _adds(cls, merger: Any) -> Any:
        from fusewright.methods.registry import parse_method

        adding(parse_method(merger))
        return merger.spec() if isinstance(merger, Method) else merger

    def fit(self, context: Context) -> Fitted:
        from fusewright.methods.registry import parse_method

        fitting, pipeline = Fitting(context, self), adding(parse_method(self.merger))
        vectors = Staged(pipeline, fitting.vectors, context).vectors()
        coefficients = per_group(vectors, self.granularity, self.start)
        merge = ParametrisedMerge(fitting.model, vectors, coefficients)
        fit = self.learn(fitting, merge, coefficients)
        written = coefficients.written(context.stored)
        return Fitted(with_weight(pipeline, written), report=fitting.report(merge, fit))

    def learn(
        self, fitting: Fitting, merge: ParametrisedMerge, coefficients: LinearCoefficients,
        first: int = 0,
    ) -> Fit:  # fmt: skip
        """Descend on ``coefficients``, which are all or a part of the merge's, by the batches from
        number ``first`` on."""
        unknown = [task for task in self.importance if task not in fitting.questions]
        if unknown:
            raise PlanError("importance names no expert", found=", ".join(unknown),
                            expected=", ".join(fitting.questions))  # fmt: skip
        scalarise = scalarisers.SCALARISERS[self.combine]

        def step(number: int) -> dict[str, float]:
            return fitting.gradients(merge, first + number, self.importance, scalarise)

        return fitting.descend(
            "weights", coefficients, step, lambda: fitting.score(merge), steps=self.steps,
            rate=self.rate, constrain=self._constrained(coefficients),
        )  # fmt: skip

    def _constrained(self, coefficients: LinearCoefficients) -> Any:
        if self.low is None and self.high is None:
            return None
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return lambda: coefficients.clamp(low, high)


def per_group(
    vectors: TaskVectors, granularity: Literal["layer", "task"], start: float
) -> LinearCoefficients:
    """A coefficient for every expert, and for every tensor if "layer"."""
    per_tensor = granularity == "layer"
    return LinearCoefficients(
        vectors.names, vectors.experts, lambda name: name if per_tensor else "", start
    )

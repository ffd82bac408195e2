"""Pareto sets: merges for every preference over the tasks, learned together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.layout import ModelLayout, Role
from fusewright.layout.names import module as owner_of
from fusewright.methods.contract import Card, Context, Fitted, Parts, Program, Routed
from fusewright.methods.learned import scalarisers
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned._rest import summed
from fusewright.methods.learned.epo import Epo
from fusewright.methods.learned.objectives import Name as Objective
from fusewright.methods.learned.preferences import PreferenceCoefficients, drawn
from fusewright.methods.routed._mixtures import ALL, MLP, selects
from fusewright.modules.architecture import describe_module
from fusewright.modules.critical import kind_of
from fusewright.modules.layer import put_in
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.preferences import (
    PREFERENCES,
    PreferenceRouters,
    Preferences,
    on_simplex,
)
from fusewright.modules.vectors import TaskVectors

_WHOLE = (Role.MLP, Role.ATTENTION)


class ParetoSet(Learner, Program, Routed):
    """Learn one merge for every preference over the tasks (*Towards Efficient Pareto Set
    Approximation via Mixture of Experts Based Model Fusion*, arXiv 2406.09770: PWE-MoE).

    θ_M(r) = θ_0 + Σ_t g_M(r)_t τ_t for each selected module M, with r ≥ 0, Σ r = 1, and g_M a small
    network (:class:`~fusewright.modules.preferences.PreferenceRouters`); all other tensors are
    θ_0 + 0.3 Σ_t τ_t. Each step draws r ~ Dirichlet(``concentration``, 1: uniform), the same for
    all modules, takes one batch of each task, and moves the g_M by Adam.

    ``preference``: r by expert or in the experts' order; the result is then the plain merged model
    of that r. Without, it is a model with ``set_preference(r)`` and ``unload(r)``, which holds the
    selected task vectors.

    ``modules``: "mlp", the feed-forward part of every block; "all", also its attention, and every
    other module that holds tensors; any other text is a regular expression for modules' paths.
    ``router``: g_M's depth, 2, as the official code; 1 follows the preference in fewer steps, but
    what all preferences share grows more slowly. ``start``: 0.3, of g_M's last bias and of the
    rest, so that it begins as task arithmetic. ``scalarise``: "linear", Σ r_t L_t; "epo", which
    seeks equal r_t L_t (:class:`~fusewright.methods.learned.epo.Epo`) and so reaches what is not
    convex, at a projection for each task; "tchebycheff", max_t r_t L_t. ``steps``, ``rate``,
    ``batch``: 2000, 1e-2 with a cosine to a tenth, and 16, as the official code. ``objective``:
    "cross_entropy", which needs labels; the others do not. ``guard``: 0, as labels say what is
    right; else, with ``every``, as of :class:`Learner`, at equal preference.

    Memory while learning is base, merge and gradients of the selected tensors, and one task vector
    of one tensor. Raises PlanError where nothing is selected, for what is no preference and where
    an expert has no data, DataError where labels are missing, RecipeError where "epo" or
    "tchebycheff" would weigh "diverse_entropy", which is negative, and as :class:`Learner`.
    """

    name: ClassVar[str] = "pwe_moe"
    card: ClassVar[Card] = Card(
        "PWE-MoE", "Towards Efficient Pareto Set Approximation via Mixture of Experts Based Model "
        "Fusion", "2406.09770", data="labelled", output="routed",
        cost="a forward and backward pass of each task a step; a merge for each preference",
    )  # fmt: skip

    preference: dict[str, float] | tuple[float, ...] | None = None
    modules: Annotated[str, selects(MLP, ALL)] = MLP
    router: Literal[1, 2] = 2
    start: float = 0.3
    scalarise: Literal["linear", "epo", "tchebycheff"] = "linear"
    concentration: float = Field(1.0, gt=0)
    steps: int = Field(2000, ge=0)
    rate: float = Field(1e-2, gt=0)
    batch: int = Field(16, ge=1)
    objective: Objective = "cross_entropy"
    guard: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _weighable(self) -> Self:
        if self.scalarise != "linear":
            scalarisers.check_weighable(self.scalarise, self.objective, "scalarise: linear")
        return self

    @property
    def routes(self) -> bool:
        return self.preference is None

    def fit(self, context: Context) -> Fitted:
        assert self.preference is not None
        r = on_simplex(self.preference, tuple(context.experts))
        found = _Learned(self, context)
        found.coefficients.preference = r
        report = {**found.report, "preference": r.tolist()}
        state = {**found.rest, **found.merge.state(wide=True), **found.fitting.statistics}
        return Fitted(state=state, report=report)

    def build(self, context: Context) -> Parts:
        found = _Learned(self, context)
        vectors, places = found.merge.vectors, found.coefficients.places
        held = {name: (places[name], base, _stacked(vectors, name))
                for name, base in vectors.base.items()}  # fmt: skip
        equal = on_simplex([1.0] * len(vectors.experts), vectors.experts)
        made = Preferences(vectors.experts, found.coefficients.routers, held, equal)
        own = {name: tensor.to(found.dtypes[name]) for name, tensor in found.rest.items()}
        return Parts({PREFERENCES: made}, {**own, **found.fitting.statistics}, found.report)


class _Learned:
    """A fit, finished: ``merge`` of the selected tensors, and the ``rest``, in float32 or better.
    """

    def __init__(self, method: ParetoSet, context: Context) -> None:
        self.method, self.seed = method, context.seed
        self.fitting = Fitting(context, method)
        model, vectors = self.fitting.model, self.fitting.vectors
        places = selected(describe_module(model).layout, vectors.names, method.modules)
        self.dtypes = {name: tensor.dtype for name, tensor in vectors.base.items()}
        others = vectors.select(lambda name: name not in places)
        self.rest = summed(context, others, method.start, wide=True)
        put_in(model, {}, self.rest)
        count = max(places.values()) + 1
        routers = PreferenceRouters(
            count, len(vectors.experts), method.router, method.start, self.seed
        )
        equal = on_simplex([1.0] * len(vectors.experts), vectors.experts)
        self.coefficients = PreferenceCoefficients(routers, places, equal)
        chosen = vectors.select(lambda name: name in places)
        self.merge = ParametrisedMerge(model, chosen, self.coefficients)
        self.searches = _Searches()
        self.report = self._descend(equal)

    def _descend(self, equal: Tensor) -> dict[str, Any]:
        method = self.method

        def score() -> float:
            self.coefficients.preference = equal
            return self.fitting.score(self.merge)

        fit = self.fitting.descend(
            "preferences",
            nn.ModuleDict({"coefficients": self.coefficients, "searches": self.searches}),
            self._step, score, steps=method.steps, rate=method.rate, schedule="cosine", floor=0.1,
        )  # fmt: skip
        self.coefficients.preference = equal
        report = self.fitting.report(self.merge, fit)
        report["modules"] = len(set(self.coefficients.places.values()))
        if method.scalarise == "epo":
            report["epo"] = self.searches.told()
        return report

    def _step(self, number: int) -> dict[str, float]:
        method, experts = self.method, self.merge.vectors.experts
        r = drawn(len(experts), method.concentration, self.seed, number)
        self.coefficients.preference = r
        weights = dict(zip(experts, r.tolist(), strict=True))
        if method.scalarise == "linear":
            return self.fitting.gradients(self.merge, number, weights)
        if method.scalarise == "tchebycheff":
            largest = scalarisers.tchebycheff
            return self.fitting.gradients(self.merge, number, weights, largest)
        epo = Epo()
        search = partial(_times_tasks, epo, r)
        losses = self.fitting.gradients(self.merge, number, scalarise=search)
        self.searches.add(epo)
        return losses


class _Searches(nn.Module):
    """How many searches of the state's steps found an answer, and how many did not; a buffer, kept
    over a kill."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))

    def add(self, epo: Epo) -> None:
        """Those of a step."""
        self.counts += torch.tensor([epo.solved, epo.failures])

    def told(self) -> dict[str, int]:
        solved, failures = self.counts.tolist()
        return {"solved": solved, "failures": failures}


def _times_tasks(epo: Epo, r: Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
    """m α: the step's size is then that of the sum of losses."""
    return len(losses) * epo.weights(losses, gradients, r)


def selected(layout: ModelLayout, names: Sequence[str], modules: str) -> dict[str, int]:
    """{tensor: its module's number} of the tensors that ``modules`` selects: the feed-forward part
    of a block counts as one module, as does its attention; any other tensors are taken with those
    beside them, or, by a regular expression, with all of the outermost module that it meets.

    Raises PlanError if there is none.
    """
    keys = {name: key for name in names if (key := _key(layout, name, modules)) is not None}
    if not keys:
        kinds = sorted({kind_of(layout, name) for name in names})
        raise PlanError("no tensor is selected that experts change", found=f"modules: {modules!r}",
                        expected=f"modules of these kinds: {', '.join(kinds)}",
                        fix="modules: all")  # fmt: skip
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: numbers[key] for name, key in keys.items()}


def _key(layout: ModelLayout, name: str, modules: str) -> object:
    place, kind = layout[name], kind_of(layout, name)
    if modules in (MLP, ALL):
        if place.layer is not None and kind in _WHOLE:
            wanted = modules == ALL or kind == Role.MLP
            return (place.stack, place.layer, str(kind)) if wanted else None
        return owner_of(name) if modules == ALL else None
    parts = owner_of(name).split(".")
    outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in outer if re.search(modules, path)), None)


def _stacked(vectors: TaskVectors, name: str) -> Tensor:
    """τ of every expert, (experts, …), in the base's dtype."""
    return torch.stack([d.dense() for d in vectors.at(name)]).to(vectors.base[name].dtype)

"""FW-Merging: merging as Frank-Wolfe steps towards whichever expert lies down the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.errors import NumericError
from fusewright.methods.contract import Card, Context, Fitted, Program
from fusewright.methods.learned import objectives
from fusewright.methods.learned._adamerging import per_group
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned._guard import first_batches
from fusewright.methods.learned.coefficients import LinearCoefficients
from fusewright.methods.learned.fitter import Fit
from fusewright.methods.static import Sum
from fusewright.modules.parametrised import Coefficients, ParametrisedMerge


class FWMerging(Learner, Program):
    """Step towards the expert that lies furthest down the gradient of the tasks' losses
    (*FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization*, arXiv 2503.12649).

    θ starts as θ0 + ``start`` Σ τ_t. In step k, with g = ∇ Σ_t L_t(θ) on ``rows`` inputs of each
    task, s = argmin_t ⟨g, θ_t⟩, and "hard" moves θ ← θ + γ_k (θ_s - θ), γ_k = ``size`` · 2/(k + 2);
    the start is a vertex as well. θ stays θ0 + Σ c_t τ_t, and that sum is the answer.
    "soft" starts from the base and picks an expert by each task's own gradient, none twice in a
    step; then θ ← θ + Σ_i λ_i^l (θ_i - θ), λ of every tensor learned in ``weight_steps`` steps of
    Adam at ``weight_rate`` from ``start`` (later from 0).

    ``form``: "hard", whose steps cost one gradient each. ``granularity``: one expert for the whole
    model ("task") or for each tensor ("layer").
    ``measure``: the "inner" product of Frank-Wolfe, or the "cosine" of g and θ_t summed over
    tensors, as the code. ``start``: 0.3, ``steps``: 10, ``size``: 0.03 (0.1 times 0.3), ``rows``:
    100, ``weight_steps``: 500, ``weight_rate``: 1e-3, as the authors' settings for CLIP.
    ``objective``: cross-entropy, which needs labels, as published; ``batch`` inputs at a time.
    ``guard`` is 0, since labels say more; ``every``: see :class:`Learner`.

    Memory: base, merge, gradient, one task vector. Raises as AdaMerging.
    """

    name: ClassVar[str] = "fw_merging"
    card: ClassVar[Card] = Card(
        "FW-Merging", "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization",
        "2503.12649", data="labelled",
        cost="forward and backward passes of 100 inputs of each task a step, then one pass",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fusionbench": {"measure": "cosine"}}

    form: Literal["hard", "soft"] = "hard"
    granularity: Literal["task", "layer"] = "task"
    measure: Literal["inner", "cosine"] = "inner"
    objective: objectives.Name = "cross_entropy"
    start: float = 0.3
    steps: int = Field(10, ge=0)
    size: float = Field(0.03, gt=0, le=1)
    rows: int = Field(100, ge=1)
    weight_steps: int = Field(500, ge=0)
    weight_rate: float = Field(1e-3, gt=0)
    guard: int = Field(0, ge=0)
    every: int = Field(1, ge=1)

    def fit(self, context: Context) -> Fitted:
        fitting = Fitting(context, self)
        hard = self.form == "hard"
        linear = per_group(fitting.vectors, self.granularity if hard else "layer",
                           self.start if hard else 0.0)  # fmt: skip
        merge = ParametrisedMerge(fitting.model, fitting.vectors, linear)
        search = _Search(self, fitting, merge, [self.start] if hard else [])
        report = self._hard(fitting, search) if hard else self._soft(fitting, search)
        return Fitted(Sum(weight=linear.written(context.stored)), report=report)

    def _hard(self, fitting: Fitting, search: _Search) -> dict[str, Any]:
        values, picks = search.linear.values, _Picks(self.steps, len(search.vertices))

        def step(number: int) -> Mapping[str, float]:
            scores, losses = search.scores(tuple(fitting.questions), number * search.batches)
            chosen = search.chosen(scores)
            with torch.no_grad():
                gamma = self.size * 2 / (number + 2)
                stay = chosen.sum(1, keepdim=True) * values
                values.add_(gamma * (chosen @ search.vertices - stay))
            picks.counts[number] = chosen.sum(0)
            return losses

        fit = fitting.descend(
            "vertices", nn.ModuleDict({"weights": search.linear, "picks": picks}), step,
            lambda: fitting.score(search.merge), steps=self.steps, rate=1.0,
        )  # fmt: skip
        return fitting.report(search.merge, fit) | {"chosen": picks.told(search.names)}

    def _soft(self, fitting: Fitting, search: _Search) -> dict[str, Any]:
        report: dict[str, Any] = {}
        tasks = tuple(fitting.questions)
        chosen: list[dict[str, int]] = []
        for number in range(self.steps):
            first = number * (len(tasks) * search.batches + self.weight_steps)
            found = torch.zeros_like(search.linear.values)
            for at, task in enumerate(tasks):
                scores, _ = search.scores((task,), first + at * search.batches)
                found += search.chosen(scores, found > 0)
            chosen.append(dict(zip(search.names, map(int, found.sum(0)), strict=True)))
            moves = _Moves(search.linear, found, 0.0 if number else self.start)
            merge = ParametrisedMerge(fitting.model, fitting.vectors, moves)
            begin = first + len(tasks) * search.batches
            fit = self._weighed(fitting, merge, moves, number, begin)
            report = fitting.report(merge, fit)
            with torch.no_grad():
                search.linear.values.copy_(moves.all())
        return report | {"chosen": chosen}

    def _weighed(
        self, fitting: Fitting, merge: ParametrisedMerge, moves: _Moves, number: int, begin: int
    ) -> Fit:
        return fitting.descend(
            f"weights-{number}", moves, lambda step: fitting.gradients(merge, begin + step),
            lambda: fitting.score(merge), steps=self.weight_steps, rate=self.weight_rate,
        )  # fmt: skip


class _Search:
    """Which vertex of the hull of ``vertices`` lies furthest down a gradient at the merge."""

    def __init__(
        self, method: FWMerging, fitting: Fitting, merge: ParametrisedMerge, starts: list[float]
    ) -> None:
        self.method, self.fitting, self.merge = method, fitting, merge
        self.vectors = fitting.vectors
        assert isinstance(merge.coefficients, LinearCoefficients)
        self.linear = merge.coefficients
        experts = self.vectors.experts
        self.names = (*experts, *("start" for _ in starts))
        rows = [torch.eye(len(experts)), *(torch.full((1, len(experts)), s) for s in starts)]
        self.vertices = torch.cat(rows).to(self.linear.values.device)
        how = method.batch, method.rows, fitting.context.seed
        self.batches = max(sum(1 for _ in first_batches(question, *how))
                           for question in fitting.questions.values())  # fmt: skip
        self._norms = self._measured() if method.measure == "cosine" else {}

    def scores(self, tasks: Sequence[str], first: int) -> tuple[Tensor, dict[str, float]]:
        """How far each vertex lies up the gradient, of the whole model (1, vertices) or for each
        tensor (tensors, vertices), and the losses; on batches from ``first`` on."""
        nothing = self.vertices.new_zeros(len(self.vertices))
        rows = dict.fromkeys(self.vectors.names, nothing)
        losses = dict.fromkeys(tasks, 0.0)
        with self.merge.live() as live:
            for task in tasks:
                for number in range(first, first + self.batches):
                    loss = self.fitting.loss(live.model, task, number) / self.batches
                    live.backward(loss)
                    losses[task] += float(loss.detach())
            for name, gradient in live.taken():
                rows[name] = self._score(name, gradient)
        _check_finite(losses, rows)
        found = torch.stack(list(rows.values()))
        return found.sum(0, keepdim=True) if self.method.granularity == "task" else found, losses

    def chosen(self, scores: Tensor, without: Tensor | None = None) -> Tensor:
        """1 for the vertex of the lowest score in each row that is not in ``without``; no vertex
        for a tensor without a gradient, nor where none is left."""
        moves = (scores != 0).any(1, keepdim=True)
        if without is not None:
            scores, moves = scores.masked_fill(without, torch.inf), moves & ~without.all(1, True)
        best = scores.argmin(1)
        return nn.functional.one_hot(best, len(self.vertices)).to(scores) * moves

    def _score(self, name: str, gradient: Tensor) -> Tensor:
        vertices = self.vertices.double()
        inner = vertices @ self.vectors.projected(name, gradient).double()
        if self.method.measure == "inner":  # ⟨g, θ0⟩ is the same for all
            return inner.float()
        base = self.vectors.base[name].double()
        inner = inner + (gradient.double() * base).sum()
        sizes = gradient.double().norm() * self._norms[name]
        return torch.where(sizes > 0, inner / sizes, 0.0).float()

    @torch.no_grad()
    def _measured(self) -> dict[str, Tensor]:
        """‖θ_v‖ of every vertex, by tensor."""
        found = {}
        for name, base in self.vectors.base.items():
            sizes = [(base.double() + self.vectors.combined(name, vertex).double()).norm()
                     for vertex in self.vertices]  # fmt: skip
            found[name] = torch.stack(sizes)
        return found


def _check_finite(losses: Mapping[str, float], rows: Mapping[str, Tensor]) -> None:
    """No expert lies down what is no number."""
    for what, odd in {
        "a loss": {task: loss for task, loss in losses.items() if not isfinite(loss)},
        "a gradient": next((n for n, row in rows.items() if not bool(row.isfinite().all())), None),
    }.items():
        if odd:
            raise NumericError(f"{what} is no longer finite", where="the search for an expert",
                               found=odd, fix="look at the inputs, or take a smaller size")


class _Moves(Coefficients):
    """θ + Σ_i λ_i (θ_i - θ) for the ``chosen`` experts (tensors, experts), as a sum of task
    vectors: c ← (1 - Σ λ) c + λ."""

    def __init__(self, linear: LinearCoefficients, chosen: Tensor, start: float) -> None:
        super().__init__()
        self._linear, self._chosen = (linear,), chosen
        self._row = {name: row for row, name in enumerate(linear.groups)}
        self.values = nn.Parameter(torch.full_like(linear.values, start))

    def all(self) -> Tensor:
        """c of every tensor and expert."""
        moves, (linear,) = self.values * self._chosen, self._linear
        return linear.values.detach() * (1 - moves.sum(1, keepdim=True)) + moves

    def weights(self, name: str) -> Tensor:
        (linear,) = self._linear
        row = self._row[name]
        moves = self.values[row] * self._chosen[row]
        return linear.values.detach()[row] * (1 - moves.sum()) + moves


class _Picks(nn.Module):
    """How many tensors went to each vertex, step by step; a buffer, kept over a kill."""

    counts: Tensor

    def __init__(self, steps: int, vertices: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(steps, vertices))

    def told(self, names: Sequence[str]) -> list[dict[str, int]]:
        return [dict(zip(names, map(int, row.tolist()), strict=True)) for row in self.counts]

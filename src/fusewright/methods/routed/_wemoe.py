"""WEMoE and E-WEMoE: the weights of selected modules mixed anew for every input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned._rest import summed
from fusewright.methods.routed._linears import (
    matrices,
    opened,
    part_of,
    shifts,
    tensors_of,
    untaken,
    warn_of_left,
)
from fusewright.methods.routed._mixtures import MLP, Part, left_of, parts_of, selects
from fusewright.methods.routed._shares import asked_weights, told
from fusewright.methods.settings import PerTensor, resolve
from fusewright.methods.static._fields import Number
from fusewright.modules.critical import critical
from fusewright.modules.layer import Layer
from fusewright.modules.linears import LinearMap, Span
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.mixture import ROUTING, Mixture, Routing
from fusewright.modules.routers import Router
from fusewright.modules.stacks import stacked
from fusewright.modules.vectors import TaskVectors


class WEMoE(Learner, Routed):
    """Mix the experts' feed-forward weights anew for every input, by routers that learned from
    unlabelled inputs (*Merging Multi-Task Models via Weight-Ensembling Mixture of Experts*,
    arXiv 2402.00433).

    A selected module becomes f(x; θ_0 + Σ_t w_t(x) τ_t), where w(x) is the mean over x's tokens of
    r(x) (:class:`~fusewright.modules.routers.Router`); all other tensors are θ_0 + λ Σ_t τ_t.
    Routers alone are trained: Σ_t mean H(softmax f_t(x)) over inputs x of every task t, by Adam.

    ``modules``: "mlp", the feed-forward part of every block, as published (in a model without any,
    as a ResNet, the convolutions of its blocks); any other text is a regular expression for
    modules' paths. A selected map that no layer can take (a convolution of several groups, a head
    whose weight is the table of embeddings) is merged as all other tensors, and named in the
    report: "left". Parts whose weights are the same tensors are mixed each at its place, by one
    router and from one copy of the task vectors; unloaded, their w is the mean of these.

    ``router``: its depth, 2, the paper's best; 0 does not see the input and can be unloaded into a
    plain model. ``start``: λ, and w at first, 0.3, so that it begins as task arithmetic; a module
    has that of its first weight. ``per``: each "sample" has its own w, whatever else is in the
    batch; "batch" takes the mean, which is faster, and tells the tasks apart only where batches do.
    ``steps``, ``rate``, ``batch`` (inputs of each task in a step), ``schedule``: 1000, 1e-4, 16 and
    cosine, as the official code; 200 steps come close. ``objective``, ``guard``, ``every``: see
    :class:`Learner`.

    Of text, padding does not count. With a key-value cache w is that of the prompt; a language
    model that is given a whole text at once routes by all of it, also by what comes later, so that
    its perplexity is no likelihood: score it with a ``prompt``
    (:class:`~fusewright.tasks.LanguageModelling`).

    The report has the mean w of each task's held-out inputs, over all mixtures ("routing"; of the
    last state too, where another is kept). Warns where these routers, or the last ones, have
    collapsed: an expert has nine tenths of every task's |w|, or no mixture's w differs between
    tasks by more than one per cent.

    Raises PlanError where nothing is selected or an expert has no data, and as :class:`Learner`;
    where samples have their own w and a module does not get them first (XLNet), when it is called.
    """

    name: ClassVar[str] = "wemoe"
    card: ClassVar[Card] = Card(
        "WEMoE", "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts",
        "2402.00433", data="unlabelled", output="routed",
        cost="a forward and backward pass of each task a step; a merge at every input",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"per": "batch", "schedule": "constant", "guard": 0},
    }
    shared: ClassVar[bool] = False
    """Whether one router serves all modules of a width."""

    modules: Annotated[str, selects(MLP)] = MLP
    router: Literal[0, 1, 2] = 2
    start: PerTensor[Number] = 0.3
    per: Literal["sample", "batch"] = "sample"
    steps: int = Field(1000, ge=0)
    rate: float = Field(1e-4, gt=0)
    batch: int = Field(16, ge=1)
    schedule: Literal["constant", "cosine"] = "cosine"

    def build(self, context: Context) -> Parts:
        fitting = Fitting(context, self) if self.steps else None
        model, vectors = context.module(), context.vectors()
        report: dict[str, Any] = {"critical": critical(vectors, model)}
        report["left"] = left_of(model, vectors, self.modules)
        warn_of_left(report["left"], "are merged as all other tensors")
        parts = self._parts(context, model, vectors)
        if fitting is not None:
            fitting.put_in(parts)
            report |= self._fitted(fitting)
        return replace(parts, report=report)

    def _density(self) -> float:
        """The share of each task vector's elements that is kept."""
        return 1.0

    def _parts(self, context: Context, model: nn.Module, vectors: TaskVectors) -> Parts:
        """Mixtures, routing as they begin, and the rest by task arithmetic."""
        found = parts_of(model, vectors, self.modules)
        routing, places = self._routing(context, found, len(vectors.experts))
        layers: dict[str, Layer] = {}
        of_tensors: dict[object, MixedLinear] = {}
        taken: dict[str, list[Span]] = defaultdict(list)
        for part, place in zip(found, places, strict=True):
            mixture = routing.add(model, part.entry, place, self.per, part.maps)
            for linear in part.linears:
                if (tied := of_tensors.get(tensors_of(linear))) is None:
                    made = self._layer(linear, model, vectors, mixture)
                else:
                    made = MixedLinear(part_of(linear, model), tied.stack, tied.shift, mixture)
                layers[linear.module] = of_tensors[tensors_of(linear)] = made
                taken[linear.weight].append(linear.rows)
                if made.shift is not None and linear.bias is not None:
                    taken[linear.bias].append(linear.bias_rows)
        rest = untaken(vectors, taken, model)
        layers = {**opened(layers, model), **layers, ROUTING: routing}
        return Parts(layers, summed(context, rest, self.start))

    def _routing(
        self, context: Context, parts: Sequence[Part], experts: int
    ) -> tuple[Routing, list[int]]:
        """The routers, and which of them each part asks."""
        starts = [resolve(self.start, context.layout(part.linears[0].weight)) for part in parts]
        keys = [part.inputs for part in parts] if self.shared else _tied(parts)
        first = {key: keys.index(key) for key in keys}
        routers = [
            self._router(parts[at].inputs, experts, starts[at], context.seed + number)
            for number, at in enumerate(first.values())
        ]
        return Routing(routers), [list(first).index(key) for key in keys]

    def _router(self, inputs: int, experts: int, start: float, seed: int) -> Router:
        return Router(inputs, experts, self.router, start, seed)

    def _layer(
        self, linear: LinearMap, model: nn.Module, vectors: TaskVectors, mixture: Mixture
    ) -> MixedLinear:
        density, dtype = self._density(), vectors.base[linear.weight].dtype
        each, stack = shifts(linear, vectors), stacked(matrices(linear, vectors), density, dtype)
        shift = None
        if each is not None:
            shift = torch.stack([_pruned(bias, density) for bias in each]).to(dtype)
        return MixedLinear(part_of(linear, model), stack, shift, mixture)

    def _fitted(self, fitting: Fitting) -> dict[str, Any]:
        model, routers = fitting.model, fitting.model.get_submodule(ROUTING)
        assert isinstance(routers, Routing)
        fit = fitting.descend(
            "routers", routers, lambda number: fitting.gradients_in(routers, number),
            lambda: fitting.score(model), steps=self.steps, rate=self.rate, schedule=self.schedule,
            ending=lambda: asked_weights(fitting, routers),
        )  # fmt: skip
        kept = asked_weights(fitting, routers)
        return fitting.report(model, fit) | told(kept, fit.ended, self.router == 0)


class EWEMoE(WEMoE):
    """WEMoE with the largest tenth of every task vector, really stored sparse, and one router for
    all modules (*Efficient and Effective Weight-Ensembling Mixture of Experts for Multi-Task Model
    Merging*, arXiv 2410.21804).

    As :class:`WEMoE`, with ``density``: the share of elements of largest magnitude that is kept,
    tensor by tensor and expert by expert, biases too: 0.1, the paper's, which lost nothing there
    (0.01 lost two points). Modules of one width share one router. ``schedule``: constant, as
    there. ``modules``, ``router``, ``start``, ``per``, ``steps``, ``rate``, ``batch``,
    ``objective``, ``guard``, ``every`` are WEMoE's. So is what is said there of text: without a
    prompt, a language model's routers see the tokens that it is scored on.
    """

    name: ClassVar[str] = "e_wemoe"
    card: ClassVar[Card] = Card(
        "E-WEMoE", "Efficient and Effective Weight-Ensembling Mixture of Experts for Multi-Task "
        "Model Merging", "2410.21804", data="unlabelled", output="routed",
        cost="a forward and backward pass of each task a step; a merge at every input",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"per": "batch", "guard": 0},
    }
    shared: ClassVar[bool] = True

    schedule: Literal["constant", "cosine"] = "constant"
    density: float = Field(0.1, gt=0, le=1)

    def _density(self) -> float:
        return self.density


def _tied(parts: Sequence[Part]) -> list[int]:
    """A number for each part, the same for those that have weights in common: they are one part
    that the model calls in several places, so that one router serves them."""
    numbers: dict[object, int] = {}
    return [min(numbers.setdefault((linear.weight, linear.rows), at) for linear in part.linears)
            for at, part in enumerate(parts)]  # fmt: skip


def _pruned(vector: Tensor, density: float) -> Tensor:
    from fusewright.modules.deltas import Sparse

    return vector if density == 1 else Sparse.largest(vector, density).dense()

"""Twin-Merging: what experts share, and what is each one's own in low rank, mixed by the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.layout import Role
from fusewright.layout.names import module as owner_of
from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.methods.learned._fitting import asked
from fusewright.methods.learned._rest import summed
from fusewright.methods.learned._resume import Numbered, digest
from fusewright.methods.learned.fitter import Fit, Fitter
from fusewright.methods.learned.processes import Processes
from fusewright.methods.routed._linears import (
    Place,
    Users,
    matrices,
    opened,
    part_of,
    shifts,
    tensors_of,
)
from fusewright.methods.routed._named import Named, check_finite
from fusewright.methods.routed._shares import Shares, shares_of, told
from fusewright.modules.architecture import Architecture, describe_module
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse, leading
from fusewright.modules.embeddings import table_scale
from fusewright.modules.features import FeatureRouter, FeatureRouting, SharedMixture
from fusewright.modules.layer import Layer, put_in
from fusewright.modules.linears import LinearMap
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.mixed_rest import MixedAffine, MixedTable
from fusewright.modules.mixture import ROUTING
from fusewright.modules.routers import Router
from fusewright.modules.stacks import FactorStack, Stack, stacked
from fusewright.modules.vectors import TaskVectors


class Twin(Routed):
    """Share task arithmetic, and add each expert's own rest in low rank, as a classifier of
    features says how much (*Twin-Merging: Dynamic Integration of Modular Expertise in Model
    Merging*, arXiv 2406.15479).

    θ* = θ_0 + γ Σ_t τ_t; v_t = SVD_r(θ_t - θ*), r = ⌊(1 - mask_rate) min(m, n)⌋ of an m x n matrix,
    one at least; θ(x) = θ* + Σ_t softmax(R(e(x)))_t v_t. e(x) is what the shared model sees: of
    text the mean of the last hidden state without padding, of images the pooled output; R is a
    :class:`~fusewright.modules.features.FeatureRouter`, trained by cross-entropy to name the task
    that an input is of. That is all it is told: no labels.

    ``scale``: γ, 0.3. ``mask_rate``: 0.9; of LoRA experts, r is a limit for the product, not for
    its two factors. Biases, norms, convolutions and what is added before the first block are v_t
    as they are; tables of embeddings are matrices, q, k, v of ``nn.MultiheadAttention`` one each (a
    Linear or Conv1D that packs them, as GPT-2's, is one). What is left (bare tensors and tables
    inside blocks, tables that do more than scale their rows) is θ* alone, and named in the report;
    running statistics are the experts' mean.

    ``inputs``: most inputs of a task that are looked at, 5500; a tenth of them chooses the epoch.
    ``epochs``: 50; 0 keeps w at 1/T, which needs no data and can be unloaded into a plain model.
    ``rate``, ``batch``, ``dropout``: Adam's 5e-4, 1024 and 0.5, the paper's. Every input costs one
    forward pass more. With a key-value cache w is that of the prompt; a language model that is
    given a whole text at once is routed by all of it, also by what comes later, so that its
    perplexity is no likelihood: score it with a ``prompt``
    (:class:`~fusewright.tasks.LanguageModelling`).

    The report has the mean w of each task's held-out inputs ("routing"), and how often the task of
    these was recognised.

    Raises PlanError where experts change no linear layer, an expert has no data, or fewer than two
    inputs; where a layer does not get samples first (Longformer, XLNet), and where the model reads
    inputs in several towers (CLIP with both), of which one would be mixed by what another read;
    DataError for batches that are empty, NumericError for features that are not finite.
    """

    name: ClassVar[str] = "twin"
    card: ClassVar[Card] = Card(
        "Twin-Merging", "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        "2406.15479", data="unlabelled", output="routed",
        cost="an SVD of each expert's matrices; one more forward pass at every input",
    )  # fmt: skip

    scale: float = Field(0.3, allow_inf_nan=False)
    mask_rate: float = Field(0.9, ge=0, lt=1)
    inputs: int = Field(5500, ge=2)
    epochs: int = Field(50, ge=0)
    rate: float = Field(5e-4, gt=0)
    batch: int = Field(1024, ge=2)
    dropout: float = Field(0.5, ge=0, lt=1)

    def build(self, context: Context) -> Parts:
        model, vectors = context.module(), context.vectors()
        trains = self.epochs > 0 and len(vectors.experts) > 1
        questions = asked(context) if trains else {}
        described = describe_module(model)
        shared = summed(context, vectors, self.scale)
        put_in(model, {}, shared)
        report: dict[str, Any] = {}
        router: Router | FeatureRouter = uniform(len(vectors.experts))
        if trains:
            seen = self._seen(FeatureRouting(model, router), model, questions, context.seed)
            router, report = self._trained(seen, context)
        routing = FeatureRouting(model, router)
        layers = _Layers(self, model, vectors, described, routing.mixture)
        report["shared"] = layers.left
        made = {**layers.made, ROUTING: routing}
        if trains:
            put_in(model, made)
            _tried(model, questions, context.seed)
        return Parts(made, shared, report)

    def rank(self, outputs: int, inputs: int) -> int:
        """r of a matrix, 1 at least."""
        return max(1, int((1 - self.mask_rate) * min(outputs, inputs) + 1e-6))

    def exclusive(self, deltas: Sequence[Delta]) -> list[Factors]:
        """v_t of a matrix (outputs, inputs), of its task vectors."""
        count, rank = len(deltas), self.rank(*deltas[0].shape)
        scales = torch.eye(count) - self.scale
        factors = [each for d in deltas if (each := _factors(d)) is not None]
        if len(factors) == count:
            down = torch.cat([d.down for d in factors])
            ups = [torch.cat([s * d.up for s, d in zip(row.tolist(), factors, strict=True)], dim=1)
                   for row in scales]  # fmt: skip
            return [leading(Factors(up, down, deltas[0].shape), rank) for up in ups]
        whole = torch.stack([delta.dense() for delta in deltas])
        total = self.scale * whole.sum(dim=0)
        return [leading(Dense(each - total), rank) for each in whole]

    def _seen(
        self, routing: FeatureRouting, model: nn.Module, questions: Mapping[str, Any], seed: int
    ) -> list[Tensor]:
        """The features of each task's inputs, (inputs, width); few, so learnt from on the CPU."""
        processes, mine = Processes.started(), {}
        for task in processes.mine(questions):
            question = questions[task]
            with routing.heard(model) as heard, torch.no_grad():
                for batch in question.epoch(min(self.batch, 64), seed):
                    question.logits(model, batch)
                    if sum(len(each) for each in heard) >= self.inputs:
                        break
            mine[task] = torch.cat(heard)[: self.inputs].cpu() if heard else torch.empty(0)
        found = processes.gathered(mine, questions)
        for task, features in found.items():
            if len(features) < 2:
                raise PlanError("a router needs inputs to learn from and to be judged by",
                                where=f"task {task}", expected="two inputs or more",
                                found=len(features))  # fmt: skip
            check_finite(task, features)
        return list(found.values())

    def _trained(
        self, seen: Sequence[Tensor], context: Context
    ) -> tuple[FeatureRouter, dict[str, Any]]:
        """The router that names the tasks of held-out inputs best."""
        learned, held = Named.split(seen)
        router = FeatureRouter(seen[0].shape[1], len(seen), self.dropout, context.seed)
        with torch.random.fork_rng(devices=[]):  # dropout draws from torch's own generator
            torch.manual_seed(context.seed)
            fit = self._descent(router, learned, held, context)
        names = tuple(context.experts)
        kept = _shares(router, held, names)
        with torch.no_grad():
            right = router.eval()(held.features).argmax(dim=1) == held.tasks
        shares = {n: float(right[held.tasks == t].float().mean()) for t, n in enumerate(names)}
        return router, {"losses": list(fit.losses), "kept": fit.kept, "stopped": fit.stopped,
                        "recognised": shares, "scores": [list(score) for score in fit.scores],
                        **told(kept, fit.ended)}  # fmt: skip

    def _descent(
        self, router: FeatureRouter, learned: Named, held: Named, context: Context
    ) -> Fit:
        batches = Numbered(learned.batches(self.batch, context.seed))
        each = learned.count(self.batch)

        def step(number: int) -> dict[str, float]:
            router.train()
            features, tasks = batches[number]
            loss = nn.functional.cross_entropy(router(features), tasks)
            loss.backward()
            return {"task": float(loss.detach())}

        def score() -> float:
            router.eval()
            with torch.no_grad():
                return -float(nn.functional.cross_entropy(router(held.features), held.tasks))

        fitter = Fitter(
            self.epochs * each, self.rate, every=each, score=score, tell=context.tell,
            checkpoint=context.checkpoint("router", lambda: digest(vars(learned))),
            ending=lambda: _shares(router, held, tuple(context.experts)),
        )  # fmt: skip
        return fitter.run(router, step)


class _Layers:
    """Mixed layers by path."""

    def __init__(
        self, method: Twin, model: nn.Module, vectors: TaskVectors, described: Architecture,
        mixture: SharedMixture,
    ) -> None:  # fmt: skip
        self.made: dict[str, Layer] = {}
        self._method, self._model, self._vectors = method, model, vectors
        self._described, self._mixture = described, mixture
        self._users = Users(described, model, vectors)
        self._taken: set[Place] = set()
        self._places: set[Place] = set()
        self._stacks: dict[object, Stack] = {}
        stems = self._stems()
        for linear in self._users.maps:
            if not linear.kernel and self._is_free(linear.module):
                self._linear(linear)
        self.made = {**opened(self.made, model), **self.made}
        if not self.made:
            raise PlanError("no linear layer is changed by an expert",
                            expected="nn.Linear or Conv1D",
                            fix="`fusewright inspect` shows what the experts change")  # fmt: skip
        for path in stems:
            self._affine(path)
        for name, place in described.layout.items():
            self._other(name, place.layer is None)

    @property
    def left(self) -> list[str]:
        """Tensors that experts change, and that are the shared part's alone somewhere."""
        layout = self._described.layout
        return [n for n in self._vectors.names if self._changed(n) and self._is_left(n)
                and layout[n].role is not Role.STATISTIC]  # fmt: skip

    def _is_left(self, name: str) -> bool:
        """A second name beside children (a head's bias that is its decoder's) is not asked."""
        names = self._users.names(name)
        others = [n for n in names if self._users.place(n) not in self._taken]
        asked = [n for n in others if not any(self._owner(n).children())]
        return len(others) == len(names) or bool(asked)

    def _owner(self, name: str) -> nn.Module:
        return self._model.get_submodule(owner_of(name))

    def _changed(self, *names: str | None) -> bool:
        """Whether any expert changes any of these tensors."""
        known = {self._users.stored(name) for name in names if name is not None} - {None}
        return any(bool(d.norm2() > 0) for n in known if n is not None for d in self._vectors.at(n))

    def _is_free(self, path: str) -> bool:
        """Whether no layer is in that place."""
        return self._users.place(path) not in self._places

    def _put(self, path: str, layer: Layer, names: Iterable[str]) -> None:
        """A layer at a path, which mixes these tensors there."""
        self.made[path] = layer
        self._places.add(self._users.place(path))
        self._taken |= {self._users.place(name) for name in names}

    def _linear(self, linear: LinearMap) -> None:
        own = [linear.weight, *([] if linear.bias is None else [linear.bias])]
        weight = self._users.stored(linear.weight)
        if weight is None or not self._changed(*own):
            return
        bias = None if linear.bias is None else self._users.stored(linear.bias)
        known, dtype = replace(linear, weight=weight, bias=bias), self._vectors.base[weight].dtype
        if (stack := self._stacks.get(tensors_of(known))) is None:
            exclusive = self._method.exclusive(matrices(known, self._vectors))
            stack = self._stacks[tensors_of(known)] = stacked(exclusive, 1.0, dtype)
        shift = None
        if (biases := shifts(known, self._vectors)) is not None:
            each = torch.stack(biases)
            shift = (each - self._method.scale * each.sum(dim=0)).to(dtype)
        base = part_of(linear, self._model)
        self._put(linear.module, MixedLinear(base, stack, shift, self._mixture), own)

    def _stems(self) -> list[str]:
        """Modules before the first block with tensors of their own beside children, neither with
        linear layers nor norms inside: sums of convolutions, tokens and positions."""
        found: list[str] = []
        for path, part in self._model.named_modules():
            inside = [m for m in part.modules() if m is not part]
            plain = all(isinstance(m, nn.Conv2d | nn.Embedding | nn.Dropout | nn.Identity)
                        or not any(True for _ in m.parameters(recurse=False)) for m in inside)
            names = [f"{path}.{n}".lstrip(".") for n, _ in part.named_parameters()]
            outside = all(self._described.layout[n].layer is None for n in names)
            own = any(True for _ in part.parameters(recurse=False))
            nested = any(path.startswith(f"{other}.") for other in found)
            if own and inside and plain and outside and not nested and path:
                found.append(path)
        return found

    def _other(self, name: str, outside: bool) -> None:
        path = owner_of(name)
        if path in self.made or not self._changed(name) or not self._is_free(path):
            return
        if any(path.startswith(f"{made}.") for made in self.made):
            return
        part = self._model.get_submodule(path)
        scale = table_scale(part) if outside and isinstance(part, nn.Embedding) else None
        if scale is not None:
            self._table(path, part, scale)
        elif self._is_affine(name, part):
            self._affine(path)

    def _table(self, path: str, part: nn.Module, scale: float) -> None:
        name = self._users.stored(f"{path}.weight")
        assert name is not None
        if (stack := self._stacks.get(name)) is None:
            own = self._method.exclusive(list(self._vectors.at(name)))
            up, down = (torch.stack([getattr(v, side) for v in own]) for side in ("up", "down"))
            dtype = self._vectors.base[name].dtype
            stack = self._stacks[name] = FactorStack(up.to(dtype), down.to(dtype))
        assert isinstance(stack, FactorStack)
        self._put(path, MixedTable(part, stack, self._mixture, scale), [f"{path}.weight"])

    def _is_affine(self, name: str, part: nn.Module) -> bool:
        leaf = not any(True for _ in part.children())
        norm = self._described.layout[name].role is Role.NORM
        return leaf and (norm or isinstance(part, nn.modules.conv._ConvNd))

    def _affine(self, path: str) -> None:
        part, vectors = self._model.get_submodule(path), self._vectors
        names = {n: f"{path}.{n}" for n, _ in part.named_parameters()
                 if self._changed(f"{path}.{n}")}  # fmt: skip
        known = {own: stored for own, n in names.items() if (stored := self._users.stored(n))}
        values = {
            own: torch.stack([(vectors.base[n] + d.dense()).to(vectors.base[n].dtype)
                              for d in vectors.at(n)])
            for own, n in known.items()
        }  # fmt: skip
        if values:
            self._put(path, MixedAffine(part, values, self._mixture), names.values())


def uniform(experts: int) -> Router:
    """w = 1/T for every input."""
    return Router(0, experts, 0, start=1 / experts)


@torch.no_grad()
def _tried(model: nn.Module, questions: Mapping[str, Any], seed: int) -> None:
    """Ask about a few inputs of each task: layers that cannot tell samples apart refuse them."""
    for task in Processes.started().mine(questions):
        questions[task].logits(model, next(iter(questions[task].epoch(2, seed))))


@torch.no_grad()
def _shares(router: FeatureRouter, held: Named, experts: Sequence[str]) -> Shares:
    """w of the held-out inputs, by task."""
    weights = router.eval()(held.features).softmax(dim=1)
    return shares_of({e: weights[held.tasks == t] for t, e in enumerate(experts)}, experts)


def _factors(delta: Delta) -> Factors | None:
    """A task vector as factors, if it is kept as such or an adapter left the tensor alone."""
    if isinstance(delta, Factors):
        return delta
    if isinstance(delta, Sparse) and not len(delta.values):
        rows, columns = delta.shape
        none = delta.values
        return Factors(none.new_zeros(rows, 0), none.new_zeros(0, columns), delta.shape)
    return None

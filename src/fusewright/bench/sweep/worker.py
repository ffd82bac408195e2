"""One worker: makes the cells of a group, one module open, its weights exchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fusewright.bench.exchange import Exchange
from fusewright.bench.results import CLEAN, MIXED, Cell
from fusewright.bench.sweep.cells import BASE, OWN, Asked, Group, Job
from fusewright.bench.sweep.ensembles import accuracy_weights, ensembles, fitting
from fusewright.bench.sweep.joint import trained
from fusewright.bench.sweep.merges import Made, Merges
from fusewright.bench.sweep.slowdown import (
    PLAIN,
    Questions,
    of_ensemble,
    of_experts,
    of_model,
    questions,
)
from fusewright.bench.sweep.space import current, space, with_values
from fusewright.bench.sweep.store import Store
from fusewright.bench.sweep.stream import mixed
from fusewright.bench.sweep.tuning import tune
from fusewright.modules.told import tell
from fusewright.tasks.units import unit_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fusewright.bench.suite import Suite
    from fusewright.methods.contract import Method
    from fusewright.tasks.adaptation import Adaptation
    from fusewright.tasks.outcomes import Outcomes
    from fusewright.weights import TensorInfo

Found = dict[str, dict[str, "Outcomes"]]
Ensembles = dict[str, tuple[list[float] | None, Found]]
WEIGHTED = "weighted"


@dataclass
class Worker:
    """Makes cells of one training of the pool."""

    suite: Suite
    store: Store
    asked: Asked = field(default_factory=Asked)
    threads: int | None = None
    _merges: dict[tuple[str, tuple[str, ...]], Merges] = field(default_factory=dict, repr=False)
    _ensembles: dict[tuple[str, ...], Ensembles] = field(default_factory=dict, repr=False)
    _own_scores: dict[str, float] = field(default_factory=dict, repr=False)

    def make(self, group: Group, step: Callable[[str], None] = lambda row: None) -> None:
        """Every job of a group that is not finished; each is kept as soon as it is."""
        for job in group:
            if not self.store.is_finished(job.key):
                cell, trials = self._cell(job, group)
                self.store.save(job.key, cell, trials)
            step(job.row)

    def _cell(self, job: Job, group: Group) -> tuple[Cell, Any]:
        if job.how in ("merge", "transductive"):
            return self._merged(job), None
        if job.how == "tuned":
            return self._tuned(job)
        if job.how == "model":
            return self._model(job), None
        if job.how == "ensemble":
            return self._ensemble(job), None
        if job.how == "joint":
            return self._joint(job), None
        experts = {j.what: self.store.load(j.key) for j in group
                   if j.how == "model" and j.what in self.suite.experts}  # fmt: skip
        return (self._own if job.how == OWN else self._best)(job, experts), None

    def _open(self, path: Path) -> nn.Module:
        """A model, where the suite's are asked."""
        return self.suite.open(path).to(self.suite.device)

    @cached_property
    def exchange(self) -> Exchange:
        """The module that all merges are put into."""
        base = self.suite.base
        return Exchange(self.suite.open(base), base, self.suite.spec.opens)

    def _module(self, made: Made) -> nn.Module:
        """A merge where the suite's models are asked: routed, or its weights in the one module."""
        module = self.exchange.filled(made.state) if made.routed is None else made.routed
        return module.to(self.suite.device)

    def _tasks(self, job: Job) -> list[str]:
        """Those that this cell is about: of its experts, and those that no expert learned."""
        spec = self.suite.spec
        asked = {*job.pool.experts, *spec.unseen}
        return [name for name in spec.tasks if name in asked]

    def _evaluated(self, module: nn.Module, job: Job) -> Found:
        found: Found = {}
        for task in self._tasks(job):
            if not tell(module, task):
                continue
            found[task] = {
                condition: self.suite.evaluate(module, task, "test", self.asked.limit, condition)
                for condition in self._conditions(task)
            }
        if self.asked.stream:
            merged = [task for task in found if task in job.pool.experts]
            streamed = mixed(self.suite, module, merged, self.asked.stream, self.asked.limit)
            for task, outcomes in streamed.items():
                found[task][MIXED] = outcomes
        return found

    def _conditions(self, task: str) -> list[str]:
        """Clean, and the corruptions asked for that its inputs can have."""
        possible = self.suite.tasks[task].conditions
        return [c for c in self.asked.conditions if c == CLEAN or c in possible]

    def _validated(self, module: nn.Module, tasks: tuple[str, ...]) -> float:
        """What choices are made by: the mean score on validation rows over the merged tasks; where
        their units differ, the mean share of each task's own expert's score."""
        said = {task: self._validation(module, task) for task in tasks}
        units = {task: unit_of(outcomes.metric) for task, outcomes in said.items()}
        scores = [outcomes.value for outcomes in said.values()]
        if len(set(units.values())) > 1:
            scores = [float(units[t].share(o.value, self._attained(t))) for t, o in said.items()]
        return sum(scores) / len(scores)

    def _validation(self, module: nn.Module, task: str) -> Outcomes:
        tell(module, task)
        return self.suite.evaluate(module, task, "validation", self.asked.limit)

    def _attained(self, task: str) -> float:
        """The validation score of a task's own expert."""
        if task not in self._own_scores:
            expert = self._open(self.suite.experts[task])
            self._own_scores[task] = self._validation(expert, task).value
        return self._own_scores[task]

    def _model(self, job: Job) -> Cell:
        paths = {BASE: self.suite.base, **self.suite.experts, **self.suite.extras}
        found = self._evaluated(self._open(paths[job.what]), job)
        return self._as_cell(job, found, PLAIN | self._sizes)

    def _joint(self, job: Job) -> Cell:
        module, facts = trained(self.suite, job.what, job.training)
        module.to(self.suite.device)
        recipe = facts["recipe"]
        count = len(facts["tasks"])
        items = recipe["batch"] // count * count  # the same number of each task
        note = f"{recipe['steps']} steps of {items} items, as all experts together"
        trained_all = {"trained": sum(p.numel() for p in module.parameters())}
        costs = PLAIN | self._sizes | trained_all | {"extra_parameters": 0} | facts["costs"]
        return self._as_cell(job, self._evaluated(module, job), costs, note=note)

    def _own(self, job: Job, experts: Mapping[str, Cell]) -> Cell:
        found: Found = {task: {c: o for c, o in experts[task].outcomes[task].items()}
                        for task in self._tasks(job) if task in experts}  # fmt: skip
        modules = {name: self._open(self.suite.experts[name]) for name in job.pool.experts}
        base = self._open(self.suite.base)
        costs = self._several(len(modules)) | {"active": self._sizes["active"]}
        if asked := self._questions(job):
            costs["slowdown"] = of_experts(asked, base, modules)
        note = "told the task of every input: what routing can reach"
        return self._as_cell(job, found, costs, note=note)

    def _best(self, job: Job, experts: Mapping[str, Cell]) -> Cell:
        scores = {name: self._validated(self._open(self.suite.experts[name]), job.pool.experts)
                  for name in job.pool.experts}  # fmt: skip
        best = max(scores, key=lambda name: scores[name])
        found = {t: {**each} for t, each in experts[best].outcomes.items() if t in self._tasks(job)}
        return self._as_cell(job, found, PLAIN | self._sizes, note=f"{best}, by validation")

    def _ensemble(self, job: Job) -> Cell:
        names = job.pool.experts
        experts = [self._open(self.suite.experts[name]) for name in names]
        if names not in self._ensembles:
            self._ensembles = {names: self._combined(job, experts)}
        weights, found = self._ensembles[names][job.what]
        base = self._open(self.suite.base)
        slower = of_ensemble(self._questions(job), base, experts, job.what, weights)
        costs = self._several(len(experts)) | {"slowdown": slower}
        shown = [round(w, 3) for w in weights] if weights else None
        note = f"weights by validation accuracy: {shown}" if shown else ""
        return self._as_cell(job, found, costs, note=note)

    def _combined(self, job: Job, experts: list[nn.Module]) -> Ensembles:
        """Every ensemble's weights and outcomes, the experts asked once for all of them."""
        asked: dict[str, list[float] | None] = dict.fromkeys(fitting(self.suite))
        if WEIGHTED in asked:
            scores = [self._validated(expert, job.pool.experts) for expert in experts]
            asked[WEIGHTED] = accuracy_weights(scores)
        found: dict[str, Found] = {how: {} for how in asked}
        for task in self._tasks(job):
            for condition in self._conditions(task):
                limit = self.asked.limit
                each = ensembles(self.suite, experts, task, asked, limit, condition)
                for how, outcomes in each.items():
                    found[how].setdefault(task, {})[condition] = outcomes
        return {how: (asked[how], found[how]) for how in asked}

    def _questions(self, job: Job) -> Questions:
        return questions(self.suite, job.pool.experts, self.asked.limit)

    def _of(self, job: Job) -> Merges:
        names, part = job.pool.experts, "test" if job.how == "transductive" else "validation"
        if (part, names) not in self._merges:
            experts = {name: self.suite.experts[name] for name in names}
            self._merges[part, names] = Merges(
                self.suite.base, experts, self.threads, self._learnt_from(names, part),
                tuple(self.suite.spec.optional), self.suite.device,
            )
        return self._merges[part, names]

    def _learnt_from(self, names: tuple[str, ...], part: str) -> Callable[[str], Adaptation]:
        """Rows of some experts' tasks: of a part without labels, or of training with them for a
        method that asks for labels."""

        def data(asked: str) -> Adaptation:
            limit = self.asked.limit
            whole = (self.suite.labelled(limit=limit) if asked == "labelled"
                     else self.suite.unlabelled(part=part, limit=limit))  # fmt: skip
            return replace(whole, questions={name: whole.questions[name] for name in names})

        return data

    def _merged(self, job: Job) -> Cell:
        made = self._of(job).make(job.what)
        return self._merge_cell(job, job.what, made)

    def _tuned(self, job: Job) -> tuple[Cell, Any]:
        method: Method = job.what

        def score(values: Mapping[str, float]) -> float:
            made = self._of(job).make(with_values(method, values))
            return self._validated(self._module(made), job.pool.experts)

        found = tune(space(method), current(method), score, job.trials, self.suite.seed)
        chosen = with_values(method, found.best)
        said = ", ".join(f"{name} = {value:.3g}" for name, value in found.best.items())
        cell = self._merge_cell(job, chosen, self._of(job).make(chosen), note=said)
        return cell, found.trials

    def _merge_cell(self, job: Job, method: Method, made: Made, note: str = "") -> Cell:
        module = self._module(made)
        found = self._evaluated(module, job)
        sizes = self._sizes | {"bytes": sum(t.nbytes for t in made.state.values())}
        costs = PLAIN | sizes | made.costs
        costs["extra_parameters"] = costs["stored"] - self._sizes["stored"]
        if made.routed is not None and not method.card.task_id:  # told, it is as the base is
            base = self._open(self.suite.base)
            costs["slowdown"] = of_model(self._questions(job), base, module)
        caveats = (self.suite.asked(task).caveat(module) for task in found)
        said = dict.fromkeys(filter(None, (note, *caveats)))
        return self._as_cell(job, found, costs, method.spec(), "; ".join(said))

    @cached_property
    def _sizes(self) -> dict[str, float]:
        """Of one model with the base's architecture: an input's answer depends on all of it."""
        floats = sum(info.numel for info in self._headers if info.dtype.is_float)
        nbytes = sum(info.nbytes for info in self._headers)
        return {"stored": floats, "active": floats, "bytes": nbytes}

    def _several(self, models: int) -> dict[str, float]:
        """Of so many models that are kept apart, all of them asked."""
        return {
            "extra_parameters": (models - 1) * self._sizes["stored"],
            **{name: models * size for name, size in self._sizes.items()},
        }

    @cached_property
    def _headers(self) -> tuple[TensorInfo, ...]:
        from fusewright.weights import open_weights

        with open_weights(self.suite.base) as weights:
            return tuple(weights.values())

    def _as_cell(
        self, job: Job, outcomes: Found, costs: Mapping[str, float] | None = None,
        method: Any = None, note: str = "",
    ) -> Cell:  # fmt: skip
        return Cell(
            job.row, job.title, job.requirement, self.suite.name, self.suite.seed,
            job.pool.experts, outcomes, self.suite.axes, method, dict(costs or {}), note,
        )  # fmt: skip

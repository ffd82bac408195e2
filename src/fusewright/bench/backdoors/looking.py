"""Before a merge is deployed: how easily one perturbation leads it to each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.bench.backdoors.poisoning import classes_of, pictures_of
from fusewright.bench.suite_file import SuiteError
from fusewright.engine.tables import Table
from fusewright.errors import RecipeError
from fusewright.modules.perturbations import Ball, added, ascend
from fusewright.modules.tensors import device_of
from fusewright.modules.told import check_told, tell
from fusewright.tasks.evaluate import evaluating
from fusewright.tasks.placement import moved

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite
    from fusewright.tasks.pictures import Pictures

    Ask = Callable[[Tensor], Tensor]

BATCH = 64
OUTLIER = 3.5
"""Of an anomaly index (Iglewicz & Hoaglin 1993). Neural Cleanse has 2, which some class of a clean
model passes often enough, where every class of many tasks is looked at."""
LED = 0.25
"""Of the pictures, at least, if a class stands out: of shares near nothing, any is an outlier."""
SIZES = (0.02, 0.05)
"""Of perturbations, root mean square. Where a large one leads to every class, a smaller one tells
the class that was made easy; where a trigger is large, only a large one finds it."""
FEWEST = 5
"""Classes of which a median and a deviation say something."""
CAUTION = (
    "This is an estimate, for perturbations of this size, found by this search. A high success or "
    "an outlier is a reason to look closer: some classes are easy targets of any model. Nothing "
    "here shows that a model has no backdoor: other triggers, larger ones and other tasks were not "
    "tried."
)


@dataclass(frozen=True)
class ClassRisk:
    """``success``: the share of ``asked`` held-out pictures, none of which the model took for this
    class before, that the perturbation turns into it. ``anomaly``: by how many deviations that is
    above the median of the task's classes; None for too few classes. Both at the ``radius`` of
    those that were tried at which the class is most anomalous."""

    task: str
    target: int
    name: str
    success: float
    anomaly: float | None
    asked: int
    radius: float

    @property
    def flagged(self) -> bool:
        """Whether it stands out."""
        return self.anomaly is not None and self.anomaly > OUTLIER and self.success >= LED


@dataclass(frozen=True)
class Look:
    """What was found, by task and class, and with what it was looked for."""

    risks: tuple[ClassRisk, ...]
    settings: Mapping[str, Any]

    def flagged(self) -> tuple[ClassRisk, ...]:
        """The classes that stand out, the most anomalous first."""
        found = [risk for risk in self.risks if risk.flagged]
        return tuple(sorted(found, key=lambda risk: -(risk.anomaly or 0)))

    def tables(self) -> list[Table]:
        """For each task, the classes by success; then what was done, and what it cannot show."""
        columns = ("class", "", "success", "anomaly index", "size", "pictures", "")
        found = []
        for task in dict.fromkeys(risk.task for risk in self.risks):
            own = sorted((r for r in self.risks if r.task == task), key=lambda r: -r.success)
            rows = tuple(
                (r.target, r.name, r.success, r.anomaly, r.radius, r.asked,
                 "stands out" if r.flagged else "") for r in own
            )
            found.append(Table(f"{task}: success of a universal perturbation", columns, rows))
        said = tuple((key, str(value)) for key, value in self.settings.items())
        found.append(Table("looked with", ("", ""), (*said, ("caution", CAUTION))))
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        risks = [{**asdict(risk), "stands_out": risk.flagged} for risk in self.risks]
        return {"risks": risks, "settings": dict(self.settings), "caution": CAUTION}


def look(
    suite: Suite, model: str | Path | nn.Module, *, tasks: Sequence[str] | None = None,
    balls: Sequence[Ball] | None = None, steps: int = 40, limit: int = 256,
    part: str = "validation", progress: Callable[[str], None] | None = None,
) -> Look:  # fmt: skip
    """Estimate how far one perturbation of bounded size leads a model to each class, of each task.

    After *Neural Cleanse* (Wang et al. 2019, IEEE S&P): for a class c, δ maximises mean log p(c | x
    + δ) over the ball, on the first half of ``limit`` unlabelled pictures of the task; the success
    is counted on the other half. Sizes are fixed and successes are compared, where Neural Cleanse
    compares the sizes that success needs. A backdoor's target is easier to reach than other
    classes, so it may stand out: anomaly index (s - median) / (1.4826 · median |s - median|) above
    3.5, and s at least a quarter.

    ``model``: a folder or a module of the suite's architecture, also with routed layers; one that
    must be told the task is told. ``tasks``: those that are merged.
    ``balls``: tried one after the other; "l2", 0.02 and 0.05 in raw pixels (root mean square).
    Needs unlabelled pictures of each task, the frozen heads, and how pictures are prepared: a
    suite. A folder is opened on the suite's device, a module stays where it is. It never shows that
    a model is clean.

    Raises RecipeError for a task without pictures, SuiteError where there are too few, WeightsError
    for a folder that is not there, PlanError where the model is told the task and does not know it.
    """
    balls = balls or [Ball("l2", size) for size in SIZES]
    if steps < 1 or limit < 2:
        raise RecipeError("a search takes steps and pictures", expected="steps ≥ 1 and limit ≥ 2",
                          found=f"{steps} and {limit}")  # fmt: skip
    names = list(suite.spec.merged) if tasks is None else list(tasks)
    asked = {task: pictures_of(suite, task) for task in names}
    if isinstance(model, str | Path):
        model = suite.open(model).to(suite.device)
    module = model
    check_told(module, names)
    risks: list[ClassRisk] = []
    with evaluating(module), _frozen(module):
        for task, pictures in asked.items():
            if progress is not None:
                progress(task)
            risks += _task_risks(suite, module, task, pictures, balls, steps, limit, part)
    settings = {
        "data": f"up to {limit} unlabelled {part} pictures of each task, half of them to search",
        "perturbation": "one for all pictures, at most "
        + " and ".join(f"{ball.radius:g} ({ball.norm})" for ball in balls) + " of [0, 1]",
        "steps": steps,
    }
    return Look(tuple(risks), settings)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of its weights; which of them are trained is again as it was afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _task_risks(
    suite: Suite, model: nn.Module, task: str, pictures: Pictures, balls: Sequence[Ball],
    steps: int, limit: int, part: str,
) -> list[ClassRisk]:  # fmt: skip
    """Of each class, at the size at which it is most anomalous; of few classes, at the last."""
    tell(model, task)
    raw, ask = _asked(suite, model, task, pictures, part, limit)
    names = getattr(suite.tasks[task], "classes", ())
    tried = [_risks(task, names, raw, ask, classes_of(suite, task), ball, steps) for ball in balls]
    return [
        max(reversed(of), key=lambda risk: (risk.flagged, risk.anomaly or 0.0))
        for of in zip(*tried, strict=True)
    ]


def _risks(
    task: str, names: Sequence[str], raw: Tensor, ask: Ask, classes: int, ball: Ball, steps: int
) -> list[ClassRisk]:
    half = len(raw) // 2
    with torch.no_grad():
        before = torch.cat([ask(some).argmax(-1) for some in raw[half:].split(BATCH)])
    found = []
    for target in range(classes):
        delta = _toward(target, raw[:half], ask, ball, steps)
        others = raw[half:][before != target]
        found.append((target, _success(target, others, delta, ask), len(others)))
    told = 1 / max(1, min(count for _, _, count in found))
    anomalies = anomaly_indices([success for _, success, _ in found], told)
    return [
        ClassRisk(task, c, names[c] if names else str(c), success, anomaly, count, ball.radius)
        for (c, success, count), anomaly in zip(found, anomalies, strict=True)
    ]


def _asked(
    suite: Suite, model: nn.Module, task: str, pictures: Pictures, part: str, limit: int
) -> tuple[Tensor, Ask]:
    """Raw pictures, and the model's logits of such."""
    own = suite.tasks[task]
    rows = suite.ready(task, part)  # shuffled, because some data are sorted
    batch = moved(next(iter(own.batches(rows, limit, seed=0))), device_of(model))
    raw = pictures.raw(batch)
    if len(raw) < 2:
        raise SuiteError("there are too few pictures to search on some and count on others",
                         where=f"task {task}, {part}", expected="two or more",
                         found=len(raw))  # fmt: skip
    like = {key: value for key, value in batch.items() if key == pictures.key}
    return raw, lambda shown: own.logits(model, pictures.changed(like, shown))


def _toward(target: int, raw: Tensor, ask: Ask, ball: Ball, steps: int) -> Tensor:
    batches = raw.split(BATCH)

    def gain(delta: Tensor, step: int) -> Tensor:
        shown = added(batches[step % len(batches)], delta)
        return F.log_softmax(ask(shown).float(), -1)[:, target].mean()

    return ascend(gain, torch.zeros_like(raw[:1]), ball, steps)


@torch.no_grad()
def _success(target: int, raw: Tensor, delta: Tensor, ask: Ask) -> float:
    if not len(raw):
        return 0.0
    hits = sum(int((ask(added(some, delta)).argmax(-1) == target).sum())
               for some in raw.split(BATCH))  # fmt: skip
    return hits / len(raw)


def anomaly_indices(values: Sequence[float], told: float = 0.01) -> list[float | None]:
    """(v - median) / (1.4826 · MAD) of each; a MAD below 0.01, or below the least difference that
    is ``told`` by so many pictures, counts as that. None for fewer than five values."""
    if len(values) < FEWEST:
        return [None] * len(values)
    middle = median(values)
    spread = 1.4826 * max(median([abs(value - middle) for value in values]), told, 0.01)
    return [(value - middle) / spread for value in values]

"""The door: an expert from a suite's base, on disk whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any
from warnings import warn

from fusewright.bench.finetuning.place import (
    CHECKPOINT,
    FACTS,
    NEW,
    claim_of,
    finished,
    publish,
    staging,
)
from fusewright.bench.finetuning.recipe import FULL, HOWS, LINEAR, FineTuning, Ways, recipe_for
from fusewright.errors import FusewrightError, FusewrightWarning

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.finetuning.models import Expert
    from fusewright.bench.suite import Suite
    from fusewright.engine.tables import Table
    from fusewright.tasks.task import Split

_VALIDATION = "validation"


@dataclass(frozen=True)
class FineTuned:
    """An expert and what its training gained.

    ``before``, ``after``: the base and the expert on validation rows, in the unit of ``metric``
    (percent for an accuracy); None where the task has no validation split. For "linear", ``after``
    is the expert as it was trained, and ``as_weights`` the same weights in the ordinary model.
    """

    path: Path
    task: str
    how: str
    metric: str | None
    before: float | None
    after: float | None
    as_weights: float | None
    losses: tuple[float, ...]
    seconds: float
    trained: int

    def table(self) -> Table:
        """The scores, absolute."""
        from fusewright.engine.tables import Table
        from fusewright.tasks.units import unit_of

        rows: list[tuple[Any, ...]] = [("base", self.before, None, None)]
        rows.append((HOWS[self.how], self.after, self.losses[-1], self.trained))
        if self.as_weights is not None:
            rows.append(("its weights in the ordinary model", self.as_weights, None, None))
        metric = f"{self.metric} ({unit_of(self.metric).name})" if self.metric else "score"
        columns = ("", f"{metric}, validation", "last loss", "trained parameters")
        return Table(f"{self.task}: {self.path}", columns, tuple(rows))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "path": str(self.path), "losses": list(self.losses)}


def finetune(
    suite: str | Path | Suite, task: str, *, out: str | Path, how: str = FULL,
    steps: int | None = None, epochs: float | None = None, rate: float | None = None,
    batch: int | None = None, decay: float | None = None, seed: int | None = None,
    rank: int | None = None, alpha: float | None = None, targets: str | None = None,
    dropout: float | None = None, threads: int | None = None, limit: int | None = None,
    pool: str | Path | None = None, data: str | Path | None = None, device: str = "cpu",
    progress: bool = True,
) -> FineTuned:  # fmt: skip
    """Fine-tune a suite's base on one of its tasks, through the task's frozen head.

    ``how``: "full" (all weights), "lora" (2106.09685), "l-lora" (partially linearised LoRA,
    2310.04742: adapters linearised around their start), or "linear" (all weights in the tangent
    space, 2305.12827). ``out`` becomes an ordinary model folder, or a PEFT adapter's, that
    ``fw.merge(base=..., experts=[...])`` takes. Steps, batch, rate and threads that are not given
    are those of the suite's own experts; where it does not say, 2000 steps of 128 at a peak of
    1e-5, or 1e-4 for adapters. All weights of a suite's T5 take ``rate`` relative to each tensor's
    size. A batch holds at most the task's training rows. ``epochs`` in place of ``steps``: times
    that the rows, of running text its windows, are gone over; ``decay`` is 0. ``rank`` is 16 and
    ``alpha`` 32, as in 2310.04742; ``targets`` is a regular expression of modules' whole names
    (all linear ones). Adapters of all tasks start from the same A_0, which follows from the pool's
    seed alone: then merges of L-LoRA experts keep their rank. ``seed``: of order, augmentation and
    dropout (the pool's). ``limit``: validation rows that are asked.
    ``device``: where the model is trained and asked.

    A run that was killed goes on where it was, to the same end; a finished one is answered from
    its folder. An expert of "linear" is stored as plain weights: merged, ask it with
    :func:`fusewright.modules.linearise.linearise`, or it is judged as an ordinary model.

    Raises SuiteError for an unknown task or one without training rows, RecipeError for what cannot
    be trained, DataError for a head of other classes, NumericError for a loss that is no number,
    OutputError for a folder that holds something else or a full disk.
    """
    opened = _opened(suite, pool, data, device)
    recipe, ways = recipe_for(
        opened, task, how, steps=steps, epochs=epochs, rate=rate, batch=batch, seed=seed,
        threads=threads, decay=decay, rank=rank, alpha=alpha, targets=targets, dropout=dropout,
    )  # fmt: skip
    target = Path(out).absolute()
    return make_expert(opened, task, recipe, ways, target, limit=limit, progress=progress)


def make_expert(
    suite: Suite, task: str, recipe: FineTuning, ways: Ways, target: Path, *, limit: int | None,
    progress: bool, more: Mapping[str, Any] | None = None,
) -> FineTuned:  # fmt: skip
    """An expert by a recipe that is at hand, in a folder that appears whole or not at all.

    ``more`` says, as JSON, what it follows from beside the recipe: what ``ways`` were changed to.
    """
    claim = claim_of(suite, task, recipe, limit) | dict(more or {})
    if (kept := finished(target, claim)) is not None:
        return FineTuned(**{**kept, "path": target, "losses": tuple(kept["losses"])})
    with staging(target, claim) as folder:
        found = _Run(suite, task, recipe, ways, limit, progress).into(folder, target, claim)
        publish(folder, target)
    return found


class _Run:
    """A fine-tuning under way."""

    def __init__(
        self, suite: Suite, task: str, recipe: FineTuning, ways: Ways, limit: int | None,
        progress: bool,
    ) -> None:  # fmt: skip
        self.suite, self.task, self.recipe, self.ways = suite, task, recipe, ways
        self.limit, self.progress = limit, progress

    def into(self, folder: Path, target: Path, claim: Mapping[str, Any]) -> FineTuned:
        from fusewright.bench.digits.model import threads
        from fusewright.bench.finetuning.models import expert_of

        began, suite = perf_counter(), self.suite
        _ = suite.tasks[self.task]  # its head and data are refused before a model is opened
        with threads(self.recipe.threads):
            model = self.ways.opens(suite.base)
            metric, before = self._scored(model)
            expert = expert_of(model, self.recipe)
            expert.asked.to(suite.device)
            losses = self._trained(expert, folder / CHECKPOINT)
            _doubt(losses, self.recipe)
            _, after = self._scored(expert.asked)
            linear = self.recipe.how == LINEAR
            as_weights = self._scored(expert.model)[1] if linear else None
        trained = sum(p.numel() for p in expert.asked.parameters() if p.requires_grad)
        found = FineTuned(target, self.task, self.recipe.how, metric, before, after, as_weights,
                          tuple(losses), perf_counter() - began, trained)  # fmt: skip
        expert.asked.cpu()
        self._save(expert, found, folder / NEW, claim)
        return found

    def _scored(self, model: nn.Module) -> tuple[str | None, float | None]:
        if _VALIDATION not in self.suite.spec.tasks[self.task].splits and not self._digits():
            return None, None
        found = self.suite.evaluate(model, self.task, _VALIDATION, self.limit)
        return found.metric, found.shown

    def _digits(self) -> bool:
        from fusewright.bench.suite_tasks import DIGITS

        return self.suite.spec.tasks[self.task].kind == DIGITS

    def _trained(self, expert: Expert, checkpoint: Path) -> list[float]:
        from fusewright.bench.finetuning.descent import Checkpoint, descend
        from fusewright.bench.progress import Stages

        asked = self.suite.tasks[self.task]
        with Stages(self.progress).stage(self.task, self.recipe.steps) as step:
            return descend(
                expert.asked, asked, self._rows(), self.recipe, self.ways.augment,
                Checkpoint(checkpoint), lambda loss: step(f"loss {loss:.3f}"), self.ways.loss,
            )  # fmt: skip

    def _rows(self) -> Split:
        if self.ways.reads is not None:
            return self.ways.reads(self.task)
        return self.suite.ready(self.task, "train", self.recipe.rows)

    def _save(
        self, expert: Expert, found: FineTuned, at: Path, claim: Mapping[str, Any]
    ) -> None:
        from fusewright.bench.finetuning.models import writing
        from fusewright.bench.pools import parts
        from fusewright.bench.pools.making import versions

        with writing(at):
            at.mkdir(exist_ok=True)
        expert.save(at, self.suite.base)
        said = {
            **claim, "linearised": self.recipe.how == LINEAR, "targets": list(expert.targets),
            "base": str(self.suite.base), "versions": versions(), "result": found.plain(),
        }  # fmt: skip
        with writing(at):
            parts.write_json(at / FACTS, said)


def _doubt(losses: Sequence[float], recipe: FineTuning) -> None:
    """A rate may be too high without anything that overflows."""
    tenth = ceil(len(losses) / 10)
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    if last > first:
        warn(f"the loss rose in training, from {first:.3g} to {last:.3g}: a lower rate than "
             f"{recipe.rate:g}, or more steps than {recipe.steps}?", FusewrightWarning,
             stacklevel=4)  # fmt: skip


def _opened(
    suite: str | Path | Suite, pool: str | Path | None, data: str | Path | None, device: str
) -> Suite:
    from fusewright.bench.suite import Suite
    from fusewright.bench.suite import suite as open_suite

    if not isinstance(suite, Suite):
        return open_suite(suite, pool=pool, data=data, device=device)
    if pool is not None or data is not None or device != "cpu":
        raise FusewrightError("an open suite has its pool, data and device",
                              fix="fw.suite(NAME, pool=..., data=..., device=...)")  # fmt: skip
    return suite



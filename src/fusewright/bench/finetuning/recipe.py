"""How one expert is fine-tuned: as the suite's own experts are, unless something is said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.suite_file import SuiteError
from fusewright.errors import RecipeError, nearest

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.joint.recipe import JointRecipe
    from fusewright.bench.joint.train import Augment, Loss
    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Split

FULL, LORA, L_LORA, LINEAR = "full", "lora", "l-lora", "linear"
HOWS = {
    FULL: "all weights",
    LORA: "LoRA (2106.09685)",
    L_LORA: "partially linearised LoRA (2310.04742)",
    LINEAR: "all weights in the tangent space (2305.12827)",
}
ADAPTERS = (LORA, L_LORA)
OF_ADAPTERS = ("rank", "alpha", "targets", "dropout")
"""What is said of adapters alone."""

STEPS, BATCH, RATE = 2000, 128, 1e-5
"""Where a suite says nothing: those of task arithmetic's CLIP experts (2212.04089)."""
ADAPTER_RATE = 1e-4
"""Likewise; adapters, which start from no change at all, take about ten times the rate."""
_POOLS = {name: f"fusewright.bench.pools.{name}" for name in ("vision", "text", "language")}


@dataclass(frozen=True)
class FineTuning:
    """What an expert's training depends on, beside base, data and head.

    ``rate`` is the peak of one cycle of AdamW, where ``relative`` as a share of each tensor's size
    (:func:`fusewright.bench.descent.relative`); ``decay`` is for matrices alone; ``start`` is the
    seed of adapters' first factors, of the suite and not of the task, ``seed`` that of order,
    augmentation and dropout. Of ``betas`` the second counts: the cycle moves the first against the
    rate, from 0.95 to 0.85 and back, as all pools were trained. ``targets``: which modules get an
    adapter, a regular expression of their whole names; None for all linear ones. ``threads`` is
    part of it, because sums depend on their number.
    """

    how: str
    steps: int
    batch: int
    rate: float
    decay: float
    seed: int
    start: int
    threads: int
    rank: int = 16
    alpha: float = 32.0
    targets: str | None = None
    dropout: float = 0.0
    bfloat16: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    relative: bool = False
    rows: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice(self.how)
        least = {"steps": 1, "batch": 1, "rank": 1, "threads": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"{name} is too small", expected=f"at least {low}",
                                  found=getattr(self, name))  # fmt: skip
        for name in ("rate", "alpha"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RecipeError(f"{name} is a positive number", found=getattr(self, name))
        if not 0 <= self.dropout < 1 or not (isfinite(self.decay) and self.decay >= 0):
            raise RecipeError("dropout is in [0, 1) and decay not negative",
                              found=f"dropout {self.dropout}, decay {self.decay}")  # fmt: skip
        if self.targets is not None:
            _check_pattern(self.targets)

    def said(self) -> dict[str, Any]:
        """As JSON; an adapter's settings only for adapters."""
        found = asdict(self)
        left = () if self.how in ADAPTERS else (*OF_ADAPTERS, "start")
        return {name: value for name, value in found.items() if name not in left}


@dataclass(frozen=True)
class Ways:
    """What of a recipe is code: how the base opens, rows are read and batches disturbed, and what
    is minimised where it is not the task's own loss."""

    opens: Callable[[Path], nn.Module]
    reads: Callable[[str], Split] | None = None
    augment: Augment | None = None
    loss: Loss | None = None


def recipe_for(
    suite: Suite, task: str, how: str, *, steps: int | None = None, epochs: float | None = None,
    rate: float | None = None, batch: int | None = None, seed: int | None = None,
    threads: int | None = None, **said: Any,
) -> tuple[FineTuning, Ways]:  # fmt: skip
    """The suite's own recipe for its experts, with what is ``said`` in its place.

    Raises RecipeError for what cannot be, SuiteError for a task that is unknown or has no training
    rows, DataError for a head of other classes.
    """
    _check_choice(how)
    _check_adapters(how, said)
    if steps is not None and epochs is not None:
        raise RecipeError("training is so many steps or so many epochs", found="both",
                          fix="leave one out")  # fmt: skip
    split = suite.split(task, "train")  # refused before anything is trained
    own = _own(suite, task)
    whole, ways = _defaults(suite, how, own)
    _check_judged(suite, task, how)
    items = len(suite.tasks[task].ready(split))  # of running text, its windows
    seen = min(items, whole.rows or items)
    size = min(whole.batch if batch is None else batch, seen)
    if epochs is not None:
        steps = _steps_of(epochs, seen, size)
    found = replace(
        whole, steps=whole.steps if steps is None else steps, batch=size,
        rate=_default_rate(suite, how, own) if rate is None else rate,
        seed=suite.seed if seed is None else seed,
        threads=whole.threads if threads is None else threads,
        **{name: value for name, value in said.items() if value is not None},
    )  # fmt: skip
    return found, ways


def _own(suite: Suite, task: str) -> JointRecipe | None:
    """How the suite's experts are trained, for a joint training of this task alone; None if it
    cannot say."""
    from fusewright.bench.joint.recipe import joint_recipe
    from fusewright.bench.suite import Suite

    # A task without an expert is trained as if it had one, and none has to be there yet.
    spec = suite.spec.model_copy(update={"experts": {task: suite.spec.base}})
    alone = Suite(suite.name, spec, suite.pool, suite.data, suite.seed, called=suite.called)
    try:
        return joint_recipe(alone, [task])
    except SuiteError:
        if suite.spec.build is not None:
            raise
        return None


def _defaults(suite: Suite, how: str, own: JointRecipe | None) -> tuple[FineTuning, Ways]:
    start = suite.seed
    if own is None:
        plain = FineTuning(how, STEPS, BATCH, RATE, 0.0, suite.seed, start, 1)
        return plain, Ways(suite.open)
    # Rounding a forward derivative to 8 bits is not what linearisation is for.
    bfloat16 = own.bfloat16 and how != LINEAR
    found = FineTuning(
        how, own.steps, own.batch, own.rate, 0.0, suite.seed, start, own.threads,
        bfloat16=bfloat16, betas=own.betas, relative=own.relative and how not in ADAPTERS,
        rows=own.rows, facts=own.facts,
    )  # fmt: skip
    return found, Ways(own.opens, own.reads, own.augment)


def _default_rate(suite: Suite, how: str, own: JointRecipe | None) -> float:
    if how not in ADAPTERS:
        return RATE if own is None else own.rate
    builder = suite.spec.build.builder if suite.spec.build is not None else None
    if builder in _POOLS:
        return float(import_module(_POOLS[builder]).read_recipe(suite.spec).lora_rate)
    return ADAPTER_RATE if own is None else 10 * own.rate


def _steps_of(epochs: float, items: int, batch: int) -> int:
    if not (isfinite(epochs) and epochs > 0):
        raise RecipeError("epochs is a positive number", found=epochs)
    return max(1, round(epochs * (items // max(1, batch))))  # a batch of none is refused below


def _check_choice(how: str) -> None:
    if how not in HOWS:
        close = nearest(how, list(HOWS))
        raise RecipeError(f"models are not fine-tuned in a way {how!r}", expected=", ".join(HOWS),
                          fix=f"did you mean {close!r}?" if close else None)  # fmt: skip


def _check_judged(suite: Suite, task: str, how: str) -> None:
    """Refuse the tangent space where texts are written, which a linearised model does not."""
    if how == LINEAR and not suite.tasks[task].has_logits:
        raise RecipeError(
            "a model in the tangent space writes no texts, and this task asks for them",
            where=f"task {task}", expected="a task whose answers are logits",
            found=suite.spec.tasks[task].kind, fix=f"--how {L_LORA}",
        )  # fmt: skip


def _check_adapters(how: str, said: Mapping[str, Any]) -> None:
    """Refuse what is said of adapters where there are none."""
    given = [name for name in OF_ADAPTERS if said.get(name) is not None]
    if given and how not in ADAPTERS:
        names = " and ".join(given)
        raise RecipeError(f"{names}: of adapters alone; all weights are trained here",
                          expected=f"--how {' or '.join(ADAPTERS)} with {names}",
                          found=", ".join(f"{name} {said[name]}" for name in given)
                          + f" with {how}", fix="leave it out, or --how lora")  # fmt: skip


def _check_pattern(targets: str) -> None:
    try:
        re.compile(targets)
    except re.error as error:
        raise RecipeError("targets is no regular expression", where=targets, found=error,
                          fix=r"such as '.*\.(query|value)'") from error  # fmt: skip

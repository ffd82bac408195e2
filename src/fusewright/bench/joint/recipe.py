"""How long, and how, a pool's experts were trained together: what joint training gets too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.suite_file import SuiteError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fusewright.bench.joint.train import Augment
    from fusewright.bench.pools.training import Recipe
    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Batch, Split

NO_FIX = "joint training needs a pool that is built here, so that its steps can be the same"


@dataclass(frozen=True)
class JointRecipe:
    """Joint training as the experts were trained.

    ``steps`` are those of all experts together, ``batch`` and ``rate`` (the peak) those of each;
    ``betas`` AdamW's; ``rows`` the most of each task's training rows, ``reads`` how they are read
    where it is not as evaluation reads them; ``relative``: rates are so to each tensor's size
    (:func:`fusewright.bench.descent.relative`); ``augment`` what is done to a batch, ``facts``
    what that depends on, ``uses`` the code that does it. ``opens`` gives the base as it is
    trained; ``threads`` is part of it, because sums depend on their number.
    """

    steps: int
    batch: int
    rate: float
    threads: int
    opens: Callable[[Path], nn.Module]
    bfloat16: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    relative: bool = False
    rows: int | None = None
    reads: Callable[[str], Split] | None = None
    augment: Augment | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[Callable[..., Any], ...] = ()

    def said(self) -> dict[str, Any]:
        """Everything but the code, as JSON."""
        names = ("steps", "batch", "rate", "betas", "threads", "bfloat16", "rows",
                 "relative")  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "facts": dict(self.facts)}


def joint_recipe(suite: Suite, tasks: Sequence[str]) -> JointRecipe:
    """The recipe of training these tasks of a suite jointly.

    Raises SuiteError if the suite cannot say how its experts were trained, they are adapters, or
    a task has no training rows.
    """
    builder = suite.spec.build.builder if suite.spec.build is not None else None
    if builder is None or builder not in _BUILDERS:
        others = "public checkpoints" if not suite.spec.is_trained else "another suite's models"
        found = f"the builder {builder!r}" if builder else others
        raise SuiteError("the suite does not say how long its experts were trained",
                         expected=f"a pool built by {', '.join(_BUILDERS)}", found=found,
                         fix=NO_FIX)  # fmt: skip
    if any((suite.experts[task] / "adapter_config.json").is_file() for task in tasks):
        raise SuiteError("the experts are adapters, and joint training tunes all weights",
                         where=f"the variant {suite.variant!r}",
                         fix="compare with the joint rows of the plain variant")  # fmt: skip
    return _BUILDERS[builder](suite, tasks)


def _digits(suite: Suite, tasks: Sequence[str]) -> JointRecipe:
    from fusewright.bench.digits.train import Training, disturbed

    training = Training(**_parameters(suite))
    return JointRecipe(
        training.expert_steps * len(tasks), training.batch, training.expert_rate,
        training.threads, suite.open, augment=partial(_disturbed, training),
        facts={"training": asdict(training)}, uses=(disturbed,),
    )  # fmt: skip


def _disturbed(training: Any, batch: Batch, draw: torch.Generator) -> Batch:
    from fusewright.bench.digits.train import disturbed

    return {**batch, "images": disturbed(batch["images"], training, draw)}


def _vision(suite: Suite, tasks: Sequence[str]) -> JointRecipe:
    from fusewright.bench.pools.images import shifted
    from fusewright.bench.pools.vision import open_model, read_recipe

    recipe = read_recipe(suite.spec)
    return replace(
        _classifiers(suite, tasks, recipe, open_model), augment=partial(_shifted, recipe),
        facts={"shift": recipe.shift}, uses=(shifted,),
    )  # fmt: skip


def _text(suite: Suite, tasks: Sequence[str]) -> JointRecipe:
    from fusewright.bench.pools.text import read_recipe

    recipe = read_recipe(suite.spec)
    return replace(_classifiers(suite, tasks, recipe, suite.open), relative=recipe.relative)


def _classifiers(
    suite: Suite, tasks: Sequence[str], recipe: Recipe, opens: Callable[[Path], nn.Module]
) -> JointRecipe:
    counts = [len(suite.split(task, "train")) for task in tasks]
    seen = [min(n, recipe.expert_rows or n) for n in counts]
    return JointRecipe(
        sum(recipe.expert_epochs * (n // min(recipe.batch, n)) for n in seen),
        recipe.batch, recipe.expert_rate, recipe.threads, opens, recipe.bfloat16,
        rows=recipe.expert_rows,
    )  # fmt: skip


def _language(suite: Suite, tasks: Sequence[str]) -> JointRecipe:
    """Batches are crops of the experts' streams, of which each task has one."""
    from fusewright.bench.pools.language import open_model, read_recipe
    from fusewright.bench.pools.language_data import all_crops
    from fusewright.bench.pools.language_training import BETAS

    recipe = read_recipe(suite.spec)
    for task in tasks:
        suite.split(task, "train")  # refused before anything is trained
    return JointRecipe(
        recipe.expert_steps * len(tasks), recipe.batch, recipe.expert_rate, recipe.threads,
        open_model, recipe.bfloat16, BETAS, reads=partial(_crops, suite, recipe.length),
        facts={"length": recipe.length}, uses=(all_crops,),
    )  # fmt: skip


def _crops(suite: Suite, length: int, task: str) -> Split:
    """Every place of a task's training text; kept as a view of its tokens."""
    from fusewright.bench.pools.language import open_tokenizer
    from fusewright.bench.pools.language_data import all_crops, text_of, tokens_of
    from fusewright.tasks.batching import Prepared

    stream = tokens_of(open_tokenizer(suite.base), text_of(suite.split(task, "train")))
    examples: Any = all_crops(stream, length).numpy()
    return Prepared(examples, task, "train")


def _shifted(recipe: Any, batch: Batch, draw: torch.Generator) -> Batch:
    """Moved pictures; what comes in is black, which is not zero after normalisation."""
    from fusewright.bench.pools.images import shifted

    pixels = batch["pixel_values"]
    prepared = recipe.prepared
    black = [-m / s for m, s in zip(prepared.mean, prepared.std, strict=True)]
    floor = pixels.new_tensor(black).view(1, -1, 1, 1)
    return {**batch, "pixel_values": shifted(pixels - floor, recipe.shift, draw) + floor}


def _parameters(suite: Suite) -> dict[str, Any]:
    return dict(suite.spec.build.parameters) if suite.spec.build is not None else {}


_BUILDERS: dict[str, Callable[[Suite, Sequence[str]], JointRecipe]] = {
    "digits": _digits, "vision": _vision, "text": _text, "language": _language,
}  # fmt: skip
"""By the builder of the pool."""

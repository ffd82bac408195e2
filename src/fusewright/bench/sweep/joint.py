"""Joint training as rows of a sweep: trained once for a pool, kept beside the pool's models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.joint.recipe import JointRecipe, joint_recipe
from fusewright.bench.suite_file import SuiteError
from fusewright.bench.sweep.costs import measured
from fusewright.bench.sweep.identity import code_digest, digest
from fusewright.errors import RecipeError, nearest

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Split

TITLES = {
    "sum": "plain sum", "uncertainty": "uncertainty weighting", "dwa": "dynamic weight average",
    "gradnorm": "GradNorm", "pcgrad": "PCGrad", "mgda": "MGDA", "cagrad": "CAGrad",
    "upgrad": "UPGrad",
}  # fmt: skip
"""What joint training is called in tables, by its key among the combinations."""
DEFAULT = ("sum",)
"""The plain sum: it costs what all experts' training did, and every other way as much again."""
_WEIGHTS, _FACTS = "model.safetensors", "training.json"

Trained = tuple["nn.Module", Mapping[str, Any]]
Recipes = Mapping[tuple[int, str | None], JointRecipe]
"""By seed and variant of a suite."""


def chosen(joint: str | Sequence[str]) -> tuple[str, ...]:
    """The ways of joint training that are asked for: names, "all", "none", or names by commas.

    Raises RecipeError for one that is not known.
    """
    names = joint.split(",") if isinstance(joint, str) else list(joint)
    names = [name.strip() for name in names if name.strip()]
    if names == ["all"]:
        return tuple(TITLES)
    if names in ([], ["none"]):
        return ()
    for name in names:
        if name not in TITLES:
            close = nearest(name, [*TITLES, "all", "none"])
            raise RecipeError(f"there is no way {name!r} to train tasks jointly",
                              expected=f"{', '.join(TITLES)}; all; none",
                              fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    return tuple(dict.fromkeys(names))


def recipes(suites: Sequence[Suite], hows: Sequence[str]) -> tuple[Recipes, dict[str, str]]:
    """How each suite is trained jointly, and {row: why it is not}."""
    found: dict[tuple[int, str | None], JointRecipe] = {}
    left_out = {}
    for suite in suites if hows else ():
        try:
            found[suite.seed, suite.variant] = joint_recipe(suite, suite.spec.merged)
        except SuiteError as error:
            of = f", {suite.variant}" if suite.variant else ""
            left_out[f"joint training{of}"] = " ".join(str(error).split())
    return found, left_out


def training_key(suite: Suite, recipe: JointRecipe, how: str, models: Sequence[str]) -> str:
    """A digest of all that a jointly trained model depends on: recipe, seed, tasks with their
    training rows, ``models`` (digests of base, heads and data), code, and the libraries."""
    from fusewright.bench.descent import OneCycle
    from fusewright.bench.joint.train import train_joint

    tasks, words = suite.spec.tasks, {"question", "licence", "note", "splits"}
    return digest({
        "how": how, "recipe": recipe.said(), "seed": suite.seed, "models": list(models),
        "tasks": [[n, tasks[n].model_dump(exclude=words), tasks[n].splits.get("train")]
                  for n in suite.spec.merged],
        "code": code_digest([train_joint, OneCycle, JointRecipe, *recipe.uses]),
        "libraries": [_version(name) for name in ("torch", "torchjd", "transformers")],
    })  # fmt: skip


def trained(suite: Suite, how: str, key: str) -> Trained:
    """The suite's base after joint training, as an open module, and what the training cost.

    It is kept in ``joint/`` of the pool's folder, so that other sweeps of the same pool (another
    limit, corruptions) do not train again; a folder appears there complete or not at all.
    """
    from safetensors.torch import load_model

    folder = suite.root / "joint" / f"{how}-{key}"
    if not folder.is_dir():
        _train_into(folder, suite, how)
    module = suite.open(suite.base)
    load_model(module, folder / _WEIGHTS)
    facts: Mapping[str, Any] = json.loads((folder / _FACTS).read_text("utf-8"))
    return module.eval(), facts


def _train_into(folder: Path, suite: Suite, how: str) -> None:
    import torch
    from safetensors.torch import save_model

    from fusewright.bench.digits.model import threads
    from fusewright.bench.joint.train import train_joint

    names = suite.spec.merged
    recipe = joint_recipe(suite, names)
    splits = {name: _rows(suite, name, recipe) for name in names}
    with threads(recipe.threads), measured() as cost:
        base = recipe.opens(suite.base).to(suite.device)
        model = train_joint(
            base, [suite.tasks[name] for name in names], splits, how=how,
            steps=recipe.steps, batch_size=recipe.batch, lr=recipe.rate, seed=suite.seed,
            autocast=torch.bfloat16 if recipe.bfloat16 else None, augment=recipe.augment,
            betas=recipe.betas, by_size=recipe.relative,
        ).cpu()  # fmt: skip
    partial = folder.with_name(f"{folder.name}.of-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / _WEIGHTS))
    said = {"how": how, "tasks": names, "recipe": recipe.said(), "costs": cost.plain()}
    (partial / _FACTS).write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    _appear(partial, folder)


def _appear(partial: Path, folder: Path) -> None:
    """Two sweeps may have trained the same; the first that ends is kept."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _rows(suite: Suite, task: str, recipe: JointRecipe) -> Split:
    """A task's training rows, decoded once where the task can."""
    if recipe.reads is not None:
        return recipe.reads(task)
    split, prepare = suite.split(task, "train"), getattr(suite.tasks[task], "prepared", None)
    found: Split = prepare(split, recipe.rows) if prepare else split
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

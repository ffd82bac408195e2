"""Programs and folds: methods that search, or take experts one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusewright.engine.front import Merged, run
from fusewright.engine.inputs import open_inputs
from fusewright.engine.options import Options
from fusewright.engine.progress import Listener
from fusewright.engine.recipe import ExpertEntry, Recipe
from fusewright.engine.renames import renames
from fusewright.engine.state import module_of, read_state
from fusewright.errors import PlanError
from fusewright.methods.contract import Context, Fold, Method, Program, Routed
from fusewright.weights.target import check_absent, resolve_target

if TYPE_CHECKING:
    from fusewright.modules.vectors import TaskVectors

Evaluate = Callable[[Any], float]


class Trials(Context):
    """A program's context: merges in memory and scores them, or opens what it learns with.

    Files are open until :meth:`close`.
    """

    def __init__(
        self, recipe: Recipe, options: Options, data: Any, evaluate: Evaluate | None
    ) -> None:
        self.base, self.data, self.seed = recipe.base, data, recipe.seed
        self.experts = {name: entry.model for name, entry in recipe.experts.items()}
        self._recipe, self._options, self._evaluate = recipe, options, evaluate
        self._open = ExitStack()

    def close(self) -> None:
        self._open.close()

    @cached_property
    def _module(self) -> tuple[nn.Module, Mapping[str, str]]:
        opens = getattr(self.data, "open", None)
        if opens is not None:
            module, names = opens()
        else:
            module, names = module_of(self.base), {}
            if isinstance(self.base, str | Path) and hasattr(module, "config"):
                names = renames(module, read_state(Path(self.base)), Path(self.base))
        return module.eval().requires_grad_(False), names

    def module(self) -> nn.Module:
        return self._module[0]

    def stored(self, name: str) -> str:
        return self._module[1].get(name, name)

    @cached_property
    def _vectors(self) -> TaskVectors:
        from fusewright.engine.vectors import task_vectors

        inputs = self._open.enter_context(open_inputs(self._recipe, self._options.untie))
        found = task_vectors(inputs, self._module[1])
        held = 4 * len(found.experts) * sum(t.numel() for t in found.base.values())
        return found.kept() if held <= self._options.memory else found

    def vectors(self) -> TaskVectors:
        return self._vectors

    def merge(self, method: Method, experts: Sequence[str] | None = None) -> Mapping[str, Tensor]:
        return run(with_method(self._recipe, method, experts), None, self._options).state_dict()

    def evaluate(self, weights: Mapping[str, Tensor]) -> float:
        if self._evaluate is None:
            raise PlanError("this method scores its trials, and was given nothing to do so",
                            fix="pass evaluate=function(state_dict) -> score")  # fmt: skip
        return float(self._evaluate(weights))


def with_method(recipe: Recipe, method: Method, experts: Sequence[str] | None) -> Recipe:
    """The recipe with another method, over some of its experts."""
    names = list(recipe.experts) if experts is None else list(experts)
    kept = {n: ExpertEntry(model=recipe.experts[n].model) for n in names}
    return recipe.model_copy(update={"method": method, "parameters": {}, "experts": kept})


def run_program(
    method: Method,
    recipe: Recipe,
    out: str | Path | None,
    options: Options,
    progress: Listener | None,
    data: Any,
    evaluate: Evaluate | None,
) -> Merged:
    """Fit a program and execute what it chose, or take a fold's experts one by one."""
    if out is not None and not options.overwrite:
        check_absent(resolve_target(Path(out)))  # before the long work, and again at its end
    if isinstance(method, Fold):
        return _run_fold(method, recipe, out, options, progress)
    if not recipe.experts:
        raise PlanError("there is nothing to merge", expected="at least one expert", found="none")
    context = Trials(recipe, options, data, evaluate)
    if isinstance(method, Routed):
        from fusewright.engine.routed import upscaled

        with closing(context):
            made = upscaled(method, context)
        return made if out is None else made.save(out, overwrite=options.overwrite)
    assert isinstance(method, Program)
    with closing(context):
        fitted = method.fit(context)
    merged = run(with_method(recipe, fitted.method, fitted.experts), out, options, progress)
    merged.report["fitted"] = {
        **fitted.report, "method": fitted.method.spec(),
        "experts": list(fitted.experts or recipe.experts),
    }  # fmt: skip
    return merged


def _run_fold(
    fold: Fold, recipe: Recipe, out: str | Path | None, options: Options, progress: Listener | None
) -> Merged:
    memory: dict[str, Any] = {}
    current: Any = None
    merged: Merged | None = None
    last = len(recipe.experts) - 1
    beside = None if out is None else Path(out).absolute().parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        for index, entry in enumerate(recipe.experts.values()):
            arrivals = {} if current is None else {"merged": ExpertEntry(model=current)}
            arrivals["newcomer"] = ExpertEntry(model=entry.model)
            step = recipe.model_copy(
                update={"method": fold.arrive(index, memory), "parameters": {}, "experts": arrivals}
            )
            target = out if index == last or out is None else Path(scratch) / str(index)
            quiet = options if index == last else replace(options, overwrite=False)
            merged = run(step, target, quiet, progress)
            memory = fold.remember(memory, merged.report["solved"])
            current = merged.path if merged.path is not None else merged.state_dict()
    assert merged is not None
    return merged

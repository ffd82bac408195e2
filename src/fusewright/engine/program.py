"""Programs and folds: methods that search, or take experts one after another."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusewright.engine.codec import Finite
from fusewright.engine.front import Merged, run, source_of
from fusewright.engine.inputs import Inputs, open_inputs
from fusewright.engine.options import Options
from fusewright.engine.origin import Origin, Source, sources
from fusewright.engine.planner import make_plan, recipe_method
from fusewright.engine.progress import Listener, fit_told
from fusewright.engine.recipe import ExpertEntry, Recipe
from fusewright.engine.renames import renames
from fusewright.engine.runner import bound_digest
from fusewright.engine.state import MergedWeights, module_of, read_state, whole
from fusewright.errors import PlanError
from fusewright.layout import TensorLayout
from fusewright.methods.contract import Context, Fold, Method, Program, Routed
from fusewright.methods.learned.fitter import is_shortage, shortage
from fusewright.methods.learned.processes import Processes
from fusewright.methods.static import Passthrough, Sum
from fusewright.plain import finite
from fusewright.weights.folders import make_folder
from fusewright.weights.target import check_absent, check_output, resolve_target

if TYPE_CHECKING:
    from fusewright.modules.vectors import TaskVectors

Evaluate = Callable[[Any], float]


class Trials(Context):
    """A program's context: merges in memory and scores them, or opens what it learns with.

    Files are open until :meth:`close`. ``fits`` is the folder of checkpoints of fits.
    """

    def __init__(
        self, recipe: Recipe, options: Options, data: Any, evaluate: Evaluate | None,
        progress: Listener | None = None, fits: Path | None = None,
    ) -> None:  # fmt: skip
        self.base, self.data, self.seed = recipe.base, data, recipe.seed
        self.device = torch.device(options.device)
        self.experts = {name: entry.model for name, entry in recipe.experts.items()}
        self.tell = None if progress is None else fit_told(progress)
        self._recipe, self._options, self._evaluate = recipe, options, evaluate
        self._fits, self._open = fits, ExitStack()

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
        return module.to(self.device).eval().requires_grad_(False), names

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the module was opened with, beside its folder."""
        return getattr(self.data, "arguments", {})

    def module(self) -> nn.Module:
        return self._module[0]

    def stored(self, name: str) -> str:
        return self._module[1].get(name, name)

    @cached_property
    def inputs(self) -> Inputs:
        """The recipe's models, open."""
        return self._open.enter_context(open_inputs(self._recipe, self._options.untie))

    def layout(self, name: str) -> TensorLayout:
        return self.inputs.layout[self.stored(name)]

    def checkpoint(self, stage: str, asked: Callable[[], str]) -> Path | None:
        if self._fits is None:
            return None
        facts = json.dumps([stage, asked(), self._digest], sort_keys=True, default=str)
        return self._fits / f"{stage}-{sha256(facts.encode()).hexdigest()[:32]}.pt"

    @cached_property
    def _digest(self) -> list[Any]:
        """What a fit depends on beside its data: the method, and the models' bytes."""
        plain = with_method(self._recipe, Sum(), None)
        plan = make_plan(plain, self._options, self.inputs)
        method = recipe_method(self._recipe).spec()
        return [method, self.seed, bound_digest(plan, self.inputs)]

    @cached_property
    def _vectors(self) -> TaskVectors:
        from fusewright.engine.vectors import task_vectors

        rule = Finite(self._options.allow_nonfinite)
        found = task_vectors(self.inputs, self._module[1], rule).on(self.device)
        held = 4 * len(found.experts) * sum(t.numel() for t in found.base.values())
        return found.kept() if held <= self._options.memory else found

    def vectors(self) -> TaskVectors:
        return self._vectors

    def merge(self, method: Method, experts: Sequence[str] | None = None) -> Mapping[str, Tensor]:
        recipe = with_method(self._recipe, method, experts)
        return run(recipe, None, self._options, data=self.data, fits=self._fits).state_dict()

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
    fits: Path | None = None,
) -> Merged:
    """Fit a program and execute what it chose, build a routed model, or take a fold's experts one
    by one. Fits keep checkpoints in ``fits``, or beside ``out`` until it is complete. Of several
    processes that fit together the first writes."""
    if out is not None:  # before the long work, and again at its end
        check_output(Path(out), 0, overwrite=options.overwrite, inputs=())
        if not options.overwrite:
            check_absent(resolve_target(Path(out)))
    if isinstance(method, Fold):
        return _run_fold(method, recipe, out, options, progress)
    if not recipe.experts:
        raise PlanError("there is nothing to merge", expected="at least one expert", found="none")
    beside = fits if out is None else fits_folder(resolve_target(Path(out)))
    processes = Processes.started()
    if processes.count > 1 and torch.device(options.device).type != "cpu":
        raise PlanError("several processes fit together on the CPU alone", expected="device: cpu",
                        found=options.device, fix=f"one process for {options.device}"
                        )  # fmt: skip
    progress = progress if processes.first else None
    trials = closing(Trials(recipe, options, data, evaluate, progress, beside))
    with (
        _shortages_told(method, beside), trials as context,
        torch.inference_mode(False), torch.enable_grad(),  # whatever the caller has set
    ):  # fmt: skip
        merged = _run_fit(method, recipe, out, options, progress, context, processes.first)
    processes.wait()
    if out is not None and beside is not None and processes.first:
        shutil.rmtree(beside, ignore_errors=True)
    return merged


@contextmanager
def _shortages_told(method: Method, fits: Path | None) -> Iterator[None]:
    """Memory may run out before a fit's first step, in a guard's or a report's, or in what is built
    then; of its steps the fit itself knows more."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        less = [name for name in ("batch", "guard", "inputs") if name in type(method).model_fields]
        fix = f"less of {', '.join(less)}, or more memory" if less else "more memory"
        kept = fits is not None and any(fits.glob("*.pt"))
        again = "; the same command goes on from the last checkpoint" if kept else ""
        raise shortage(error, f"{method.name}, outside the steps of a fit", fix + again) from error


def fits_folder(out: Path) -> Path:
    """Where fits for an output keep their checkpoints, beside it."""
    return out.parent / f".{out.name}.fit"


def _run_fit(
    method: Method,
    recipe: Recipe,
    out: str | Path | None,
    options: Options,
    progress: Listener | None,
    context: Trials,
    writes: bool,
) -> Merged:
    started = perf_counter()
    if isinstance(method, Routed) and method.routes:
        from fusewright.engine.opening import opening
        from fusewright.engine.routed import upscaled

        made = upscaled(method, context, recipe, options)
        made.report["fit_seconds"] = perf_counter() - started
        report = {**finite(made.report["fitted"]), "program": method.spec(),
                  "experts": list(recipe.experts)}  # fmt: skip
        made.origin = Origin(recipe.plain(), method, report, sources(context.inputs))
        made.source = source_of(recipe, context.inputs)
        made.opens = opening(made.routed, context.arguments)
        if out is not None and not writes:
            return Merged(Path(out), made.report, made.plan)
        return made if out is None else made.save(out, **{**vars(options), "device": "cpu"})
    assert isinstance(method, Program)
    fitted = method.fit(context)
    taken = perf_counter() - started
    report = {
        **fitted.report, "program": method.spec(),
        "experts": list(fitted.experts or recipe.experts),
    }  # fmt: skip
    if out is not None and not writes:
        return Merged(Path(out), {"fitted": report}, {})
    models: Mapping[str, Source] = {}
    if fitted.method is not None:
        chosen = with_method(recipe, fitted.method, fitted.experts)
        report["method"] = fitted.method.spec()
    else:
        chosen, models = _given(recipe, fitted.state or {}, context), sources(context.inputs)
    origin = Origin(recipe.plain(), method, report, models)
    merged = run(chosen, out, options, progress, fitted=origin)
    if merged.path is None:
        merged.source = source_of(recipe, context.inputs)
    merged.report |= {"fitted": report, "fit_seconds": taken}
    return merged


def _given(recipe: Recipe, state: Mapping[str, Tensor], context: Trials) -> Recipe:
    """The recipe of a model whose tensors a program made; those it did not make are the base's."""
    inputs = context.inputs
    assert inputs.base is not None
    named = {context.stored(name): tensor.cpu() for name, tensor in state.items()}
    cast = recipe.dtype is None and recipe.out_dtype is None
    tensors: dict[str, Tensor] = {}
    for name, info in inputs.base.items():
        if name in named:
            tensors[name] = named[name].to(info.dtype.torch) if cast else named[name]
        else:
            tensors[name] = whole(inputs.base, name)
    for alias, name in inputs.alignment.aliases.items():
        if alias in tensors:
            tensors[alias] = tensors[name]
    merged = ExpertEntry(model=MergedWeights(tensors, source_of(recipe, inputs)))
    return recipe.model_copy(update={
        "method": Passthrough(), "parameters": {}, "base": None, "experts": {"merged": merged},
    })  # fmt: skip


def _run_fold(
    fold: Fold, recipe: Recipe, out: str | Path | None, options: Options, progress: Listener | None
) -> Merged:
    memory: dict[str, Any] = {}
    current: Any = None
    merged: Merged | None = None
    last = len(recipe.experts) - 1
    beside = None if out is None else Path(out).absolute().parent
    if beside is not None:
        make_folder(beside)
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

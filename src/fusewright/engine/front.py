"""The front doors: merge models on disk or in memory, plan, and open results."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fusewright.devices import checked
from fusewright.engine.inputs import Inputs, open_inputs
from fusewright.engine.options import Options, parse_size
from fusewright.engine.planner import Plan, is_program, make_plan, recipe_method
from fusewright.engine.progress import Listener
from fusewright.engine.recipe import Recipe, make_recipe
from fusewright.errors import NumericError, PlanError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusewright.engine.origin import Origin
    from fusewright.methods.contract import Method


@dataclass(frozen=True)
class Expert:
    """A model with its own values of the method's per-expert parameters::

        fw.Expert("org/code", weight=0.6)
    """

    model: Any
    params: Mapping[str, Any]

    def __init__(self, model: Any, **params: Any) -> None:
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "params", params)


@dataclass
class Merged:
    """A merged model: on disk (``path``) or in memory. ``report`` holds what the run measured."""

    path: Path | None
    report: dict[str, Any]
    plan: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    source: Any = field(default=None, repr=False)
    origin: Origin | None = field(default=None, repr=False)
    """What made a model in memory; its card says so where it is saved."""

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name; read from disk if that is where it is."""
        if self.tensors is not None:
            return dict(self.tensors)
        from fusewright.engine.state import read_state

        assert self.path is not None
        return read_state(self.path)

    def module(self) -> nn.Module:
        """The model as a torch module: a copy of the base given as one, or what transformers
        makes of the folder (of folders merged in memory, by way of a temporary one: only loading
        knows how an architecture renames its tensors)."""
        from torch import nn

        if isinstance(self.source, nn.Module):
            from fusewright.engine.state import fill

            return fill(copy.deepcopy(self.source), self.state_dict())
        if self.path is not None:
            from fusewright.engine.state import load_module

            return load_module(self.path)
        if isinstance(self.source, Path) and (self.source / "config.json").is_file():
            with TemporaryDirectory() as folder:
                return self.save(Path(folder) / "merged").module()
        raise PlanError("only tensors were merged, so there is no module",
                        fix="merge modules or folders, or use .state_dict()")  # fmt: skip

    def save(self, out: str | Path, **options: Any) -> Merged:
        """Write it as a Hugging Face folder, complete or not at all (options as in merge)."""
        from fusewright.engine.state import MergedWeights

        if self.tensors is None:
            raise PlanError("the model is on disk already", where=self.path,
                            fix="copy the folder")  # fmt: skip
        source = MergedWeights(self.tensors, self.source)
        recipe = self.plan["recipe"]
        options.setdefault("out_dtype", recipe.get("out_dtype") or recipe.get("dtype"))
        return write(source, out, self.origin, **options)


def write(source: Any, out: str | Path, origin: Origin | None, **options: Any) -> Merged:
    """Write a model that is made already, with the card and manifest of what made it; ``options``
    as in :func:`merge`."""
    form = {key: options.pop(key) for key in ("dtype", "out_dtype") if key in options}
    recipe = make_recipe(method="passthrough", experts=_entries({"merged": source}), **form)
    progress = options.pop("progress", None)
    return run(recipe, out, make_options(**options), progress, fitted=origin)


def merge(
    method: Method | str | Sequence[Any] | Mapping[str, Any],
    *,
    experts: Mapping[str, Any] | Sequence[Any],
    base: Any = None,
    out: str | Path | None = None,
    params: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    optional: Sequence[str] = (),
    output: str = "model",
    data: Any = None,
    heads: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    progress: Listener | None = None,
    **options: Any,
) -> Merged:
    """Merge models: paths, Hub ids, adapters, modules or state dicts.

    With ``out`` the result is streamed to that folder; without it, it is made in memory. Engine
    options (threads, memory, device, overwrite, shard_size, untie, allow_nonfinite,
    allow_overflow, copy_code, durable, kernels) are those of :class:`Options`. ``data`` and
    ``heads`` (:func:`fusewright.tasks.adaptation.adaptation`) are for methods that learn,
    ``evaluate`` (state dict -> score, larger is better) for those that search. Raises
    FusewrightError.
    """
    recipe = make_recipe(
        method=method, base=base, experts=_entries(experts), parameters=dict(params or {}),
        dtype=dtype, out_dtype=out_dtype, seed=seed, optional=list(optional), output=output,
    )  # fmt: skip
    return run(recipe, out, make_options(**options), progress, data=data, heads=heads,
               evaluate=evaluate)  # fmt: skip


def run(
    recipe: Recipe,
    out: str | Path | None,
    options: Options | None = None,
    progress: Listener | None = None,
    *,
    data: Any = None,
    heads: Mapping[str, Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    fitted: Origin | None = None,
    fits: Path | None = None,
) -> Merged:
    """Carry out a recipe; see :func:`merge`. ``fitted``: what the recipe was made by. ``fits``:
    where a fit without ``out`` keeps checkpoints."""
    options = options or Options()
    checked(options.device)
    method = recipe_method(recipe)
    if is_program(method):
        from fusewright.engine.program import run_program

        if data is None and recipe.data is not None:
            raise PlanError("a recipe's data are opened by the command", where="data",
                            found=f"suite: {recipe.data.suite}",
                            fix="data=fw.suite(...).unlabelled()")  # fmt: skip
        if method.card.data != "none" and data is not None:
            from fusewright.tasks.adaptation import adaptation

            data = adaptation(data, heads)
        return run_program(method, recipe, out, options, progress, data, evaluate, fits)
    if recipe.output == "adapter":
        from fusewright.engine.adapters import merge_adapters

        return merge_adapters(recipe, out, options)
    from fusewright.engine.runner import run_to_folder, run_to_memory

    started = time.perf_counter()
    with open_inputs(recipe, options.untie) as inputs:
        plan_ = make_plan(recipe, options, inputs)
        _warn_of_strangers(plan_, inputs)
        if out is None:
            tensors, report = run_to_memory(plan_, inputs, progress)
            source = source_of(recipe, inputs)
            origin = _origin(recipe, method, fitted, inputs, report)
            return Merged(None, report, plan_.to_json(), tensors, source, origin)
        report = run_to_folder(plan_, inputs, Path(out), progress, started, fitted)
        return Merged(Path(out), report, plan_.to_json())


def _origin(
    recipe: Recipe, method: Method, fitted: Origin | None, inputs: Inputs,
    report: Mapping[str, Any],
) -> Origin:  # fmt: skip
    """What made a result in memory: what was fitted, or the recipe itself."""
    from fusewright.engine.origin import Origin, sources

    made = Origin(recipe.plain(), method) if fitted is None else fitted
    return replace(made, models=made.models or sources(inputs, report["inputs"]))


def plan(
    recipe: Recipe, options: Options | None = None, out: str | Path | None = None
) -> Plan:
    """What a recipe will do, from headers alone, and how long it should take, by a rehearsal of
    single units. With ``out``, what could not be written there is refused."""
    from fusewright.engine.estimate import estimate
    from fusewright.weights.shards import plan_shards
    from fusewright.weights.target import check_output

    options, out = options or Options(), None if out is None else Path(out)
    with open_inputs(recipe, options.untie) as inputs:
        plan_ = make_plan(recipe, options, inputs)
        if out is not None:
            shards = plan_shards(plan_.outputs(), options.shard_size, {"format": "pt"})
            size = sum(shard.size for shard in shards)
            check_output(out, size, overwrite=options.overwrite, inputs=inputs.paths())
        try:
            seconds = estimate(plan_, inputs, out).to_json()
        except NumericError:  # NaN in the inputs is the run's to report, with its place
            return plan_
    return replace(plan_, costs={**plan_.costs, **seconds})


def make_options(**given: Any) -> Options:
    """Options from keywords; sizes may be text ("512MiB")."""
    from fusewright.errors import nearest

    known = list(Options.__dataclass_fields__)
    for key in given:
        if key not in known:
            close = nearest(key, known)
            raise RecipeError(f"there is no option {key!r}", expected=", ".join(known),
                              fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    for key in ("memory", "shard_size"):
        if key in given:
            given[key] = parse_size(given[key])
    return replace(Options(), **given)


def source_of(recipe: Recipe, inputs: Inputs) -> Any:
    """What tells the architecture of a result in memory: the base's module or folder."""
    first = next(iter(recipe.experts.values())).model
    given = recipe.base if recipe.base is not None else first
    root = inputs.reference.root
    return root if root is not None else given


def _entries(experts: Any) -> Any:
    def entry(value: Any) -> Any:
        if isinstance(value, Expert):
            return {"model": value.model, **value.params}
        return {"model": value}

    if isinstance(experts, Mapping):
        return {str(name): entry(value) for name, value in experts.items()}
    if isinstance(experts, Sequence) and not isinstance(experts, str | bytes):
        return [entry(value) for value in experts]
    return experts


def _warn_of_strangers(plan_: Plan, inputs: Inputs) -> None:
    """Warn of experts that the weights' evidence says do not descend from the base."""
    if not plan_.needs_base or inputs.base is None:
        return
    import warnings

    from fusewright.engine.check import descent
    from fusewright.errors import FusewrightWarning

    for name, weights in inputs.experts.items():
        found = descent(inputs.base, weights, _shared_names(inputs, name))
        if found.verdict == "no":
            warnings.warn(
                f"expert {name!r} does not seem to descend from the base: its weights differ by "
                f"{found.relative_norm:.2f} of the base's norm, cosine {found.cosine:.2f}; "
                "`fusewright check` shows more",
                FusewrightWarning, stacklevel=4,
            )  # fmt: skip


def _shared_names(inputs: Inputs, expert: str) -> dict[str, str]:
    names = inputs.alignment.experts[expert].names
    return {n: own for n, own in names.items() if inputs.base is not None and n in inputs.base}

"""What a merge will do, from headers alone: pure, serialisable, and where all refusals happen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch

from fusewright import __version__
from fusewright.engine.inputs import Inputs
from fusewright.engine.jobs import Action, Job, Jobs
from fusewright.engine.options import Options
from fusewright.engine.plan_words import human, parameter_table
from fusewright.engine.recipe import Recipe
from fusewright.engine.tables import Table
from fusewright.errors import PlanError, RecipeError
from fusewright.methods.contract import At, Composite, Fold, Method, Program, Routed, Stage
from fusewright.methods.door import check_counts, counts_base
from fusewright.methods.kernels import Kernel, find_kernel
from fusewright.methods.pipeline import Pipeline, Place, as_pipeline, check_uniform, resolved
from fusewright.methods.registry import parse_method
from fusewright.methods.settings import OTHERS, ByExpert, plain
from fusewright.methods.static import Linear
from fusewright.weights import DType, TensorInfo
from fusewright.weights.locate import ROUTED_STEM


@dataclass(frozen=True)
class Plan:
    """A merge, decided. ``digest`` binds a resumed run to it."""

    recipe: Recipe
    options: Options
    method: Pipeline
    jobs: Mapping[str, Job]
    vectors: tuple[str | None, ...]
    """The models that are merged, in order; None is the base (a merger of two that got one)."""
    keys: tuple[str, ...]
    needs_base: bool
    dtype: torch.dtype
    kernel: Kernel | None
    digest: str
    notes: tuple[str, ...]
    costs: Mapping[str, int] = field(default_factory=dict)

    def pipeline(self, action: Action) -> Pipeline:
        return self.method if action is Action.MERGE else _MEAN

    def outputs(self) -> list[TensorInfo]:
        return [job.info for job in self.jobs.values()]

    def to_json(self) -> dict[str, Any]:
        """Everything that the plan decided, for machines."""
        return {
            "recipe": self.recipe.plain(),
            "method": self.method.spec(),
            "parameters": parameter_table(self),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": self.kernel.name if self.kernel else None,
            "threads": self.options.workers,
            "memory": self.options.memory,
            "costs": dict(self.costs),
            "actions": dict(Counter(str(job.action) for job in self.jobs.values())),
            "digest": self.digest,
            "notes": list(self.notes),
        }

    def tables(self) -> list[Table]:
        """The plan as a person reads it."""
        tasks = Counter((str(j.action), str(j.unit)) for j in self.jobs.values())
        size = Counter[tuple[str, str]]()
        for job in self.jobs.values():
            size[str(job.action), str(job.unit)] += job.info.nbytes
        return [
            Table("Parameters", ("stage", "parameter", "means"),
                  tuple((r["stage"], r["parameter"], r["means"]) for r in parameter_table(self))),
            Table("Tensors", ("action", "unit", "tensors", "output bytes"),
                  tuple((*k, n, human(size[k])) for k, n in tasks.items())),
            Table("Costs", ("what", "amount"),
                  tuple((k.replace("_", " "), human(v) if "bytes" in k or "memory" in k else v)
                        for k, v in self.costs.items())),
            Table("Notes", ("",), tuple((note,) for note in self.notes)),
        ]  # fmt: skip


_MEAN = Pipeline(chain=(Linear(),))


def make_plan(recipe: Recipe, options: Options, inputs: Inputs) -> Plan:
    """Decide everything that headers decide; PlanError and RecipeError say what cannot be."""
    method = recipe_method(recipe)
    if not isinstance(method, Stage | Composite | Pipeline):
        raise PlanError("only what needs no fit or search is planned from headers",
                        where=method.name, found="a method that runs models or builds layers first",
                        fix="merge without a plan (in the command without --plan)")  # fmt: skip
    pipeline = as_pipeline(method)
    vectors = merged_models(pipeline, recipe, inputs)
    dtype = arithmetic(recipe, inputs)
    check_uniform(pipeline, dtype)
    needs_base = pipeline.frame == "deltas"
    kernel = find_kernel(pipeline, dtype) if options.kernels and options.device == "cpu" else None
    jobs = Jobs(pipeline, inputs, recipe, options, vectors, dtype, kernel).all()
    if not jobs:
        raise PlanError("the models hold no tensors", where=inputs.reference.label)
    _check_memory(jobs, options)
    keys = tuple("base" if v is None else v for v in vectors)
    plan = Plan(recipe, options, pipeline, jobs, vectors, keys, needs_base, dtype, kernel,
                "", _notes(inputs, jobs))  # fmt: skip
    _check_parameters(plan)
    costs = _costs(plan)
    return Plan(**{**plan.__dict__, "digest": _digest(plan, inputs), "costs": costs})


def recipe_method(recipe: Recipe) -> Method:
    """The recipe's method with the experts' own parameters put in their place."""
    method = parse_method(recipe.method, dict(recipe.parameters))
    own = {name: entry.params for name, entry in recipe.experts.items()}
    names = {key for params in own.values() for key in params}
    for name in sorted(names):
        values = {e: params[name] for e, params in own.items() if name in params}
        method = _with_expert_values(method, name, values, tuple(recipe.experts))
    _check_expert_names(method, recipe)
    return method


def _with_expert_values(
    method: Method, name: str, values: Mapping[str, Any], experts: tuple[str, ...]
) -> Method:
    if isinstance(method, Pipeline):
        takers = [i for i, s in enumerate(method.chain) if name in s.per_expert_fields()]
        _check_taker(method, name, len(takers), values)
        chain = list(method.chain)
        chain[takers[0]] = _with_expert_values(chain[takers[0]], name, values, experts)
        return Pipeline(chain=tuple(chain))
    _check_taker(method, name, int(name in type(method).per_expert_fields()), values)
    general = plain(getattr(method, name))
    by_expert = isinstance(general, dict) and set(general) != {"layers"}
    default = plain(type(method).model_fields[name].get_default())
    if by_expert:
        default = general.get(OTHERS, default)
    every = {e: values.get(e, general.get(e, default) if by_expert else general) for e in experts}
    fields = {k: plain(getattr(method, k)) for k in type(method).model_fields}
    return type(method)(**{**fields, name: every})


def _check_taker(method: Method, name: str, takers: int, values: Mapping[str, Any]) -> None:
    if takers == 1:
        return
    known = {f for s in _parts(method) for f in s.per_expert_fields()}
    raise RecipeError(
        f"{'several stages take' if takers else 'the method takes no'} {name!r} of each expert",
        where=f"experts.{next(iter(values))}",
        expected=", ".join(sorted(known)) or "no parameters beside the experts",
        fix="write it on its stage" if takers else None,
    )


def _parts(method: Method) -> tuple[Method, ...]:
    return method.chain if isinstance(method, Pipeline) else (method,)


def _check_expert_names(method: Method, recipe: Recipe) -> None:
    for part in _parts(method):
        for field_name in part.per_expert_fields():
            value = getattr(part, field_name)
            named = [n for n, _ in value.values] if isinstance(value, ByExpert) else []
            unknown = [n for n in named if n not in recipe.experts and n != OTHERS]
            if unknown:
                raise RecipeError(
                    f"{part.name}: {field_name!r} names no expert of the recipe",
                    expected=", ".join(recipe.experts), found=", ".join(unknown),
                )  # fmt: skip


def merged_models(pipeline: Pipeline, recipe: Recipe, inputs: Inputs) -> tuple[str | None, ...]:
    """Which models are merged: the experts, and the base where a merger of weights needs one
    model more than it was given."""
    experts = tuple(recipe.experts)
    if inputs.base is not None and counts_base(pipeline, len(experts)):
        return (None, *experts)
    check_counts(pipeline.merger, inputs.base is not None, len(experts))
    return experts


def arithmetic(recipe: Recipe, inputs: Inputs) -> torch.dtype:
    """float32, or float64 where the recipe or any input asks for it."""
    stored = {info.dtype for weights in inputs.all().values() for info in weights.values()}
    wide = DType.F64 in stored or recipe.dtype == "float64"
    return torch.float64 if wide else torch.float32


def _check_memory(jobs: Mapping[str, Job], options: Options) -> None:
    worst = max(jobs.values(), key=lambda j: j.memory, default=None)
    if worst is not None and worst.memory > options.memory:
        needed = -(-worst.memory // 2**20)
        raise PlanError(
            "one unit of work needs more than the memory budget",
            where=f"{worst.info.name} {list(worst.info.shape)}, a whole {worst.unit}",
            expected=f"at most {human(options.memory)}", found=human(worst.memory),
            fix=f"--memory {needed}MiB",
        )  # fmt: skip


def _check_parameters(plan: Plan) -> None:
    """Let every stage refuse what its parameters mean for each tensor."""
    for name, job in plan.jobs.items():
        if job.action is not Action.MERGE:
            continue
        chain = plan.method.chain
        params = tuple(resolved(stage, job.layout, plan.keys) for stage in chain)
        at = At(name, job.info.shape, 0, job.info.numel, plan.keys, job.layout, plan.dtype,
                plan.recipe.seed)  # fmt: skip
        for index, stage in enumerate(chain):
            stage.check(Place(at, params, {}).at(index))


def _notes(inputs: Inputs, jobs: Mapping[str, Job]) -> tuple[str, ...]:
    if getattr(inputs.reference, "stem", None) == ROUTED_STEM:
        return ()  # a routed model is written as it is: rules of one architecture are not its own
    notes = [*inputs.layout.notes, *inputs.alignment.notes]
    notes += [f"{label}: {n}" for label, w in inputs.all().items() for n in w.notes]
    actions = Counter(job.action for job in jobs.values())
    if actions[Action.MEAN]:
        notes.append(f"{actions[Action.MEAN]} running statistics become the experts' mean; "
                     "re-estimate them on data where you can")  # fmt: skip
    if actions[Action.COPY]:
        whose = inputs.reference.label
        notes.append(f"{actions[Action.COPY]} integer or absent tensors are copied from {whose}")
    return tuple(dict.fromkeys(notes))


def _costs(plan: Plan) -> dict[str, int]:
    """What the run moves, if no round is needed that seldom is."""
    steps = [step.round for step in plan.method.steps(plan.dtype)]
    whole = [r for r in steps if r.whole]
    of_model = sum(r.scope == "model" for r in whole)
    jobs = plan.jobs.values()
    merged = [job for job in jobs if job.action is Action.MERGE]
    again = sum(job.nbytes * (of_model if job.kept else len(whole)) for job in merged)
    sampled = sum(job.sampled_bytes(r.every) for job in merged for r in steps if r.every > 1)
    largest = max((job.memory for job in jobs), default=0)
    return {
        "passes": 1 + len(whole),
        "bytes_read": sum(job.nbytes for job in jobs) + again + sampled,
        "bytes_written": sum(job.info.nbytes for job in jobs),
        "tasks": sum(len(job.spans) for job in jobs),
        "memory": min(plan.options.memory, largest * plan.options.workers),
    }


def _digest(plan: Plan, inputs: Inputs) -> str:
    """Over everything that decides the bytes: not threads, memory or folders' names."""
    facts = {
        "version": __version__,
        "method": plan.method.spec(),
        "keys": plan.keys,
        "seed": plan.recipe.seed,
        "dtype": str(plan.dtype),
        "device": plan.options.device,
        "shard_size": plan.options.shard_size,
        "outputs": [(j.info.name, j.info.dtype.code, j.info.shape, j.action)
                    for j in plan.jobs.values()],
        "inputs": {label: [(str(i.path), i.size, i.mtime_ns) for i in w.identities()]
                   for label, w in inputs.all().items()},
        # An adapter's scale lies in its config, which is read when it is opened.
        "adapters": [getattr(getattr(w, "inner", w), "adapter_config", None)
                     for w in inputs.all().values()],
        "rules": (plan.options.allow_nonfinite, plan.options.allow_overflow),
    }  # fmt: skip
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def is_program(method: Method) -> bool:
    """Whether it runs merges of its own instead of being one."""
    return isinstance(method, Program | Fold | Routed)

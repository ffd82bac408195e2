"""What a merge will do, from headers alone: pure, serialisable, and where all refusals happen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from blake3 import blake3

from fusewright import __version__
from fusewright.engine.inputs import Inputs
from fusewright.engine.options import Options
from fusewright.engine.recipe import Recipe
from fusewright.engine.tables import Table
from fusewright.errors import PlanError, RecipeError
from fusewright.layout import Role, TensorLayout
from fusewright.methods.contract import At, Composite, Fold, Method, Program, Stage, Unit
from fusewright.methods.door import check_counts, counts_base, spans
from fusewright.methods.kernels import Kernel, find_kernel
from fusewright.methods.pipeline import Pipeline, Place, as_pipeline, check_uniform, resolved
from fusewright.methods.registry import parse_method
from fusewright.methods.settings import OTHERS, ByExpert, plain
from fusewright.methods.static import Linear
from fusewright.weights import DType, TensorInfo


class Action(StrEnum):
    """What happens to an output tensor."""

    MERGE = "merge"  # by the method
    MEAN = "mean"  # running statistics: the plain mean of the experts
    COPY = "copy"  # integers, booleans, and buffers that some input lacks: from the reference


@dataclass(frozen=True)
class Job:
    """One output tensor: what it becomes, and the units in which."""

    info: TensorInfo
    action: Action
    layout: TensorLayout
    unit: Unit
    spans: tuple[tuple[int, int], ...]
    memory: int
    """Bytes that one unit of it needs."""


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
        raise PlanError(f"{method.name} is a program; it is planned once it has chosen")
    pipeline = as_pipeline(method)
    vectors = merged_models(pipeline, recipe, inputs)
    dtype = arithmetic(recipe, inputs)
    check_uniform(pipeline, dtype)
    needs_base = pipeline.frame == "deltas"
    jobs = {n: _job(n, pipeline, inputs, recipe, vectors, dtype) for n in inputs.alignment.names}
    if not jobs:
        raise PlanError("the models hold no tensors", where=inputs.reference.label)
    _check_memory(jobs, options)
    kernel = find_kernel(pipeline, dtype) if options.kernels and options.device == "cpu" else None
    keys = tuple("base" if v is None else v for v in vectors)
    plan = Plan(recipe, options, pipeline, jobs, vectors, keys, needs_base, dtype, kernel,
                "", _notes(inputs, jobs))  # fmt: skip
    _check_parameters(plan)
    costs = _costs(plan, inputs)
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


def _job(
    name: str,
    pipeline: Pipeline,
    inputs: Inputs,
    recipe: Recipe,
    vectors: tuple[str | None, ...],
    dtype: torch.dtype,
) -> Job:
    stored, action = _reference_info(inputs, name), Action.MERGE
    layout = inputs.layout[name]
    found = {v: inputs.info(v, name) for v in vectors}
    if not stored.dtype.is_float or any(info is None for info in found.values()):
        action = Action.COPY
    elif layout.role is Role.STATISTIC:
        action = Action.MEAN
    for model, info in found.items():
        _check_same(name, stored, info, model, inputs)
    out = stored.dtype if action is Action.COPY else _out_dtype(recipe, stored)
    unit = pipeline.unit(stored.shape, layout) if action is Action.MERGE else Unit.CHUNK
    cuts = tuple(spans(stored.shape, unit))
    largest = max((stop - start for start, stop in cuts), default=0)
    memory = largest * _bytes_an_element(len(vectors), dtype, unit)
    return Job(TensorInfo(name, out, stored.shape), action, layout, unit, cuts, memory)


def _bytes_an_element(vectors: int, dtype: torch.dtype, unit: Unit) -> int:
    # Raw bytes and numbers of every vector and the base, and a few temporaries; decompositions
    # of whole matrices work on float64 copies.
    temporaries = 4 if unit is Unit.CHUNK else 14
    return (vectors + 1) * (4 + dtype.itemsize) + temporaries * dtype.itemsize


def _reference_info(inputs: Inputs, name: str) -> TensorInfo:
    model = None if inputs.base is not None else next(iter(inputs.experts))
    info = inputs.info(model, name)
    if info is None:  # an output that untying adds is found under its tied name everywhere
        info = next(i for e in inputs.experts if (i := inputs.info(e, name)) is not None)
    return TensorInfo(name, info.dtype, info.shape)


def _check_same(
    name: str, stored: TensorInfo, info: TensorInfo | None, model: str | None, inputs: Inputs
) -> None:
    if info is None:
        return
    where = f"{name} in {inputs.weights(model).label}"
    if info.shape != stored.shape:
        vocabulary = inputs.layout[name].vocabulary
        raise PlanError(
            "a tensor has another shape than the base's" if inputs.base is not None
            else "a tensor has another shape than the first expert's",
            where=where, expected=list(stored.shape), found=list(info.shape),
            fix="these vocabularies differ: resize the expert's embeddings to the base's tokenizer"
            if vocabulary else "fusewright check BASE EXPERT shows what differs",
        )  # fmt: skip
    if info.dtype.is_float != stored.dtype.is_float:
        raise PlanError(
            "a tensor is a float in one model and an integer in another",
            where=where, expected=stored.dtype.code, found=info.dtype.code,
        )  # fmt: skip


def _out_dtype(recipe: Recipe, stored: TensorInfo) -> DType:
    wanted = recipe.out_dtype or recipe.dtype
    return stored.dtype if wanted is None else DType.of(wanted)


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


def _costs(plan: Plan, inputs: Inputs) -> dict[str, int]:
    """What the run moves; ``bytes_read`` at most: tensors kept between rounds are read once."""
    steps = plan.method.steps(plan.dtype)
    models: list[str | None] = [*plan.vectors, *([None] if plan.needs_base else [])]
    read = merged = 0
    for name, job in plan.jobs.items():
        once = sum(i.nbytes for m in dict.fromkeys(models) if (i := inputs.info(m, name)))
        merged += once if job.action is not Action.COPY else 0
        read += once
    written = sum(job.info.nbytes for job in plan.jobs.values())
    units = sum(len(job.spans) for job in plan.jobs.values())
    largest = max((job.memory for job in plan.jobs.values()), default=0)
    return {
        "passes": 1 + len(steps),
        "bytes_read": read + merged * len(steps),
        "bytes_written": written,
        "tasks": units,
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
    return blake3(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def parameter_table(plan: Plan) -> list[dict[str, str]]:
    """What every parameter means for these models, a row each."""
    rows = []
    layouts = [job.layout for job in plan.jobs.values() if job.action is Action.MERGE]
    for stage in plan.method.chain:
        values = [vars(resolved(stage, layout, plan.keys)) for layout in layouts[:10_000]]
        for name in type(stage).model_fields:
            seen = dict.fromkeys(json.dumps(v[name], default=str) for v in values)
            means = _meaning(list(seen), plan.keys)
            rows.append({"stage": stage.name, "parameter": name, "means": means})
    return rows


def _meaning(values: list[str], keys: tuple[str, ...]) -> str:
    if not values:
        return "nothing: no tensor is merged"
    if len(values) != 1:
        numbers = [json.loads(v) for v in values]
        if all(isinstance(n, int | float) for n in numbers):
            return f"{min(numbers):g} to {max(numbers):g}, by tensor"
        return f"{len(values)} values, by tensor"
    value = json.loads(values[0])
    if isinstance(value, list) and len(value) == len(keys):
        same = len({json.dumps(v) for v in value}) == 1
        return f"{value[0]}" if same else ", ".join(
            f"{k} {v}" for k, v in zip(keys, value, strict=True))  # fmt: skip
    return str(value)


def human(size: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1000
    raise AssertionError


def is_program(method: Method) -> bool:
    """Whether it runs merges of its own instead of being one."""
    return isinstance(method, Program | Fold)

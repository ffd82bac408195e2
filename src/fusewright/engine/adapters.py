"""LoRA adapters merged into one adapter: ΔW = Σ c_t·s_t·B_t·A_t, as factors side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusewright.engine.artefacts import model_card
from fusewright.engine.codec import Finite, check_input, encode
from fusewright.engine.inputs import Inputs, open_inputs
from fusewright.engine.options import Options
from fusewright.engine.planner import Plan, make_plan
from fusewright.engine.recipe import Recipe
from fusewright.engine.runner import manifest
from fusewright.errors import PlanError
from fusewright.methods.contract import At
from fusewright.methods.pipeline import Place, resolved
from fusewright.weights import DType, LowRank, TensorInfo
from fusewright.weights.adapter import AdapterWeights
from fusewright.weights.adapter_config import parse_config
from fusewright.weights.adapter_parts import sort_parts
from fusewright.weights.digest import block_digests
from fusewright.weights.shards import plan_shards
from fusewright.weights.staging import Staging

if TYPE_CHECKING:
    from fusewright.engine.front import Merged

AS_MODEL = "merge into a whole model instead: output: model"
CONFIG = "adapter_config.json"


def merge_adapters(recipe: Recipe, out: str | Path | None, options: Options) -> Merged:
    """Write a PEFT adapter whose factors multiply to the merged task vector.

    Its rank is the sum of the experts' at each module, its scaling 1, its dtype the factors'
    (float32, or float64), or the recipe's. The dense merge of the same recipe differs from it by
    rounding alone. Raises PlanError where factors cannot say what the merge is: whole tensors or
    biases in an adapter, DoRA, methods that need task vectors dense.
    """
    from fusewright.engine.front import Merged

    if out is None:
        raise PlanError("an adapter is merged to a folder", where="output: adapter",
                        expected="a folder to write", fix="out='merged-adapter'")  # fmt: skip
    with open_inputs(recipe, options.untie) as inputs:
        plan = make_plan(recipe, options, inputs)
        merging = _Merging(plan, inputs, _adapters(inputs))
        tensors = {i.name: i for name in merging.modules for i in merging.infos(name)}
        config = _config(merging, tensors)
        _check_names(tensors, config, merging, out)
        plan = replace(plan, costs={"bytes_written": sum(i.nbytes for i in tensors.values())})
        report = _write(plan, merging, tensors, config, Path(out))
    return Merged(Path(out), report, plan.to_json())


@dataclass
class _Merging:
    """The factors of a plan's tensors, merged one tensor at a time. ``modules`` names the module
    that each changed tensor belongs to."""

    plan: Plan
    inputs: Inputs
    adapters: Mapping[str, AdapterWeights]

    def __post_init__(self) -> None:
        self._check_method()
        self.modules = {name: m for name in self.plan.jobs if (m := self._module(name))}
        if not self.modules:
            raise PlanError("the adapters change nothing", where=", ".join(self.adapters),
                            expected="LoRA factors")  # fmt: skip

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A and B of the module of a tensor, by their names in the output."""
        factors = [self._factors(model, name) for model in self.plan.vectors]
        merged = self._merge(name, factors)
        first = next(a for a in self.adapters.values() if self._touches(a, name))
        return {} if merged is None else first.unfold(name, merged)

    def infos(self, name: str) -> list[TensorInfo]:
        recipe = self.plan.recipe
        wanted = recipe.out_dtype or recipe.dtype
        return [
            TensorInfo(key, DType.of(wanted or x.dtype), tuple(x.shape))
            for key, x in self.tensors(name).items()
        ]

    def _merge(self, name: str, factors: list[LowRank | None]) -> Any:
        plan, job = self.plan, self.plan.jobs[name]
        at = At(name, job.info.shape, 0, job.info.numel, plan.keys, job.layout, plan.dtype,
                plan.recipe.seed)  # fmt: skip
        params = resolved(plan.method.merger, job.layout, plan.keys)
        return plan.method.merger.merge_factors(factors, Place(at, (params,), {}).at(0))

    def _factors(self, model: str | None, name: str) -> LowRank | None:
        if model is None or not self._touches(self.adapters[model], name):
            return None
        found = self.adapters[model].delta(name)
        assert isinstance(found, LowRank)
        rule = Finite(self.plan.options.allow_nonfinite)
        for x in (found.up, found.down):
            check_input(x, f"{self.adapters[model].label}: {name}", rule)
        return found

    def _module(self, name: str) -> str | None:
        found = {a.parts.factors[name].module: key for key, a in self.adapters.items()
                 if self._touches(a, name)}  # fmt: skip
        if len(found) > 1:
            raise PlanError(
                "the adapters change one tensor through different modules",
                where=name, found=", ".join(f"{k}: {m}" for m, k in found.items()), fix=AS_MODEL,
            )  # fmt: skip
        return next(iter(found), None)

    def _touches(self, adapter: AdapterWeights, name: str) -> bool:
        return name in adapter.parts.factors

    def _check_method(self) -> None:
        chain, nothing = self.plan.method.chain, [None for _ in self.plan.vectors]
        dense = len(chain) > 1 or bool(self.plan.method.steps(self.plan.dtype))
        if dense or self._merge(next(iter(self.plan.jobs)), list(nothing)) is NotImplemented:
            raise PlanError(
                "this method needs whole task vectors, so its result is no LoRA adapter",
                where=" >> ".join(stage.name for stage in chain),
                expected="a weighted sum (task_arithmetic, linear, sum, mean)", fix=AS_MODEL,
            )  # fmt: skip


def _adapters(inputs: Inputs) -> dict[str, AdapterWeights]:
    found = {}
    for key, weights in inputs.experts.items():
        where = f"experts.{key}: {weights.label}"
        if not isinstance(weights, AdapterWeights):
            raise PlanError("output: adapter merges LoRA adapters over one base", where=where,
                            expected="an adapter's folder", fix=AS_MODEL)  # fmt: skip
        whole = [*weights.parts.replaced, *weights.parts.biases]
        if weights.lora.dora or whole:
            raise PlanError(
                "the adapter holds more than low-rank factors, which do not add up to an adapter",
                where=where, expected="LoRA factors only",
                found="DoRA magnitudes" if weights.lora.dora
                else f"whole tensors or biases: {', '.join(sorted(whole)[:3])}", fix=AS_MODEL,
            )  # fmt: skip
        found[key] = weights
    return found


def _config(merging: _Merging, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """adapter_config.json: lora_alpha = r everywhere, so that PEFT scales by 1."""
    ranks = dict(sorted(_ranks(tensors, merging.modules.values()),
                        key=lambda pair: -len(pair[0])))  # fmt: skip
    most = max(ranks.values())
    # PEFT takes the first pattern that ends a module's name: the longest names come first.
    pattern = ranks if set(ranks.values()) != {most} else {}
    of_experts = [a.adapter_config for a in merging.adapters.values()]
    kept = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
    return {
        **{key: next((c[key] for c in of_experts if c.get(key)), None) for key in kept},
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in of_experts),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _ranks(tensors: Mapping[str, TensorInfo], modules: Any) -> Iterator[tuple[str, int]]:
    for module in modules:
        for kind in ("lora_A.weight", "lora_embedding_A"):
            info = tensors.get(f"base_model.model.{module}.{kind}")
            if info is not None:
                yield module, info.shape[0]


def _check_names(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], merging: _Merging, out: object
) -> None:
    """Prove that the result's names lead back to the tensors that were merged: experts saved from
    differently wrapped models may name modules in ways that do not go together."""
    base, aliases = merging.inputs.base, merging.inputs.alignment.aliases
    assert base is not None
    found = sort_parts(tensors, base, parse_config(config, out), out).factors
    if {aliases.get(name, name) for name in found} != set(merging.modules):
        raise PlanError("the adapters name the base's modules in different ways", where=out,
                        found=", ".join(sorted(found)[:3]), fix=AS_MODEL)  # fmt: skip


def _write(
    plan: Plan,
    merging: _Merging,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    started, options, inputs = time.perf_counter(), plan.options, merging.inputs
    one_file = sum(info.nbytes for info in tensors.values())  # PEFT reads no shards
    placed = list(tensors.values())
    shards = plan_shards(placed, one_file, {"format": "pt"}, stem="adapter_model")
    report: dict[str, Any] = {
        "inputs": {}, "solved": {}, "disagreeing_buffers": [], "notes": list(plan.notes),
        "tensors": len(tensors), "rank": config["r"], "bytes_written": one_file,
    }  # fmt: skip
    with Staging.open(
        out, plan.digest, shards, overwrite=options.overwrite, inputs=inputs.paths(),
        durable=options.durable,
    ) as staging:  # fmt: skip
        done = staging.finished() if staging.resumed else {}
        for name in merging.modules:
            if name not in done:
                _write_module(staging, merging, name, tensors)
        inputs.check_unchanged()
        staging.add_file(CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        card = model_card(plan, inputs).replace("---\n", "---\nlibrary_name: peft\n", 1)
        staging.add_file("README.md", card.encode())
        staging.publish(manifest(plan, inputs, report))
    return {**report, "seconds": time.perf_counter() - started}


def _write_module(
    staging: Staging, merging: _Merging, name: str, tensors: Mapping[str, TensorInfo]
) -> None:
    options, outputs = merging.plan.options, []
    rule = Finite(options.allow_nonfinite, options.allow_overflow)
    for key, x in merging.tensors(name).items():
        info = tensors[key]
        data = encode(x, info.dtype, key, rule).numpy().data
        staging.write(key, 0, data)
        outputs.append((key, 0, len(data), block_digests(data, info.dtype.itemsize)))
    staging.commit(name, outputs)

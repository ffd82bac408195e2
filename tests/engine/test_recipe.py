"""Recipes: what is read, what is refused, and what experts' values become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import models

import fusewright as fw
from fusewright.engine import load_recipe, make_recipe, recipe_schema
from fusewright.engine.options import Options, parse_size
from fusewright.engine.planner import make_plan, recipe_method
from fusewright.errors import FusewrightError, RecipeError

GOOD = "fusewright: 1\nmethod: ties\nbase: x\nexperts: {a: y}\n"


def recipe(tmp_path: Path, text: str, *sets: str) -> Any:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(path, sets)


def test_yaml_and_python_give_one_recipe(tmp_path: Path) -> None:
    text = GOOD + "parameters: {density: 0.3}\ndtype: bf16\n"
    read = recipe(tmp_path, text)
    made = make_recipe(method="ties", base="x", experts={"a": "y"}, parameters={"density": 0.3},
                       dtype="bfloat16")  # fmt: skip
    assert read == made and read.dtype == "bfloat16"


def test_what_a_recipe_writes_it_reads_again(tmp_path: Path) -> None:
    text = GOOD.replace("a: y", "{a: {model: y, weight: [{filter: mlp, value: 0.8}, 0.5]}}"[1:-1])
    one = recipe(tmp_path, text)
    assert load_recipe(one.plain()) == one


def test_what_was_not_said_is_not_written(tmp_path: Path) -> None:
    assert recipe(tmp_path, GOOD).plain() == {
        "fusewright": 1, "method": "ties", "base": "x", "experts": {"a": {"model": "y"}}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("3", 3), ("2KB", 2000), ("2kB", 2000), ("2KiB", 2048), ("1.5M", 1_500_000), ("64MiB", 2**26),
     ("5GB", 5 * 10**9), ("1GiB", 2**30), ("2TiB", 2**41)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("method: ties", "method: &m ties"), "anchors"),
        (GOOD + "seed: &s 3\n", "anchors"),
        (GOOD.replace("ties", "!!python/name:os.system"), "tags"),
        (GOOD.replace("base: x", "base: !!str x"), "tags"),
        (GOOD + "method: linear\n", "'method' is given twice"),
        (GOOD.replace("{a: y}", "{a: y, a: z}"), "'a' is given twice"),
        (GOOD.replace("fusewright: 1", "fusewright: 2"), "newer schema"),
        (GOOD.replace("method", "mehtod"), "did you mean 'method'"),
        (GOOD + "out_dtpye: float32\n", "did you mean 'out_dtype'"),
        (GOOD + "dtype: float31\n", "float32"),
        (GOOD + "dtype: int8\n", "floating-point"),
        (GOOD + "output: file\n", "adapter"),
        ("- a\n- b\n", "mapping"),
        ("a: [", "not plain YAML"),
        ("", "mapping"),
        ("merge_method: ties\n", "mergekit"),
        (GOOD.replace("{a: y}", "just-one"), "name: path"),
        ("method: ties\n", "'experts' is missing"),
        (GOOD + "seed: much\n", "seed"),
        (GOOD + "parameters: 3\n", "parameters"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, text)
    assert said in str(error.value)


@pytest.mark.parametrize("version", ["'1'", "one", "0", "-1", "true", "1.5", "null"])
def test_a_version_that_is_no_known_number_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(RecipeError):
        recipe(tmp_path, GOOD.replace("fusewright: 1", f"fusewright: {version}"))


def test_the_file_is_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="binary"):
        load_recipe(tmp_path / "binary")


@pytest.mark.parametrize(
    ("sets", "field", "value"),
    [
        (["parameters.density=0.4"], "parameters", {"density": 0.4}),
        (["seed=4"], "seed", 4),
        (["method=linear"], "method", "linear"),
    ],
)
def test_set_overrides(tmp_path: Path, sets: list[str], field: str, value: Any) -> None:
    assert getattr(recipe(tmp_path, GOOD, *sets), field) == value


def test_set_reaches_into_an_expert_written_as_a_path(tmp_path: Path) -> None:
    found = recipe(tmp_path, GOOD, "experts.a.weight=0.5").experts["a"]
    assert (found.model, found.params) == ("y", {"weight": 0.5})


@pytest.mark.parametrize("override", ["density", "=3", "base.x=1", "seed=&a 3"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        recipe(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "tiess"}, "ties"),
        ({"method": {"ties": {"densty": 0.2}}}, "density"),
        ({"method": "ties", "parameters": {"densty": 0.2}}, "density"),
        ({"method": "ties", "parameters": {"density": 0}}, "density"),
        ({"method": "ties", "parameters": {"density": 1.01}}, "density"),
        ({"method": "ties", "parameters": {"density": "much"}}, "density"),
        ({"method": "ties", "parameters": {"density": float("nan")}}, "density"),
        ({"method": "ties", "parameters": {"scale": float("inf")}}, "scale"),
        ({"method": ["drop", "ties", "sum"]}, "ompose"),
        ({"method": ["drop"]}, "merger"),
        ({"method": []}, ""),
        ({"method": {"ties": {}, "linear": {}}}, ""),
        ({"method": 3}, ""),
        ({"method": "slerp", "experts": {"a": {"model": "y", "weight": 1}}}, "weight"),
        ({"method": "ties", "experts": {"a": {"model": "y", "wieght": 1}}}, "weight"),
        ({"method": "ties", "experts": {"a": {"model": "y", "density": 2}}}, "density"),
        ({"method": "ties", "parameters": {"weight": {"c": 1}}}, "no expert"),
    ],
)
def test_a_bad_method_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(FusewrightError) as error:
        recipe_method(make_recipe(**{"base": "x", "experts": {"a": "y"}, **fields}))
    assert said in str(error.value)


def weights_of(plan: Any, tensor: str) -> tuple[float, ...]:
    from fusewright.methods.pipeline import resolved

    return resolved(plan.method.merger, plan.jobs[tensor].layout, plan.keys).weight  # type: ignore[no-any-return]


def test_filters_and_gradients_beside_experts_are_resolved() -> None:
    from fusewright.engine.inputs import open_inputs
    from fusewright.engine.options import Options

    shapes = {f"layers.{i}.{part}.weight": (4, 4) for i in range(3) for part in ("mlp", "attn")}
    origin, experts = models(torch.float32, shapes)
    written = make_recipe(
        method="task_arithmetic", base=origin,
        experts={
            "a": {"model": experts["a"], "weight": [{"filter": "mlp", "value": 0.8}, 0.5]},
            "b": {"model": experts["b"], "weight": {"layers": [0.0, 1.0]}},
        },
    )  # fmt: skip
    with open_inputs(written) as inputs:
        plan = make_plan(written, Options(), inputs)
    assert weights_of(plan, "layers.0.mlp.weight") == (0.8, 0.0)
    assert weights_of(plan, "layers.1.attn.weight") == (0.5, 0.5)
    assert weights_of(plan, "layers.2.attn.weight") == (0.5, 1.0)


def test_a_stage_takes_the_experts_own_values() -> None:
    written = make_recipe(
        method=["drop", "sum"], base="x",
        experts={"a": {"model": "y", "density": 0.5}, "b": {"model": "z", "weight": 2.0}},
    )  # fmt: skip
    drop, added = recipe_method(written).stages()
    assert dict(drop.density.values) == {"a": 0.5, "b": 0.1}
    assert dict(added.weight.values) == {"a": 1.0, "b": 2.0}


def test_a_parameter_that_two_stages_take_is_refused_beside_an_expert() -> None:
    written = make_recipe(method=["drop", "trim", "sum"], base="x",
                          experts={"a": {"model": "y", "density": 0.5}})  # fmt: skip
    with pytest.raises(RecipeError, match="several stages"):
        recipe_method(written)


def test_the_methods_own_values_by_expert_stay() -> None:
    written = make_recipe(method=fw.Linear(weight={"a": 3.0}), experts={
        "a": "x", "b": {"model": "y", "weight": 2.0}, "c": "z"})  # fmt: skip
    assert dict(recipe_method(written).weight.values) == {"a": 3.0, "b": 2.0, "c": 1.0}


def test_two_experts_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="one name"):
        make_recipe(method="linear", experts=["x/m", "y/m"])


def test_the_schema_describes_what_is_read() -> None:
    schema = recipe_schema()
    assert "ties" in schema["$defs"] and "experts" in schema["required"]
    assert "density" in schema["$defs"]["ties"]["properties"]


def test_options_have_edges() -> None:
    assert Options(memory=2**25).memory == 2**25 and Options(threads=1).workers == 1
    with pytest.raises(RecipeError, match="too small"):
        Options(memory=2**25 - 1)
    with pytest.raises(RecipeError, match="at least 1"):
        Options(threads=0)
    assert Options(shard_size=1).shard_size == 1
    with pytest.raises(RecipeError, match="shard"):
        Options(shard_size=0)
    assert (Options().memory, Options().shard_size) == (2**30, 5 * 10**9)

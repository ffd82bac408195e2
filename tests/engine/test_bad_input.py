"""What is refused: each error says where, what was found and what to do, and nothing is left."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import base, entries, expert, models, on_disk, read, saved

import fusewright as fw
from fusewright.engine import load_recipe
from fusewright.engine import run as run_recipe
from fusewright.errors import (
    FusewrightError,
    FusewrightWarning,
    OutputError,
    PlanError,
    RecipeError,
    WeightsError,
)

SHAPES = {"layers.0.mlp.weight": (6, 8), "layers.1.mlp.weight": (6, 8)}


@pytest.fixture
def given(tmp_path: Path) -> Any:
    return on_disk(tmp_path, torch.float32, SHAPES)


def refused(kind: type[FusewrightError], method: Any, given: Any, out: Path, **more: Any) -> Any:
    """The refusal of a merge, which must leave the output's folder as it was."""
    before = entries(out.parent)
    with pytest.raises(kind) as error:
        fw.merge(method, **{**given, "out": out, **more})
    assert entries(out.parent) == before, "something was left"
    return error.value


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("tiess", {}, "did you mean 'ties'"),
        ("ties", {"densty": 0.5}, "did you mean 'density'"),
        ("ties", {"density": 0.0}, "greater than 0"),
        ("ties", {"density": 1.5}, "less than or equal to 1"),
        ("ties", {"density": -0.1}, "greater than 0"),
        ("ties", {"scope": "layer"}, "tensor"),
        ("ties", {"scale": True}, "number"),
        ("ties", {"weight": {"c": 1.0}}, "names no expert"),
    ],
)
def test_bad_parameters(given: Any, tmp_path: Path, method: str, params: Any, said: str) -> None:
    error = refused(RecipeError, method, given, tmp_path / "out", params=params)
    assert said in str(error)


def test_an_unknown_option_has_a_nearest_one(given: Any, tmp_path: Path) -> None:
    assert "threads" in str(refused(RecipeError, "ties", given, tmp_path / "out", thread=2).fix)


@pytest.mark.parametrize(
    "option", [{"threads": 0}, {"memory": "1MiB"}, {"memory": "lots"}, {"shard_size": 0}]
)
def test_options_out_of_range(given: Any, tmp_path: Path, option: Any) -> None:
    refused(RecipeError, "linear", given, tmp_path / "out", **option)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_linear", "iso_c", "metagpt"])
def test_methods_of_task_vectors_need_a_base(given: Any, tmp_path: Path, method: str) -> None:
    error = refused(PlanError, method, {"experts": given["experts"]}, tmp_path / "out")
    assert "needs a base" in str(error) and "base" in str(error.fix)


def test_no_experts(given: Any, tmp_path: Path) -> None:
    for none in ({}, []):
        error = refused(PlanError, "linear", {"experts": none}, tmp_path / "out")
        assert "nothing to merge" in str(error)


def test_three_experts_for_slerp(given: Any, tmp_path: Path) -> None:
    three = {**given["experts"], "c": given["base"]}
    refused(PlanError, "slerp", {"experts": three}, tmp_path / "out")


def test_weights_that_sum_to_zero_are_refused_before_reading(given: Any, tmp_path: Path) -> None:
    method = fw.Linear(weight={"a": 1.0, "b": -1.0})
    recipe = {**given}
    with pytest.raises(PlanError, match="sum to zero"):
        fw.plan(_recipe(method, recipe))
    refused(PlanError, method, given, tmp_path / "out")


def _recipe(method: Any, given: Any) -> Any:
    from fusewright.engine import make_recipe

    return make_recipe(method=method, **given)


def test_a_parameter_by_tensor_where_one_is_found_for_the_model(
    given: Any, tmp_path: Path
) -> None:
    error = refused(PlanError, fw.Ties(density={"layers": [0.1, 0.5]}), given, tmp_path / "out")
    assert "density" in str(error) and "scope: tensor" in str(error.fix)


@pytest.mark.parametrize("which", ["base", "a"])
def test_a_model_that_is_not_there(given: Any, tmp_path: Path, which: str) -> None:
    if which == "base":
        given["base"] = tmp_path / "nowhere"
    else:
        given["experts"]["a"] = tmp_path / "nowhere"
    assert "nowhere" in str(refused(WeightsError, "ties", given, tmp_path / "out"))


def test_another_shape(given: Any, tmp_path: Path) -> None:
    broken = read(given["experts"]["b"])
    broken["layers.1.mlp.weight"] = torch.zeros(6, 9)
    saved(broken, given["experts"]["b"])
    error = refused(PlanError, "ties", given, tmp_path / "out")
    assert error.expected == [6, 8] and error.found == [6, 9]
    assert "layers.1.mlp.weight" in error.where and "/b" in error.where and error.fix


def test_the_same_number_of_elements_in_another_shape(given: Any, tmp_path: Path) -> None:
    broken = read(given["experts"]["b"])
    broken["layers.1.mlp.weight"] = torch.zeros(8, 6)
    saved(broken, given["experts"]["b"])
    refused(PlanError, "ties", given, tmp_path / "out")


def test_a_float_that_is_an_integer_elsewhere(given: Any, tmp_path: Path) -> None:
    broken = read(given["experts"]["b"])
    broken["layers.1.mlp.weight"] = torch.zeros(6, 8, dtype=torch.int32)
    saved(broken, given["experts"]["b"])
    refused(PlanError, "ties", given, tmp_path / "out")


@pytest.mark.parametrize("extra", [True, False])
def test_tensors_that_an_expert_lacks_or_adds(given: Any, tmp_path: Path, extra: bool) -> None:
    broken = read(given["experts"]["b"])
    if extra:
        broken["layers.2.mlp.weight"] = torch.zeros(6, 8)
    else:
        del broken["layers.1.mlp.weight"]
    saved(broken, given["experts"]["b"])
    error = refused(WeightsError, "ties", given, tmp_path / "out")
    assert ("layers.2" if extra else "layers.1") in str(error)


def test_what_is_declared_optional_may_be_absent(given: Any, tmp_path: Path) -> None:
    broken = read(given["experts"]["b"])
    del broken["layers.1.mlp.weight"]
    saved(broken, given["experts"]["b"])
    merged = fw.merge("ties", **given, optional=["layers.1.*"])
    origin = read(given["base"])["layers.1.mlp.weight"]
    assert torch.equal(merged.state_dict()["layers.1.mlp.weight"], origin)
    assert any("copied" in note for note in merged.report["notes"])


def test_an_expert_that_does_not_descend_is_warned_of(given: Any, tmp_path: Path) -> None:
    stranger = {n: torch.randn(s, generator=torch.Generator().manual_seed(99))
                for n, s in SHAPES.items()}  # fmt: skip
    saved(stranger, given["experts"]["b"])
    with pytest.warns(FusewrightWarning, match="'b' does not seem to descend.*cosine"):
        fw.merge("ties", **given)


def test_one_that_does_is_not(given: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fw.merge("ties", **given)


@pytest.mark.parametrize("place", ["base", "a", "base/inside"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_may_not_touch_an_input(
    given: Any, tmp_path: Path, place: str, overwrite: bool
) -> None:
    before = {n: read(tmp_path / n) for n in ("base", "a")}
    refused(OutputError, "ties", given, tmp_path / place, overwrite=overwrite)
    for name, tensors in before.items():
        assert all(torch.equal(t, read(tmp_path / name)[n]) for n, t in tensors.items())


def test_an_output_that_exists_is_kept(given: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    error = refused(OutputError, "ties", given, tmp_path / "out")
    assert "--overwrite" in str(error) and (tmp_path / "out/mine.txt").read_text() == "kept"


def test_a_program_refuses_an_output_that_exists_before_it_works(
    given: Any, tmp_path: Path
) -> None:
    from toy_methods import Search, Stream

    (tmp_path / "out").mkdir()

    def never(state: Any) -> float:
        raise AssertionError("it worked before it refused")

    refused(OutputError, Search(), given, tmp_path / "out", evaluate=never)
    refused(OutputError, Stream(), given, tmp_path / "out", progress=never)


def test_tied_in_one_model_and_untied_in_another() -> None:
    table = torch.randn(10, 4)
    tied = {"embed_tokens.weight": table, "lm_head.weight": table, "w": torch.randn(4, 4)}
    untied = {**expert(tied, 1), "lm_head.weight": torch.randn(10, 4)}
    with pytest.raises(WeightsError, match="tied here and untied there") as error:
        fw.merge("task_arithmetic", base=tied, experts={"a": untied})
    assert "untie" in str(error.value)
    opened = fw.merge("task_arithmetic", base=tied, experts={"a": untied}, untie=True).state_dict()
    assert not torch.equal(opened["embed_tokens.weight"], opened["lm_head.weight"])


def test_a_recipe_file_that_is_refused_leaves_nothing(given: Any, tmp_path: Path) -> None:
    for text in (
        f"fusewright: 9\nmethod: ties\nbase: {given['base']}\nexperts: {{a: {tmp_path}/a}}\n",
        f"method: ties\nbase: {given['base']}\nexperts: {{a: {{model: {tmp_path}/a, wight: 1}}}}\n",
    ):
        (tmp_path / "r.yaml").write_text(text)
        before = entries(tmp_path)
        with pytest.raises(RecipeError):
            run_recipe(load_recipe(tmp_path / "r.yaml"), tmp_path / "out")
        assert entries(tmp_path) == before


def test_an_expert_in_a_list_keeps_its_parameters() -> None:
    origin, experts = models(torch.float32, SHAPES)
    listed = [fw.Expert(experts["a"], weight=0.5), experts["b"]]
    named = {"0": fw.Expert(experts["a"], weight=0.5), "1": experts["b"]}
    one = fw.merge("task_arithmetic", base=origin, experts=listed).state_dict()
    two = fw.merge("task_arithmetic", base=origin, experts=named).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_something_that_is_no_model() -> None:
    for thing in (3, b"x", None, object()):
        with pytest.raises(FusewrightError):
            fw.merge("linear", experts={"a": thing})


def test_an_expert_called_base_is_kept_apart_from_the_base() -> None:
    origin = base(torch.float32, SHAPES)
    a = expert(origin, 1)
    merged = fw.merge(fw.TaskArithmetic(scale=1.0), base=origin, experts={"base": a})
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, a[name])
    inputs = merged.report["inputs"]
    assert set(inputs) == {"base", "expert base"}
    assert inputs["base"]["content"] != inputs["expert base"]["content"]

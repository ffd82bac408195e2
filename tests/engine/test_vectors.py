"""Task vectors of checkpoints: of which tensors, in which precision, under which names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusewright.engine.codec import Finite
from fusewright.engine.inputs import open_inputs
from fusewright.engine.recipe import make_recipe
from fusewright.engine.vectors import task_vectors
from fusewright.errors import NumericError, PlanError
from fusewright.modules.deltas import Dense
from fusewright.modules.vectors import TaskVectors

Tensors = dict[str, torch.Tensor]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype)


def model(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return {"one.weight": draw(3, 4, seed=seed, dtype=dtype),
            "two.weight": draw(4, 2, seed=seed + 50, dtype=dtype),
            "steps": torch.tensor(seed)}  # fmt: skip


def vectors(folder: Path, base: Tensors | None, names=None, **experts: Tensors):
    """What they are of checkpoints, read while these are open."""
    for name, tensors in {"base": base, **experts}.items():
        if tensors is not None:
            save_file(tensors, folder / f"{name}.safetensors")
    recipe = make_recipe(
        method="linear", experts={n: folder / f"{n}.safetensors" for n in experts},
        base=None if base is None else folder / "base.safetensors",
    )  # fmt: skip
    with open_inputs(recipe) as inputs:
        return task_vectors(inputs, names).kept()


@pytest.mark.parametrize(("dtype", "wide"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_differences_are_of_each_expert_in_float32_or_better(tmp_path, dtype, wide) -> None:
    base, a, b = (model(seed, dtype) for seed in range(3))
    found = vectors(tmp_path, base, a=a, b=b)
    assert found.experts == ("a", "b") and set(found.names) == {"one.weight", "two.weight"}
    for name in found.names:
        assert found.base[name].equal(base[name])
        for expert, own in (("a", a), ("b", b)):
            values = found.read(expert, name).dense()
            assert values.dtype == wide
            assert values.equal(own[name].to(wide) - base[name].to(wide))


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adapters_are_as_precise_as_their_base(tmp_path, dtype, factors) -> None:
    down, up = draw(2, 4, seed=7, dtype=factors), draw(3, 2, seed=8, dtype=factors)
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({"base_model.model.one.lora_A.weight": down,
               "base_model.model.one.lora_B.weight": up}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["one"]}
    ))  # fmt: skip
    base, start = model(0, dtype), tmp_path / "base.safetensors"
    save_file(base, start)
    with open_inputs(make_recipe(method="linear", experts={"a": folder}, base=start)) as inputs:
        found = task_vectors(inputs).kept()
    wide = torch.promote_types(torch.float32, dtype)
    changed, alone = (found.read("a", n).dense() for n in ("one.weight", "two.weight"))
    assert changed.dtype == torch.promote_types(wide, factors) and alone.dtype == wide
    assert changed.equal((0.5 * up.to(changed.dtype)) @ down.to(changed.dtype))
    assert alone.equal(torch.zeros(4, 2, dtype=wide))


@pytest.mark.parametrize("of", ["base", "b"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_what_is_not_finite_is_named_unless_it_is_allowed(of, value, tmp_path) -> None:
    given = {"base": model(0), "a": model(1), "b": model(2)}
    given[of]["two.weight"][1, 1] = value
    for name, tensors in given.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    path = {name: tmp_path / f"{name}.safetensors" for name in given}
    recipe = make_recipe(method="linear", base=path.pop("base"), experts=path)
    with open_inputs(recipe) as inputs:
        with pytest.raises(NumericError, match=rf"1 values are NaN[\s\S]*{of}[\s\S]*two\.weight"):
            task_vectors(inputs).kept()
        found = task_vectors(inputs, rule=Finite(allow_nonfinite=True)).kept()
        assert not found.read("b", "two.weight").dense().isfinite().all()


def test_weights_of_any_dtype_give_sums_in_that_of_the_task_vectors() -> None:
    base = {"scalar": torch.tensor(1.0), "vector": torch.ones(3)}
    for dtype in (torch.float32, torch.float64):
        deltas = {n: Dense(t.to(dtype) / 7) for n, t in base.items()}
        tau = TaskVectors(("a", "b"), base, lambda expert, name: deltas[name])  # noqa: B023
        third = torch.full((2,), 1 / 3, dtype=torch.float64)
        for name in base:
            found = tau.combined(name, third)
            assert found.dtype == dtype
            torch.testing.assert_close(found, deltas[name].dense() * 2 / 3, rtol=1e-15 if
                                       dtype == torch.float64 else 1e-7, atol=0)  # fmt: skip
            assert tau.summed([1 / 3, 1 / 3]).read("sum", name).dense().equal(found)


def test_they_go_by_the_modules_names_where_these_are_given(tmp_path) -> None:
    base, a = model(0), model(1)
    found = vectors(tmp_path, base, {"first": "one.weight"}, a=a)
    assert set(found.names) == {"first", "two.weight"}
    assert found.read("a", "first").dense().equal(a["one.weight"] - base["one.weight"])


def test_what_is_no_floating_tensor_of_all_is_left_out(tmp_path) -> None:
    base, a, b = model(0), model(1), model(2)
    b["two.weight"] = b["two.weight"].to(torch.int8)
    assert vectors(tmp_path, base, a=a, b=b).names == ("one.weight",)


def test_nothing_shared_and_no_base_are_said(tmp_path) -> None:
    with pytest.raises(PlanError, match="need the base"):
        vectors(tmp_path, None, a=model(1))
    with pytest.raises(PlanError, match="share no floating-point tensor"):
        vectors(tmp_path, {"steps": torch.tensor(0)}, a={"steps": torch.tensor(1)})


def test_other_shapes_are_refused_by_name(tmp_path) -> None:
    wrong = {**model(1), "two.weight": draw(4, 3, seed=1)}
    with pytest.raises(PlanError, match=r"two\.weight"):
        vectors(tmp_path, model(0), a=model(1), b=wrong)

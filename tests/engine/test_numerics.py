"""The same bytes however the work is cut; dtypes; what may not be finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, base, expert, models, on_disk, read, same

import fusewright as fw
from fusewright.errors import NumericError, PlanError

MIB = 2**20


def merged(method: str, given: Any, **options: Any) -> Any:
    return fw.merge(METHODS[method], **given, **options).state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_budgets_and_kernels_do_not_change_a_bit(method: str, dtype: torch.dtype) -> None:
    origin, experts = models(dtype)
    given = {"base": origin, "experts": experts}
    wanted = merged(method, given, threads=1, memory=1024 * MIB, kernels=False)
    for options in (
        {"threads": 2, "memory": 64 * MIB, "kernels": False},
        {"threads": 3, "memory": 1024 * MIB, "kernels": True},
        {"threads": 1, "memory": 64 * MIB, "kernels": True},
    ):
        assert same(wanted, merged(method, given, **options)), options


def test_the_smallest_budget_gives_the_same_bytes() -> None:
    origin, experts = models()
    given = {"base": origin, "experts": experts}
    small = merged("ties", given, threads=4, memory=32 * MIB)
    assert same(small, merged("ties", given, threads=1, memory=1024 * MIB))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "slerp"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_every_float_dtype_goes_in_and_comes_out(method: str, dtype: torch.dtype) -> None:
    origin, experts = models(dtype, {"w": (40, 50), "v": (3,)})
    one = merged(method, {"base": origin, "experts": experts}, threads=1)
    two = merged(method, {"base": origin, "experts": experts}, threads=2)
    assert all(t.dtype == dtype for t in one.values()) and same(one, two)


@pytest.mark.parametrize(
    "name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_out_dtype_rounds_the_same_sum_once(name: str) -> None:
    origin, experts = models(torch.float32, {"w": (40, 50)})
    wide = fw.merge("linear", experts=experts, base=origin).state_dict()["w"]
    found = fw.merge("linear", experts=experts, base=origin, out_dtype=name).state_dict()["w"]
    assert torch.equal(found.float(), wide.to(getattr(torch, name)).float())


def test_float64_is_computed_in_float64() -> None:
    a, b = {"w": torch.tensor([1.0], dtype=torch.float64)}, {"w": torch.tensor([1e-12]).double()}
    found = fw.merge(fw.Linear(normalize=False), experts={"a": a, "b": b}).state_dict()["w"]
    assert found.item() == 1.0 + b["w"].item()


def test_mixed_dtypes_give_the_bases(tmp_path: Path) -> None:
    origin = base(torch.float32, {"w": (30, 40)})
    half = {"w": expert(origin, 1)["w"].bfloat16()}
    found = fw.merge("task_arithmetic", base=origin, experts={"a": half, "b": expert(origin, 2)})
    assert found.state_dict()["w"].dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernels", [True, False])
def test_nan_in_an_expert_names_file_and_tensor(
    tmp_path: Path, bad: float, kernels: bool
) -> None:
    given = on_disk(tmp_path, shapes={"w": (10, 10), "v": (5,)})
    from small_models import saved

    broken = read(given["experts"]["b"])
    broken["w"][3, 3] = bad
    saved(broken, given["experts"]["b"])
    with pytest.raises(NumericError) as error:
        fw.merge("task_arithmetic", **given, out=tmp_path / "out", kernels=kernels)
    assert "w" in str(error.value.where) and str(tmp_path / "b") in str(error.value.where)
    assert "1 values" in error.value.problem and "--allow-nonfinite" in str(error.value.fix)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16", "float64"])
def test_nonfinite_values_pass_when_allowed(kernels: bool, out: str) -> None:
    a = {"w": torch.tensor([1.0, float("nan"), float("inf"), -2.0])}
    b = {"w": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    found = fw.merge("linear", experts={"a": a, "b": b}, kernels=kernels, allow_nonfinite=True,
                     out_dtype=out).state_dict()["w"]  # fmt: skip
    assert found[0] == 2 and found[1].isnan() and found[2] == float("inf") and found[3] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("float16", 70_000.0), ("float8_e4m3fn", 500.0), ("float8_e5m2", 70_000.0),
     ("bfloat16", 3.4e38)],
)  # fmt: skip
@pytest.mark.parametrize("kernels", [True, False])
def test_overflow_is_counted_before_the_cast(name: str, value: float, kernels: bool) -> None:
    a = {"w": torch.tensor([1.0, value, -value, 2.0])}
    with pytest.raises(NumericError, match="2 merged values overflow") as error:
        fw.merge("linear", experts={"a": a}, out_dtype=name, kernels=kernels)
    assert error.value.where.startswith("w") and error.value.fix
    passed = fw.merge(
        "linear", experts={"a": a}, out_dtype=name, kernels=kernels, allow_overflow=True
    )
    assert passed.state_dict()["w"][0] == 1


@pytest.mark.parametrize("kernels", [True, False])
def test_a_sum_that_overflows_float32_is_refused(kernels: bool) -> None:
    a = {"w": torch.tensor([3e38, 1.0])}
    with pytest.raises(NumericError, match="1 merged values"):
        fw.merge(fw.Linear(normalize=False), experts={"a": a, "b": a}, kernels=kernels)


def test_the_largest_float16_is_no_overflow() -> None:
    a = {"w": torch.tensor([65504.0, 65519.0])}
    found = fw.merge("linear", experts={"a": a}, out_dtype="float16").state_dict()["w"]
    assert found.tolist() == [65504.0, 65504.0]


def test_a_matrix_that_does_not_fit_the_budget_is_refused_before_reading() -> None:
    origin, experts = models(torch.float32, {"layers.0.mlp.weight": (1500, 1000)})
    with pytest.raises(PlanError, match="memory budget") as error:
        fw.merge("iso_c", base=origin, experts=experts, memory=32 * MIB)
    assert "layers.0.mlp.weight [1500, 1000]" in str(error.value.where)
    needed = str(error.value.fix).removeprefix("--memory ")
    assert fw.merge("iso_c", base=origin, experts=experts, memory=needed).tensors


@pytest.mark.parametrize("method", ["slerp", "metagpt", "model_stock"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_statistic_that_is_nan_is_refused(method: str) -> None:
    origin, experts = models(torch.float64, {"layers.0.mlp.weight": (6, 8)})
    huge = [{n: t * 1e200 for n, t in given.items()} for given in (origin, *experts.values())]
    with pytest.raises(NumericError, match=r"is NaN\n *where: +(layers.0|the whole)"):
        fw.merge(METHODS[method], base=huge[0], experts={"a": huge[1], "b": huge[2]})

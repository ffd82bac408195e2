"""Stages compose by kind, partial sums are exact, parameters resolve by filter and layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusewright.methods.static as fw
from fusewright.errors import PlanError, RecipeError
from fusewright.layout.spec import Role, TensorLayout
from fusewright.methods.contract import Unit
from fusewright.methods.door import spans, unit_shape
from fusewright.methods.partials import BLOCK, Partial, block_sums
from fusewright.methods.pipeline import Pipeline, as_pipeline, check_uniform
from fusewright.methods.registry import parse_method
from fusewright.methods.settings import plain, resolve, varies

# -- composition ---------------------------------------------------------------------------------


def test_a_composite_is_its_stages() -> None:
    assert as_pipeline(fw.Ties(density=0.3)).chain == (fw.Trim(density=0.3), fw.Elect())
    joined = fw.Drop(density=0.5) >> fw.Ties() >> fw.LiNeS()
    assert [s.name for s in joined.chain] == ["drop", "trim", "elect", "lines"]


@pytest.mark.parametrize(
    "chain",
    [(fw.Trim(),), (fw.Sum(), fw.Trim()), (fw.Sum(), fw.Elect()), (fw.LiNeS(), fw.Sum()),
     (fw.Trim(), fw.Linear())],
)  # fmt: skip
def test_stages_out_of_order_do_not_compose(chain: tuple[Any, ...]) -> None:
    with pytest.raises(RecipeError):
        Pipeline(chain=chain)


def test_rounds_run_in_the_order_of_the_stages() -> None:
    steps = as_pipeline(fw.Ties()).steps(torch.float32)
    assert [s.index for s in steps] == [0, 0, 0, 0, 1]
    assert [s.round.scope for s in steps] == ["model"] * 5
    assert [s.round.whole for s in steps] == [False, True, False, False, True]


def test_the_widest_unit_wins() -> None:
    place = TensorLayout("w", matrix=True)
    assert (fw.Trim() >> fw.IsoC()).unit((4, 5), place) is Unit.TENSOR
    assert as_pipeline(fw.Ties()).unit((4, 5), place) is Unit.CHUNK


@pytest.mark.parametrize(
    "written", ["drop >> elect", ["drop", "elect"], [{"drop": {}}, {"elect": None}]]
)
def test_pipelines_are_written_in_three_ways(written: Any) -> None:
    assert parse_method(written) == fw.Drop() >> fw.Elect()


@pytest.mark.parametrize(
    ("written", "complaint"),
    [("tys", "did you mean 'ties'"), ({"ties": {"densty": 1}}, "did you mean 'density'"), (3, "3")],
)
def test_what_is_misspelt_is_refused(written: Any, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_method(written)


def test_a_profile_is_a_parameter_of_the_written_form() -> None:
    assert parse_method({"ties": {"profile": "fusionbench"}}) == fw.Ties.profile("fusionbench")


def test_a_model_wide_threshold_refuses_densities_that_vary_over_tensors() -> None:
    varied = {"layers": [0.1, 0.5]}
    with pytest.raises(PlanError, match="density"):
        check_uniform(as_pipeline(fw.Ties(density=varied)), torch.float32)
    check_uniform(as_pipeline(fw.Ties(density=varied, scope="tensor")), torch.float32)
    check_uniform(as_pipeline(fw.Ties(density={"a": 0.1, "b": 0.5})), torch.float32)


# -- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (9, 3 * BLOCK), (300_001,)])
def test_units_cover_every_element_once(shape: tuple[int, ...], unit: Unit) -> None:
    covered = [i for start, stop in spans(shape, unit) for i in (start, stop)]
    numel = math.prod(shape)
    assert covered[:1] == ([0] if numel else []) and covered[1:-1:2] == covered[2::2]
    assert covered[-1:] == ([numel] if numel else [])
    for start, stop in spans(shape, unit):
        assert math.prod(unit_shape(shape, unit, stop - start)) == stop - start


# -- partials ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30, allow_nan=False), min_size=1, max_size=50))
def test_block_sums_are_the_sum(values: list[float]) -> None:
    found = block_sums(torch.tensor(values, dtype=torch.float64))
    scale = sum(map(abs, values))
    assert found.shape == (1,) and abs(float(found) - math.fsum(values)) <= 1e-14 * scale


def test_block_sums_are_one_number_a_block() -> None:
    x = torch.randn(2, 2 * BLOCK + 5)
    found = block_sums(x)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    blocks = [block_sums(part)[:, 0] for part in x.split(BLOCK, dim=1)]
    assert torch.equal(found[:, :2], torch.stack(blocks[:2], dim=1))


def test_partials_add_in_any_order() -> None:
    torch.manual_seed(0)
    parts = [
        Partial({"s": block_sums(torch.randn(3, 100) * 10.0**k)},
                {"n": torch.tensor([k])}, {"p": torch.tensor([float(k)])})
        for k in range(6)
    ]  # fmt: skip

    def total(order: list[Partial]) -> Partial:
        found = order[0]
        for part in order[1:]:
            found = found + part
        return found

    forward, backward = total(parts).rounded(), total(parts[::-1]).rounded()
    assert forward["s"].tolist() == backward["s"].tolist()
    assert forward["n"].tolist() == [15] and forward["p"].tolist() == [5.0]


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "expected"), [(None, 0.2), (0, 0.2), (1, 0.55), (2, 0.9)])
def test_a_gradient_is_linear_in_depth(layer: int | None, expected: float) -> None:
    value = fw.Sum(scale={"layers": [0.2, 0.9]}).scale
    assert resolve(value, TensorLayout("w", layer=layer, depth=3)) == pytest.approx(expected)


def test_the_head_is_at_the_end_of_a_gradient() -> None:
    value = fw.Sum(scale={"layers": [0.2, 0.9]}).scale
    assert resolve(value, TensorLayout("lm_head.weight", role=Role.HEAD)) == 0.9


def test_the_first_filter_in_the_name_decides() -> None:
    value = fw.Sum(scale=[{"filter": "mlp", "value": 0.8}, {"filter": "layers", "value": 0.1}, 0.5])
    names = {"layers.0.mlp.weight": 0.8, "layers.0.attn.weight": 0.1, "embed": 0.5}
    for name, expected in names.items():
        assert resolve(value.scale, TensorLayout(name)) == expected


def test_experts_that_are_not_named_keep_the_default() -> None:
    value = fw.Sum(weight={"math": {"layers": [0, 1]}}).weight
    place = TensorLayout("w", layer=1, depth=3)
    assert resolve(value, place, "math", 1.0) == 0.5
    assert resolve(value, place, "code", 1.0) == 1.0


@pytest.mark.parametrize(
    ("value", "moves"),
    [(0.5, False), ({"layers": [0, 1]}, True), ([{"filter": "mlp", "value": 1}, 0], True),
     ({"a": 0.5}, False), ({"a": {"layers": [0, 1]}}, True)],
)  # fmt: skip
def test_what_varies_over_tensors_is_known(value: Any, moves: bool) -> None:
    weight = fw.Sum(weight=value).weight
    assert varies(weight) is moves
    assert fw.Sum(weight=plain(weight)) == fw.Sum(weight=value)


@pytest.mark.parametrize(
    "bad",
    [{"layers": []}, {"layer": [1]}, [{"filter": "mlp", "value": 1}], [{"filter": "mlp"}, 1], "x"],
)
def test_values_that_are_written_wrongly_are_refused(bad: Any) -> None:
    with pytest.raises(RecipeError, match="scale"):
        fw.Sum(scale=bad)


def test_counts_in_place_grow_where_they_must() -> None:
    small = torch.tensor([2**30, 5], dtype=torch.int32)
    total = Partial(counts={"n": small.clone()})
    total += Partial(counts={"n": torch.tensor([1, 2], dtype=torch.int32)})
    assert total["n"].dtype == "int32" and total["n"].tolist() == [2**30 + 1, 7]
    total += Partial(counts={"n": small})
    assert total["n"].dtype == "int64" and total["n"].tolist() == [2**31 + 1, 12]

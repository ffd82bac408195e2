"""What is tuned, between which bounds, and that a scale needs no new merge."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file

import fusewright as fw
from fusewright.bench.entries import entries
from fusewright.bench.sweep.merges import Merges
from fusewright.bench.sweep.space import current, linear, space, with_values
from fusewright.bench.sweep.tuning import tune
from fusewright.methods.registry import parse_method
from fusewright.methods.settings import Range
from fusewright.weights.files import COUNT

pytest.importorskip("optuna")

METHODS = [entry.method for entry in entries(3)[0]] + [
    parse_method("drop >> elect"), parse_method(["trim", "sum", "lines"]),
]  # fmt: skip


def test_scales_and_densities_are_tuned_and_choices_are_not():
    assert space(fw.Ties()) == {
        "density": Range(0.02, 1.0, log=True), "scale": Range(0.05, 2.0, log=True),
    }  # fmt: skip
    assert list(space(fw.Average())) == []


def test_a_range_of_a_fields_own_stands_before_the_usual_one():
    assert space(fw.IsoC())["scale"] == Range(0.05, 8.0, log=True)
    assert space(fw.Smile()) == {
        "rank": Range(4, 128, log=True, whole=True), "gate": Range(1, 48, log=True, whole=True),
        "rest": Range(0.0, 1.0),
    }  # fmt: skip

    class Narrow(fw.Smile):
        name: ClassVar[str] = "narrow"
        rank: Annotated[int, Range(2, 64)] = Field(8, ge=4, le=16)

    assert space(Narrow())["rank"] == Range(4, 16, whole=True)


def test_whole_numbers_are_drawn_by_factors():
    ranges = {"n": Range(1, 1000, log=True, whole=True)}
    drawn = [t["parameters"]["n"] for t in tune(ranges, {"n": 1}, lambda v: 0.0, 30, 0).trials]
    assert all(isinstance(n, int) and 1 <= n <= 1000 for n in drawn)
    assert sum(n <= 31 for n in drawn) > 10  # evenly drawn numbers: one of thirty


def test_stages_of_a_pipeline_are_told_apart():
    assert list(space(parse_method("drop >> elect"))) == ["drop.density", "elect.scale"]
    twice = parse_method(["trim", {"trim": {"density": 0.5}}, "sum"])
    assert list(space(twice)) == ["trim1.density", "trim2.density", "sum.scale"]
    moved = with_values(twice, {"trim2.density": 0.25})
    assert current(moved) == {"trim1.density": 0.2, "trim2.density": 0.25, "sum.scale": 1.0}


def test_values_that_differ_by_layer_are_the_users():
    assert list(space(fw.Ties(scale={"layers": [0.1, 0.9]}))) == ["density"]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_values_come_back(method):
    middles = {name: (r.low + r.high) / 2 for name, r in space(method).items()}
    values = {n: int(v) if space(method)[n].whole else v for n, v in middles.items()}
    moved = with_values(method, values)
    assert current(moved) == pytest.approx(values)
    assert with_values(moved, current(method)) == method


@pytest.mark.parametrize("method", [m for m in METHODS if linear(m)], ids=repr)
def test_what_is_called_linear_is(method):
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(24, 16, generator=draw, dtype=torch.float64)
    steps = [torch.randn(24, 16, generator=draw, dtype=torch.float64) for _ in range(3)]
    base = {"layers.0.w": start}
    experts = [{"layers.0.w": start + 0.01 * step} for step in steps]
    name = linear(method)

    def moved(scale):
        made = fw.merge(with_values(method, {name: scale}), base=base, experts=experts)
        return made.state_dict()["layers.0.w"] - base["layers.0.w"]

    torch.testing.assert_close(moved(1.5), 3 * moved(0.5), rtol=1e-9, atol=1e-9)


def test_a_finish_that_undoes_the_scale_is_not_linear():
    assert linear(parse_method(["sum", "lines"])) is None
    assert linear(parse_method("drop >> elect")) == "elect.scale"
    assert linear(fw.Slerp()) is None and linear(fw.TaskArithmetic()) == "scale"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def models(tmp_path, request):
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(64, 48, generator=draw)
    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        change = 0.01 * number * torch.randn(64, 48, generator=draw)
        tensors = {"layers.0.w": (base + change).to(request.param), "steps": torch.tensor([3])}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    return Merges(tmp_path / "base", {n: tmp_path / n for n in "ab"})


def test_fifty_scales_read_the_checkpoints_once(models):
    before = COUNT.bytes_read
    models.make(fw.TaskArithmetic(scale=0.3))
    once = COUNT.bytes_read - before
    assert once > 0
    for step in range(50):
        models.make(fw.TaskArithmetic(scale=0.05 * (step + 1)))
    assert COUNT.bytes_read - before == once


def test_the_first_merge_is_what_a_merge_gives(models):
    expected = fw.merge(fw.Ties(), base=models.base, experts=models.experts).state_dict()
    found = models.make(fw.Ties()).state
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_a_rescaled_merge_is_the_merge_up_to_one_rounding(models):
    models.make(fw.TaskArithmetic(scale=0.3))
    other = fw.TaskArithmetic(scale=1.1)
    expected = fw.merge(other, base=models.base, experts=models.experts).state_dict()
    found = models.make(other).state
    ours, theirs = found["layers.0.w"], expected["layers.0.w"]
    unit = torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * unit, atol=1e-6)
    assert torch.equal(found["steps"], expected["steps"])


def test_another_parameter_is_merged_anew(models):
    first = models.make(fw.Ties(density=0.2)).state
    other = models.make(fw.Ties(density=0.9)).state
    expected = fw.merge(fw.Ties(density=0.9), base=models.base, experts=models.experts)
    assert torch.equal(other["layers.0.w"], expected.state_dict()["layers.0.w"])
    assert not torch.equal(first["layers.0.w"], other["layers.0.w"])


RANGES = {"x": Range(0.0, 1.0), "n": Range(1, 5, whole=True)}


def parabola(values):
    return -((values["x"] - 0.7) ** 2) - abs(values["n"] - 3)


def test_the_budget_is_spent_exactly_and_the_defaults_come_first():
    found = tune(RANGES, {"x": 0.1, "n": 1}, parabola, 12, seed=3)
    assert len(found.trials) == 12
    assert found.trials[0]["parameters"] == {"x": 0.1, "n": 1}
    assert found.value == max(t["value"] for t in found.trials) >= parabola({"x": 0.1, "n": 1})
    assert found.value == parabola(found.best)
    for trial in found.trials:
        assert 0 <= trial["parameters"]["x"] <= 1 and trial["parameters"]["n"] in range(1, 6)


def test_trials_follow_from_the_seed():
    one, same, other = (tune(RANGES, {"x": 0.1, "n": 1}, parabola, 6, s).trials for s in (0, 0, 1))
    assert one == same and one != other


def test_of_equal_scores_the_earliest_wins():
    found = tune({"x": Range(0.0, 1.0)}, {"x": 0.25}, lambda values: 1.0, 5, seed=0)
    assert found.best == {"x": 0.25}


def test_defaults_outside_the_range_are_no_trial():
    found = tune({"x": Range(0.0, 1.0)}, {"x": 7.0}, lambda values: values["x"], 4, seed=0)
    assert len(found.trials) == 4 and all(t["parameters"]["x"] <= 1 for t in found.trials)

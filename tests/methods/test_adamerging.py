"""AdaMerging on small modules: what it learns, keeps and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from learned_toys import data, experts, network

import fusewright as fw
from fusewright.errors import PlanError, RecipeError
from fusewright.methods.learned import AdaMerging, Concrete
from fusewright.methods.learned.coefficients import LinearCoefficients
from fusewright.methods.learned.objectives import entropy

QUICK = {"steps": 30, "rate": 0.02, "batch": 16, "every": 10, "guard": 32}


def merged(**params):
    base = network()
    method = AdaMerging(**{**QUICK, **params})
    return fw.merge(method, base=base, experts=experts(base), data=data())


def total_entropy(state) -> float:
    model = network()
    model.load_state_dict(state)
    with torch.no_grad():
        return sum(float(entropy(model(x))) for batches in data().values() for x in batches)


def test_entropy_falls_below_that_of_task_arithmetic() -> None:
    base = network()
    start = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    by_task = total_entropy(merged(granularity="task", guard=0).state_dict())
    by_layer = total_entropy(merged(guard=0).state_dict())
    assert by_layer < by_task < total_entropy(start)


def test_the_merge_is_the_sum_of_what_was_learned() -> None:
    found, base = merged(guard=0), network()
    weights = found.report["fitted"]["method"]["sum"]["weight"]
    for name, tensor in found.state_dict().items():
        expected = base.state_dict()[name].clone()
        for expert, model in experts(base).items():
            weight = next(w["value"] for w in weights[expert][:-1] if w["filter"] == name)
            expected += weight * (model.state_dict()[name] - base.state_dict()[name])
        torch.testing.assert_close(tensor, expected)


def test_no_step_is_task_arithmetic() -> None:
    base = network()
    start = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    for name, tensor in merged(steps=0).state_dict().items():
        torch.testing.assert_close(tensor, start[name])


def test_coefficients_stay_in_their_bounds() -> None:
    def learned(**bounds) -> list[float]:
        weights = merged(rate=0.2, guard=0, **bounds).report["fitted"]["method"]["sum"]["weight"]
        return [rule["value"] for rules in weights.values() for rule in rules[:-1]]

    inside = learned()
    assert min(inside) == 0.0 and max(inside) == 1.0
    free = learned(low=None, high=None)
    assert min(free) < 0 and max(free) > 1


def test_the_same_seed_learns_the_same() -> None:
    one, two = merged().state_dict(), merged().state_dict()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


def test_what_agrees_best_with_the_experts_is_kept() -> None:
    report = merged(rate=0.2, steps=60).report["fitted"]
    steps, shares = zip(*report["agreement"], strict=True)
    assert report["kept"] == steps[shares.index(max(shares))]
    assert steps == (0, 10, 20, 30, 40, 50, 60)


def test_the_callers_models_are_left_alone() -> None:
    base = network()
    before = copy.deepcopy(base.state_dict())
    base.train()
    fw.merge(AdaMerging(**QUICK), base=base, experts=experts(base), data=data())
    assert all(t.equal(before[n]) for n, t in base.state_dict().items())
    assert base.training and all(p.requires_grad for p in base.parameters())


def test_heads_are_functions_or_tensors() -> None:
    base, head = network(), torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    heads = {"a": head, "b": lambda model, batch: model(batch) @ head.T}
    found = fw.merge(AdaMerging(**QUICK), base=base, experts=experts(base), data=data(),
                     heads=heads)  # fmt: skip
    both = fw.merge(AdaMerging(**QUICK), base=base, experts=experts(base), data=data(),
                    heads={"a": head, "b": head})  # fmt: skip
    assert all(t.equal(both.state_dict()[n]) for n, t in found.state_dict().items())


def test_an_expert_without_data_is_named() -> None:
    base = network()
    for given in (None, {"a": data()["a"]}):
        with pytest.raises(PlanError, match=r"data of an expert's task[\s\S]*b"):
            fw.merge(AdaMerging(**QUICK), base=base, experts=experts(base), data=given)


def test_data_that_can_be_gone_over_only_once_are_refused() -> None:
    base = network()
    once = {name: iter(batches) for name, batches in data().items()}
    with pytest.raises(fw.FusewrightError, match="nothing to learn from"):
        fw.merge(AdaMerging(**QUICK), base=base, experts=experts(base), data=once)


def test_a_filter_meets_its_tensor_before_a_part_of_its_name() -> None:
    names = ("w", "a.w", "b.a.w", "b.a")
    learned = LinearCoefficients(names, ("x",), lambda name: name, 0.0)
    with torch.no_grad():
        learned.values.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    rules = learned.written(lambda name: name)["x"][:-1]
    for value, name in enumerate(names, 1):
        assert next(r["value"] for r in rules if r["filter"] in name) == value


@pytest.mark.parametrize("method", [AdaMerging, Concrete])
@pytest.mark.parametrize("bounds", [{"low": 0.5, "high": 0.25}, {"low": 2.0}])
def test_bounds_that_hold_nothing_are_refused(method, bounds) -> None:
    with pytest.raises(RecipeError, match=r"low, high[\s\S]*low ≤ high"):
        method(**bounds)
    assert method(**{**bounds, "high": 3.0}).high == 3.0


def test_losses_below_0_are_not_weighed_by_their_size() -> None:
    how = {"combine": "tchebycheff", "objective": "diverse_entropy"}
    with pytest.raises(RecipeError, match=r"diverse_entropy[\s\S]*combine: sum"):
        AdaMerging(**how, importance={"a": 2.0})
    AdaMerging(**how)

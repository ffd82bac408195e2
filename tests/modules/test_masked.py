"""One vector for several tasks, each through its mask: weights, buffers, and what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.masked import MASKS, TaskMasks, packed

NAMES, KEPT = ("0.weight", "0.bias", "2.weight"), ("1.running_mean", "1.running_var")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    found[2].bias = None
    return found.to(dtype)


class Tied(nn.Module):
    """The second layer's matrix is the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def masks_of(model: nn.Module, names=NAMES, kept=KEPT) -> tuple[TaskMasks, dict]:
    """Masks of two tasks, and θ_t of both, element by element."""
    draw, own = torch.Generator().manual_seed(1), model.state_dict()
    vector = torch.randn(sum(own[n].numel() for n in names), generator=draw)
    bits = {n: torch.rand(2, own[n].numel(), generator=draw) < 0.5 for n in names}
    scales = torch.tensor([0.5, 2.0])
    rest = torch.rand(2, sum(own[n].numel() for n in kept), generator=draw)
    masks = torch.cat([packed(bits[n]) for n in names], dim=1)
    made = TaskMasks(("a", "b"), names, kept, {
        "vector": vector, "masks": masks, "scales": scales, "kept": rest})  # fmt: skip
    expected = {}
    for task in range(2):
        at, found = 0, {}
        for n in names:
            size = own[n].numel()
            change = scales[task] * bits[n][task] * vector[at : at + size]
            found[n] = (own[n].float() + change.view(own[n].shape)).to(own[n].dtype)
            at += size
        at = 0
        for n in kept:
            found[n] = own[n] + rest[task, at : at + own[n].numel()]
            at += own[n].numel()
        expected["ab"[task]] = found
    return made, expected


def told(model: nn.Module, **of) -> tuple[nn.Module, TaskMasks, dict]:
    made, expected = masks_of(model, **of)
    model.add_module(MASKS, made)
    made.listen(model)
    made.listen(model)
    return model, made, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_task_has_its_own_weights_and_statistics_in_any_order(dtype: torch.dtype) -> None:
    model, made, expected = told(network(dtype), kept=() if dtype == torch.bfloat16 else KEPT)
    for task in "abaab":
        model.set_task(task)  # type: ignore[operator]
        own = dict((*model.named_parameters(), *model.named_buffers()))
        for name, tensor in expected[task].items():
            assert own[name].equal(tensor), name
        for other in "ab":  # from the base, whoever is told
            assert all(t.equal(expected[other][n]) for n, t in made.weights(other).items())


def test_state_dicts_hold_the_base_whatever_the_task() -> None:
    base = network().state_dict()
    model, _, _ = told(network())
    outer = nn.ModuleDict({"inner": model})
    for task in (None, "a", "b"):
        if task:
            model.set_task(task)  # type: ignore[operator]
        for state, prefix in ((model.state_dict(), ""), (outer.state_dict(), "inner.")):
            plain = {n: t for n, t in state.items() if MASKS not in n}
            assert set(plain) == {prefix + n for n in base}
            assert all(plain[prefix + n].equal(t) for n, t in base.items())


def test_tied_tensors_change_and_are_stored_under_all_their_names() -> None:
    base = Tied().state_dict()
    model = Tied()
    model.load_state_dict(base)
    _, made, expected = told(model, names=("one.weight", "two.bias"), kept=())
    model.set_task("b")  # type: ignore[operator]
    assert model.two.weight.equal(expected["b"]["one.weight"])
    assert made.weights("a")["two.weight"].equal(expected["a"]["one.weight"])
    state = model.state_dict()
    assert state["one.weight"].equal(base["one.weight"])
    assert state["two.weight"].equal(base["two.weight"])


def test_nothing_runs_before_a_task_is_told() -> None:
    model, _, _ = told(network())
    for part in (model, model[0], model[2]):
        with pytest.raises(PlanError, match="told the task"):
            part(torch.zeros(2, part.in_features if isinstance(part, nn.Linear) else 3))
    with pytest.raises(PlanError, match="does not know this task"):
        model.set_task("c")  # type: ignore[operator]

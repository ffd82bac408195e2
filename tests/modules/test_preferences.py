"""Merges that follow a preference: the routers' formula, and when a merge is made anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.preferences import PREFERENCES, PreferenceRouters, Preferences, on_simplex

EXPERTS = ("a", "b", "c")
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loud(routers: PreferenceRouters) -> PreferenceRouters:
    with torch.no_grad():
        for at, parameter in enumerate(routers.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=at))
    return routers


@DEPTHS
def test_routers_are_their_formula_and_begin_near_their_start(depth: int) -> None:
    new = PreferenceRouters(200, 3, depth, start=0.2, seed=4)
    assert (new.bias == 0.2).all() and float(new.weight.detach().std()) == pytest.approx(
        0.01, rel=0.1
    )
    assert new.weight.equal(PreferenceRouters(200, 3, depth, seed=4).weight)
    assert not new.weight.equal(PreferenceRouters(200, 3, depth, seed=5).weight)
    count = {1: 3 * 3 + 3, 2: 4 * 9 + 3 * 3}[depth]
    assert sum(p.numel() for p in new.parameters()) == 200 * count
    routers, r = loud(PreferenceRouters(2, 3, depth)), torch.tensor([0.5, 0.3, 0.2])
    for at in range(2):
        seen = r
        if depth == 2:
            seen = (routers.inner[at] @ r + routers.inner_bias[at]).clamp(min=0)
            assert 0 < int((seen > 0).sum()) < 6
        torch.testing.assert_close(routers(at, r), routers.weight[at] @ seen + routers.bias[at])


def test_a_preference_is_divided_by_its_sum() -> None:
    found = on_simplex([2, 0, 6], EXPERTS)
    assert found.tolist() == [0.25, 0, 0.75] and found.dtype == torch.float32
    for wrong in ([1, 1], [0, 0, 0], [1, -1, 1], [1, float("inf"), 0], [float("nan"), 1, 1]):
        with pytest.raises(PlanError, match="how much each task counts"):
            on_simplex(wrong, EXPERTS)


def built(dtype: torch.dtype = torch.float32, tied: bool = False) -> tuple[nn.Module, Preferences]:
    """A model of two layers; each is a module of its own to the routers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    if tied:
        model[1].weight = model[0].weight
    own = dict(model.named_parameters())
    tensors = {n: (at, own[n].detach().clone(), draw(3, 4, 4, seed=at))
               for at, n in enumerate(("0.weight", "1.weight")) if n in own}  # fmt: skip
    routers = loud(PreferenceRouters(2, 3, 2))
    made = Preferences(EXPERTS, routers, tensors, torch.tensor([0.5, 0.25, 0.25]))
    model.add_module(PREFERENCES, made)
    made.listen(model)
    return model, made


def by_hand(made: Preferences, at: int, r: list[float]) -> torch.Tensor:
    held = made.held[at]
    w = made.routers(at, torch.tensor(r)).detach()
    total = held.base.float() + torch.einsum("t,tij->ij", w, held.deltas)
    return total.to(held.base.dtype)


def own_weights(model: nn.Module) -> list[torch.Tensor]:
    return [model[0].weight.detach(), model[1].weight.detach()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_module_has_its_own_merge_of_the_preference(dtype: torch.dtype) -> None:
    model, made = built(dtype)
    for r in ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]):
        model.set_preference(r)  # type: ignore[operator]
        for at, weight in enumerate(own_weights(model)):
            torch.testing.assert_close(weight, by_hand(made, at, r), rtol=1e-5, atol=1e-5)
            assert weight.dtype == dtype


def test_a_forward_merges_anew_whatever_was_written_and_only_then() -> None:
    model, made = built()
    x, merges, merged = torch.ones(1, 4), [], made.merged
    made.merged = lambda: merges.append(1) or merged()  # type: ignore
    model(x)
    assert not merges
    with torch.no_grad():
        for change in (made.routers.bias, made.held[0].base, made.held[1].deltas):
            change.add_(0.5)
            model(x)
            for at, weight in enumerate(own_weights(model)):
                torch.testing.assert_close(weight, by_hand(made, at, [0.5, 0.25, 0.25]))
        made.preference.copy_(torch.tensor([0.0, 0.0, 1.0]))
        model(x)
        torch.testing.assert_close(own_weights(model)[0], by_hand(made, 0, [0.0, 0.0, 1.0]))
        made.routers.bias.data = made.routers.bias.data + 1
        model(x)
        torch.testing.assert_close(own_weights(model)[1], by_hand(made, 1, [0.0, 0.0, 1.0]))
    assert len(merges) == 5


def test_loaded_tensors_are_merged_at_once() -> None:
    model, _ = built()
    other, made = built()
    with torch.no_grad():
        made.routers.bias.add_(1)
    other.set_preference([0, 0, 1])  # type: ignore[operator]
    routed = {n: t for n, t in other.state_dict().items() if n.startswith(PREFERENCES)}
    assert not model.load_state_dict(routed, strict=False).unexpected_keys
    for one, two in zip(own_weights(model), own_weights(other), strict=True):
        torch.testing.assert_close(one, two)


def test_what_it_makes_anew_is_named_under_all_names() -> None:
    model, made = built(tied=True)
    assert set(made.remade(model)) == {"0.weight", "1.weight"}
    assert made.active == 16 and made(draw(2)).equal(draw(2))

"""Rank-one MoE on tiny models of every kind: one method object, unchanged."""

from __future__ import annotations

import pytest
import torch
from routed_toys import (
    INPUTS,
    MODELS,
    answer,
    base_of,
    built,
    experts_of,
    gpt2,
    images,
    loud,
    said,
    sides,
    vit,
)
from torch import nn

import fusewright as fw
from fusewright.methods.routed import RankOneMoE
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.routers import Router
from fusewright.modules.stacks import FactorStack

UNTRAINED = RankOneMoE(steps=0, rank=3)
SELECTED = RankOneMoE(steps=0, rank=3, top=2)


def mixed(model: nn.Module) -> dict[str, MixedLinear]:
    return {p: layer for p, layer in model.named_modules() if isinstance(layer, MixedLinear)}


def silent(made):
    """Routers that do not see their inputs."""
    with torch.no_grad():
        for name, parameter in made.module().get_submodule("routing").named_parameters():
            if name.endswith("weight"):
                parameter.zero_()
    return made


@MODELS
def test_with_all_directions_it_begins_as_task_arithmetic(make) -> None:
    base = base_of(make)
    plain = fw.merge(fw.TaskArithmetic(scale=0.3), base=base, experts=experts_of(base)).module()
    made = silent(built(RankOneMoE(steps=0, rank=64), make))
    torch.testing.assert_close(answer(made.module(), make), answer(plain, make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (answer(plain, make) - answer(base, make)).abs().max() > 1e-3
    assert all("att" not in path.lower() for path in mixed(made.module()))


@MODELS
def test_an_input_is_answered_alike_in_any_batch(make) -> None:
    model = loud(built(SELECTED, make).module())
    whole = answer(model, make)
    for row in range(3):
        alone = answer(model, make, **{k: v[row : row + 1] for k, v in INPUTS[make].items()})
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_each_direction_has_its_own_weight() -> None:
    """W_0 + Σ s_i σ_i u_i v_iᵀ by hand, of a Conv1D, for two samples at once."""
    model, base = loud(built(UNTRAINED, gpt2).module()), base_of(gpt2)
    path = "transformer.h.1.mlp.c_fc"
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    s = torch.rand(2, 6, generator=torch.Generator().manual_seed(2))
    layer = mixed(model)[path]
    layer.mixture.weights = s
    start = base.get_submodule(path)
    bias = start.bias + sum(0.3 * (e.get_submodule(path).bias - start.bias)
                            for e in experts_of(base).values())  # fmt: skip
    for row in range(2):
        weight = start.weight.T.detach().clone()
        for t, expert in enumerate(experts_of(base).values()):
            tau = (expert.get_submodule(path).weight - start.weight).T
            u, sigma, vt = torch.linalg.svd(tau, full_matrices=False)
            weight += (u[:, :3] * sigma[:3] * s[row, 3 * t : 3 * t + 3]) @ vt[:3]
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[row], x[row] @ weight.T + bias,
                                       rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("top", [None, 2])
def test_it_unloads_into_a_plain_model(top: int | None) -> None:
    fixed = built(RankOneMoE(steps=0, rank=3, router=0, top=top), vit)
    with torch.no_grad():
        for parameter in fixed.module().get_submodule("routing").parameters():
            parameter.copy_(torch.linspace(0.1, 0.5, 6))
    made = built(RankOneMoE(steps=0, rank=3, per="batch", top=top), vit)
    loud(made.module())
    for one, given in ((fixed, None), (made, INPUTS[vit])):
        plain = base_of(vit)
        plain.load_state_dict(one.unload(given).state_dict())
        torch.testing.assert_close(answer(plain, vit), answer(one.module(), vit),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_what_is_stored_and_trained() -> None:
    sizes = built(UNTRAINED, vit).report["parameters"]
    assert sizes["trained"] == 2 * (16 * 6 + 6)
    pool = 2 * 2 * 6 * (16 + 32)  # blocks, maps, directions
    assert sizes["stored"] == sizes["base"] + sizes["trained"] + pool


def test_a_soft_threshold_keeps_the_largest() -> None:
    router = Router(4, 5, 0, top=2)
    weights = torch.tensor([[0.1, 0.5, 0.9, -0.3, 0.4], [1.0, 0.2, 0.3, 0.8, 0.0]])
    found = router.chosen(weights)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.25, 0.9, 0.0, 0.0]), atol=1e-4,
                               rtol=0)  # fmt: skip
    torch.testing.assert_close(found[1], torch.tensor([1.0, 0.0, 0.0, 0.4, 0.0]), atol=1e-4,
                               rtol=0)  # fmt: skip
    for top in (0, 5, 9):
        assert Router(4, 5, 0, top=top).chosen(weights).equal(weights)
    assert Router.restored(router.described()).top == 2


def test_one_w_of_factors_is_merged_without_making_each_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    stack = FactorStack(torch.randn(5, 7, 2, generator=draw), torch.randn(5, 2, 3, generator=draw))
    base, w = torch.randn(7, 3, generator=draw), torch.randn(5, generator=draw)
    whole = base + torch.einsum("t,tok,tki->oi", w, stack.up, stack.down)
    torch.testing.assert_close(stack.combined(base, w), whole)


QUICK = {"steps": 30, "rate": 3e-3, "batch": 6, "every": 10, "rank": 3}


@pytest.mark.parametrize("top", [None, 4])
def test_routers_alone_learn_and_entropy_falls(top: int | None) -> None:
    made = built(RankOneMoE(**QUICK, top=top, guard=0), vit, data=images())
    losses = made.report["fitted"]["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])
    start = built(RankOneMoE(steps=0, rank=3, top=top), vit).module().state_dict()
    changed = {n for n, t in made.module().state_dict().items() if not t.equal(start[n])}
    assert changed and all(name.startswith("routing.") for name in changed)
    again = built(RankOneMoE(**QUICK, top=top, guard=0), vit, data=images()).state_dict()
    assert all(tensor.equal(again[name]) for name, tensor in made.state_dict().items())


@MODELS
def test_the_same_method_learns_on_every_kind(make) -> None:
    heads = {"a": said, "b": said}
    method = RankOneMoE(steps=2, batch=6, rank=2, guard=6)
    made = built(method, make, data=sides(make), heads=heads)
    assert len(made.report["fitted"]["losses"]) == 2
    assert answer(made.module(), make).isfinite().all()

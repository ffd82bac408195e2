"""A merge as a function of few numbers: two ways to its gradient, one result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.modules.deltas import Dense, Sparse, leading
from fusewright.modules.parametrised import Coefficients, ParametrisedMerge
from fusewright.modules.vectors import TaskVectors

EXPERTS = ("a", "b", "c")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def vectors(dtype: torch.dtype = torch.float64) -> TaskVectors:
    draw = torch.Generator().manual_seed(1)
    base = {n: t.detach().to(dtype) for n, t in model().named_parameters()}
    experts = {
        expert: {n: t + 0.1 * torch.randn(t.shape, generator=draw).to(dtype)
                 for n, t in base.items()}
        for expert in EXPERTS
    }  # fmt: skip
    return TaskVectors(EXPERTS, base, lambda e, n: Dense(experts[e][n] - base[n]))


class Each(Coefficients):
    """A weight for every expert and tensor, and perhaps a mask of the matrices."""

    def __init__(self, names: tuple[str, ...], masked: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.names, self.masked = names, masked
        self.values = nn.Parameter(torch.rand(len(names), 3, generator=draw).double())
        self.rows = nn.Parameter(torch.randn(6, 1, generator=draw).double())

    def weights(self, name: str) -> torch.Tensor:
        return self.values[self.names.index(name)]

    def mask(self, name: str) -> torch.Tensor | None:
        return self.rows.sigmoid() if self.masked and name == "0.weight" else None


def gradients(merge: ParametrisedMerge, mode: str, losses: int = 2) -> list[torch.Tensor]:
    merge.coefficients.zero_grad()
    draw = torch.Generator().manual_seed(3)
    with merge.live(mode) as live:
        for _ in range(losses):
            inputs = torch.randn(5, 4, generator=draw).double()
            live.backward(live.model(inputs).log_softmax(1)[:, 0].mean())
            live.collect()
    return [p.grad.clone() for p in merge.coefficients.parameters() if p.grad is not None]


def forms(name: str) -> TaskVectors:
    found = vectors()
    change = {
        "dense": lambda delta: delta,
        "sparse": lambda delta: Sparse.largest(delta.dense(), 0.4),
        "factors": lambda delta: (leading(delta, 2)
                                  if len(delta.shape) == 2 else delta),
    }  # fmt: skip
    return found.mapped(change[name])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse", "factors"])
def test_projection_gives_the_gradient_of_autograd(form: str, masked: bool) -> None:
    live, tau = model().double().eval(), forms(form)
    merge = ParametrisedMerge(live, tau, Each(tau.names, masked))
    one, two = gradients(merge, "projection"), gradients(merge, "autograd")
    assert len(one) == len(two) == 1 + masked
    for projected, differentiated in zip(one, two, strict=True):
        torch.testing.assert_close(projected, differentiated)
        assert projected.abs().min() > 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    live, tau = model().double().eval(), vectors()
    coefficients = Each(tau.names, masked=True)
    merge = ParametrisedMerge(live, tau, coefficients)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).double()

    def loss() -> float:
        with merge.live() as at:
            return float(at.model(inputs).log_softmax(1)[:, 0].mean())

    with merge.live() as at:
        at.backward(at.model(inputs).log_softmax(1)[:, 0].mean())
        at.collect()
    for parameter, place in ((coefficients.values, (0, 1)), (coefficients.rows, (2, 0))):
        found, step = parameter.grad[place], 1e-6
        with torch.no_grad():
            parameter[place] += step
            above = loss()
            parameter[place] -= 2 * step
            below = loss()
            parameter[place] += step
        assert float(found) == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_weights_of_one_and_zero_give_the_experts_and_the_base_back() -> None:
    live, tau = model().double(), vectors()
    coefficients = Each(tau.names, masked=False)
    merge = ParametrisedMerge(live, tau, coefficients)
    with torch.no_grad():
        coefficients.values.zero_()
    assert all(t.equal(tau.base[n]) for n, t in merge.state().items())
    with torch.no_grad():
        coefficients.values[:, 1] = 1
    for name, tensor in merge.state().items():
        torch.testing.assert_close(tensor, tau.base[name] + tau.read("b", name).dense())


def test_the_models_own_weights_are_left_alone() -> None:
    live, tau = model().double(), vectors()
    before = {n: t.clone() for n, t in live.state_dict().items()}
    merge = ParametrisedMerge(live.eval(), tau, Each(tau.names, masked=True))
    gradients(merge, "projection")
    assert all(t.equal(before[n]) for n, t in live.state_dict().items())
    assert all(p.grad is None for p in live.parameters())


def test_weights_in_16_bits_are_summed_in_32() -> None:
    tau = vectors(torch.bfloat16).mapped(lambda delta: Dense(delta.dense().float()))
    merge = ParametrisedMerge(model().bfloat16(), tau, Each(tau.names, masked=False).float())
    name = "3.weight"
    weights = merge.coefficients.weights(name)
    exact = tau.base[name].float() + sum(
        w * d.dense() for w, d in zip(weights, tau.at(name), strict=True)
    )
    assert merge.state()[name].equal(exact.bfloat16()) and not exact.bfloat16().equal(exact)
    assert merge.state(wide=True)[name].equal(exact)


def test_gradients_in_16_bits_are_projected_in_32() -> None:
    tau = vectors(torch.bfloat16).mapped(lambda delta: Dense(delta.dense().float()))
    live = model().bfloat16().eval()
    merge = ParametrisedMerge(live, tau, Each(tau.names, masked=False).float())
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    leaves = {n: t.requires_grad_() for n, t in merge.state().items()}
    loss = torch.func.functional_call(live, leaves, (inputs,)).square().mean()
    found = torch.autograd.grad(loss, list(leaves.values()))
    expected = torch.stack([
        torch.stack([(g.float() * d.dense()).sum() for d in tau.at(n)])
        for n, g in zip(leaves, found, strict=True)
    ])  # fmt: skip
    with merge.live() as at:
        at.backward(at.model(inputs).square().mean())
        at.collect()
    torch.testing.assert_close(merge.coefficients.values.grad, expected)


def test_tensors_that_a_loss_does_not_use_get_nothing() -> None:
    live, tau = model().double().eval(), vectors()
    merge = ParametrisedMerge(live, tau, Each(tau.names, masked=False))
    with merge.live() as at:
        at.backward(at.model[0](torch.ones(2, 4).double()).sum())
        at.collect()
    grad = merge.coefficients.values.grad
    assert grad[:2].abs().min() > 0 and not grad[2:].any()


def test_only_what_is_selected_is_merged() -> None:
    tau = vectors().select(lambda name: name.endswith("weight"))
    assert tau.names == ("0.weight", "1.weight", "3.weight")
    assert set(ParametrisedMerge(model(), tau, Each(tau.names, False)).state()) == set(tau.names)


def test_what_is_kept_is_read_once() -> None:
    reads = []
    tau = vectors()
    watched = lambda e, n: reads.append((e, n)) or tau.read(e, n)  # noqa: E731
    counted = TaskVectors(tau.experts, tau.base, watched)
    kept = counted.kept()
    assert len(reads) == len(EXPERTS) * len(tau.names)
    kept.norms2(), kept.projected("0.weight", tau.base["0.weight"])
    assert len(reads) == len(EXPERTS) * len(tau.names)

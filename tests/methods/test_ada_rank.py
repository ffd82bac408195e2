"""AdaRank: identities, every step by hand, and the gradient of a binary mask."""

from __future__ import annotations

import pytest
import torch
from learned_toys import Killed, data, experts, network, stop_at
from torch import nn
from torch.func import functional_call

import fusewright as fw
from fusewright.methods.learned import AdaMerging, AdaRank
from fusewright.methods.learned._ada_rank import about_mean
from fusewright.methods.learned.coefficients import LinearCoefficients
from fusewright.methods.learned.objectives import entropy
from fusewright.modules.deltas import Dense, Factors
from fusewright.modules.directions import DirectionMasks, DirectionMerge, Directions, decomposed
from fusewright.modules.vectors import TaskVectors

HALF = torch.float64
QUICK = {"steps": 6, "batch": 16, "every": 2, "guard": 0, "rate": 0.04}


def merged(method="ada_rank", **params):
    base = network(HALF)
    options = {k: params.pop(k) for k in ("out", "progress") if k in params}
    if method == "ada_rank":
        method = AdaRank(**{**QUICK, **params})
    return fw.merge(method, base=base, experts=experts(base), data=data(HALF), **options)


def close(one, two, **bounds) -> bool:
    other = two.state_dict()
    bounds = bounds or {"rtol": 1e-6, "atol": 1e-7}
    return all(torch.allclose(t, other[n], **bounds) for n, t in one.state_dict().items())


def test_all_directions_are_task_arithmetic_and_learning_only_scales_is_adamerging() -> None:
    assert close(merged(steps=0), merged(fw.TaskArithmetic(scale=0.3)))
    free = {"low": None, "high": None}
    plain = merged(AdaMerging(**QUICK, **free))
    assert close(merged(temperature=1e12), plain, rtol=1e-4, atol=1e-5)  # masks hear nothing


def test_a_prefix_is_the_truncated_svd() -> None:
    base = network(HALF)
    start, models = base.state_dict(), [e.state_dict() for e in experts(base).values()]
    found = merged(steps=0, density=0.5).state_dict()
    for name, tensor in start.items():
        for model in models:
            tau = model[name] - start[name]
            if tau.dim() == 2:
                u, s, vt = torch.linalg.svd(tau, full_matrices=False)
                half = len(s) // 2
                tau = u[:, :half] * s[:half] @ vt[:half]
            tensor = tensor + 0.3 * tau
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def by_hand(center: str, weights: bool, density: float) -> dict[str, torch.Tensor]:
    base = network(HALF)
    start = {n: t.detach() for n, t in base.named_parameters()}
    models = [{n: t.detach() for n, t in e.named_parameters()} for e in experts(base).values()]
    if center == "mean":
        start = {n: sum(m[n] for m in models) / 2 for n in start}
    tau = {n: [m[n] - t for m in models] for n, t in start.items()}
    svd = {n: [torch.linalg.svd(t, full_matrices=False) for t in each]
           for n, each in tau.items() if each[0].dim() == 2}  # fmt: skip
    logits = {n: torch.full((2, len(of[0][1])), -0.1) for n, of in svd.items()}
    for each in logits.values():
        each[:, : int(density * each.shape[1])] = 0.1
        each.requires_grad_()
    scales = {n: torch.full((2,), 0.3).requires_grad_() for n in start}
    adam = torch.optim.Adam([*scales.values(), *logits.values()] if weights
                            else list(logits.values()), lr=0.04)  # fmt: skip

    def theta() -> dict[str, torch.Tensor]:
        found = {}
        for n, tensor in start.items():
            for t in range(2):
                added = tau[n][t]
                if n in svd:
                    soft = (logits[n][t] / 10).sigmoid()
                    mask = (soft > 0.5).to(soft) - soft.detach() + soft
                    u, s, vt = svd[n][t]
                    added = u * (s * mask) @ vt
                tensor = tensor + scales[n][t] * added
            found[n] = tensor
        return found

    for step in range(6):
        x = {t: data(HALF)[t][step % 4] for t in "ab"}
        loss = sum(entropy(functional_call(base, theta(), (x[t],))) for t in "ab")
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {n: t.detach() for n, t in theta().items()}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("center", "density"), [("base", 1.0), ("base", 0.4), ("mean", 0.5)])
def test_every_step_is_that_of_plain_autograd(center: str, density: float, weights: bool) -> None:
    found = merged(center=center, density=density, weights=weights)
    for name, tensor in by_hand(center, weights, density).items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    start = merged(center=center, density=density, weights=weights, steps=0)
    shares = [m.report["fitted"]["directions"] for m in (start, found)]
    assert shares[0] != shares[1], "no direction was turned: the test sees little"


def test_repeatable_and_resumed_after_a_kill(tmp_path) -> None:
    whole = merged()
    exact = {"rtol": 0, "atol": 0}
    assert close(merged(), whole, **exact)
    with pytest.raises(Killed):
        merged(out=tmp_path / "out", progress=stop_at(5))
    seen = []
    assert close(merged(guard=0, out=tmp_path / "out", progress=seen.append), whole, **exact)
    assert next(now.done for now in seen if now.unit == "steps") == 5


def shaped(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=HALF)


@pytest.mark.parametrize(("shape", "matrices"), [((6, 4), 1), ((3, 4, 2, 2), 1), ((3, 5, 4), 3)],
                         ids=["linear", "convolution", "experts first"])  # fmt: skip
def test_kept_directions_add_up_to_each_matrix(shape: tuple[int, ...], matrices: int) -> None:
    deltas = [Dense(shaped(*shape, seed=seed)) for seed in range(3)]
    found = Directions.of(deltas, matrices)
    every = torch.ones(matrices, 3 * found.rank)
    torch.testing.assert_close(found.combined(every).reshape(shape),
                               sum(d.dense() for d in deltas))  # fmt: skip
    torch.testing.assert_close(found.combined(every.clone().requires_grad_()).detach(),
                               found.combined(every))  # fmt: skip
    one = torch.zeros_like(every)
    one[0, found.rank] = 1  # the second expert's first direction
    matrix = deltas[1].dense().reshape(matrices, -1, found.down.shape[2])[0]
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(found.combined(one)[0], s[0] * u[:, :1] @ vt[:1])


def test_adapters_of_several_ranks_are_decomposed_as_factors() -> None:
    low = [Factors(shaped(6, r, seed=r), shaped(r, 5, seed=9), torch.Size((6, 5))) for r in (1, 3)]
    found = Directions.of(low, 1)
    assert found.rank == 3 and found.real.sum() == 4
    torch.testing.assert_close(found.combined(torch.ones(1, 6))[0], sum(d.dense() for d in low))


@pytest.mark.parametrize("density, kept", [(0.25, 2), (0.5, 3), (1.0, 3)])
def test_the_share_is_that_of_the_whole_matrix_however_it_is_stored(density, kept) -> None:
    low = [Factors(shaped(9, 3, seed=s), shaped(3, 8, seed=s + 5), torch.Size((9, 8)))
           for s in (1, 2)]  # fmt: skip
    totals = []
    for deltas in (low, [Dense(d.dense()) for d in low]):
        found = Directions.of(deltas, 1)
        linear = LinearCoefficients(["w"], ["a", "b"], lambda name: name, 1.0)
        masks = DirectionMasks(linear, {"w": found}, 2, density, 10.0, 0.1)
        real = found.real.view(2, -1)
        assert real.sum(dim=1).tolist() == [3, 3]
        assert (masks.kept("w")[0].detach() * real).sum(dim=1).tolist() == [kept, kept]
        totals.append(found.combined(masks.kept("w").detach().flatten(1)))
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)


def test_projection_gives_the_gradient_of_autograd() -> None:
    live = nn.Linear(4, 5).double()
    held = {(e, n): Dense(0.3 * shaped(*t.shape, seed=s + len(n)))
            for s, e in enumerate("ab") for n, t in live.state_dict().items()}  # fmt: skip
    tau = TaskVectors(("a", "b"), live.state_dict(), lambda e, n: held[e, n])
    directions = decomposed(tau, lambda name: int(name == "weight"))
    linear = LinearCoefficients(tau.names, tau.experts, lambda name: name, 0.7)
    masks = DirectionMasks(linear, directions, 2, 0.5, 2.0, 0.1)
    merge, found = DirectionMerge(live, tau, masks, directions), []
    for mode in ("projection", "autograd"):
        masks.zero_grad()
        with merge.live(mode) as at:
            at.backward(at.model(shaped(3, 4)).log_softmax(1)[:, 0].sum())
            at.collect()
        found.append([p.grad.clone() for p in masks.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0
    assert merge.share(0) == merge.share(1) == 0.5


def test_the_mean_of_three_float64_experts_is_exact() -> None:
    held = {name: torch.rand(4, 3, dtype=torch.float64) for name in ("a", "b", "c")}
    base = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    moved = about_mean(TaskVectors(tuple(held), base, lambda expert, name: Dense(held[expert])))
    mean = torch.stack(list(held.values())).mean(0)
    torch.testing.assert_close(moved.base["w"], mean, rtol=1e-14, atol=0)

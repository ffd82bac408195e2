"""MetaGPT's weights are what its derivation says, and follow what transforms leave."""

from __future__ import annotations

import pytest
import torch

import fusewright as fw


def orthogonal(count: int, size: int = 64, seed: int = 0) -> list[torch.Tensor]:
    """Task vectors without overlap, of other lengths each."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(size, count, generator=draw, dtype=torch.float64))[0]
    lengths = torch.linspace(0.5, 3, count, dtype=torch.float64)
    return list((directions * lengths).T)


def as_models(vectors: list[torch.Tensor]) -> dict:
    """Over a base of two tensors, which share the vectors' elements."""
    def state(vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layers.0.weight": vector[:40].reshape(8, 5), "layers.1.weight": vector[40:]}

    base = {n: torch.ones_like(t) for n, t in state(vectors[0]).items()}
    experts = {str(i): {n: base[n] + t for n, t in state(v).items()} for i, v in enumerate(vectors)}
    return {"base": base, "experts": experts}


def shares(merged, vectors: list[torch.Tensor]) -> torch.Tensor:
    """λ, found again in the merged tensors."""
    state = merged.state_dict()
    flat = torch.cat([state[n].reshape(-1) - 1 for n in ("layers.0.weight", "layers.1.weight")])
    return torch.linalg.lstsq(torch.stack(vectors).T, flat[:, None]).solution[:, 0]


def surrogate(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Σ_t ‖τ_t‖² ‖Σ_k λ_k τ_k - τ_t‖²."""
    squares = vectors.square().sum(dim=1)
    return (squares * (weights @ vectors - vectors).square().sum(dim=1)).sum()


def test_its_weights_minimise_the_quadratic_surrogate_of_orthogonal_vectors() -> None:
    vectors = orthogonal(4)
    found = shares(fw.merge(fw.MetaGPT(), **as_models(vectors)), vectors)
    stacked = torch.stack(vectors)
    slope = torch.func.grad(surrogate)(found, stacked)
    curve = torch.func.hessian(surrogate)(found, stacked)
    assert slope.abs().max() < 1e-6 * curve.abs().max()
    assert torch.linalg.eigvalsh(curve).min() > 0
    least = surrogate(found, stacked)
    for place in range(4):
        for move in (-0.05, 0.05):
            other = found.clone()
            other[place] += move
            assert surrogate(other, stacked) > least
    assert surrogate(torch.full((4,), 0.25, dtype=torch.float64), stacked) > least


def test_of_vectors_that_overlap_too() -> None:
    """The minimum over all points is the mean weighted by squares: none need be orthogonal."""
    vectors = orthogonal(3)
    vectors[1] = vectors[1] + 2 * vectors[0]
    found = shares(fw.merge(fw.MetaGPT(), **as_models(vectors)), vectors)
    stacked = torch.stack(vectors)
    assert torch.func.grad(surrogate)(found, stacked).abs().max() < 1e-9
    apart = torch.func.grad(surrogate)(torch.full((3,), 1 / 3, dtype=torch.float64), stacked)
    assert apart.abs().max() > 0.1


def test_equal_norms_are_averaged_and_shares_sum_to_one() -> None:
    equal = [v / v.norm() for v in orthogonal(5)]
    merged, plain = (fw.merge(m, **as_models(equal)) for m in (fw.MetaGPT(), fw.Average()))
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])
    vectors = orthogonal(5)
    found = shares(fw.merge(fw.MetaGPT(), **as_models(vectors)), vectors)
    assert float(found.sum()) == pytest.approx(1)
    squares = torch.stack(vectors).square().sum(dim=1)
    torch.testing.assert_close(found, squares / squares.sum())


@pytest.mark.parametrize("stage", [fw.Trim(density=0.4), fw.Drop(density=0.4)],
                         ids=["trim", "drop"])  # fmt: skip
def test_after_a_transform_norms_are_the_transformed_ones(stage) -> None:
    draw = torch.Generator().manual_seed(1)
    spread = torch.randn(64, generator=draw, dtype=torch.float64)
    peaked = torch.zeros(64, dtype=torch.float64)
    peaked[7] = spread.norm()  # of one norm, but one keeps it where the other is cut
    given = as_models([spread, peaked])
    sparse = [
        {n: t - given["base"][n] for n, t in
         fw.merge(stage >> fw.Sum(), base=given["base"], experts={name: expert},
                  seed=3).state_dict().items()}
        for name, expert in given["experts"].items()
    ]  # fmt: skip
    flat = [torch.cat([t.reshape(-1) for t in each.values()]) for each in sparse]
    squares = torch.stack([v.square().sum() for v in flat])
    merged = fw.merge(stage >> fw.MetaGPT(), **given, seed=3).state_dict()
    after = squares / squares.sum()
    assert (after - 0.5).abs().max() > 0.01
    for name, tensor in merged.items():
        wanted = given["base"][name] + sum(s * v[name] for s, v in zip(after, sparse, strict=True))
        torch.testing.assert_close(tensor, wanted)

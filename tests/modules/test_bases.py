"""Directions that all task vectors share: coordinates, masks of them, and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.methods.learned.coefficients import LinearCoefficients, MaskedCoefficients
from fusewright.modules.bases import Basis, SubspaceMerge, shared_bases
from fusewright.modules.deltas import Dense, Factors
from fusewright.modules.masks import ConcreteMasks
from fusewright.modules.vectors import TaskVectors

HALF = torch.float64
SHAPES = pytest.mark.parametrize(
    ("shape", "matrices"), [((4, 6), 1), ((6, 4), 1), ((3, 4, 2, 2), 1), ((3, 5, 4), 3)],
    ids=["wide", "tall", "convolution", "experts first"],
)  # fmt: skip


def shaped(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=HALF)


@SHAPES
def test_any_tensor_is_its_coordinates_in_the_directions_of_another(
    shape: tuple[int, ...], matrices: int
) -> None:
    basis, other = Basis.of(shaped(*shape), matrices), shaped(*shape, seed=1)
    rows = basis.coordinates(other)
    short = min(shape[-2:]) if matrices > 1 else min(shape[0], other.numel() // shape[0])
    assert rows.shape == (matrices, short, other.numel() // matrices // short)
    torch.testing.assert_close(basis.tensor(rows, other.shape), other)
    torch.testing.assert_close(basis.coordinates(shaped(*shape)).norm(dim=2), basis.sigma)


@SHAPES
def test_a_mask_of_directions_keeps_singular_triples(
    shape: tuple[int, ...], matrices: int
) -> None:
    tensor, mask = shaped(*shape), shaped(matrices, 99, seed=2).abs()
    basis = Basis.of(tensor, matrices)
    m = mask[:, : basis.sigma.shape[1], None]
    found = basis.tensor(m * basis.coordinates(tensor), tensor.shape)
    rows = shape[1] if matrices > 1 else shape[0]
    u, sigma, vt = torch.linalg.svd(tensor.reshape(matrices, rows, -1), full_matrices=False)
    torch.testing.assert_close(found.reshape(matrices, rows, -1), u * (m[..., 0] * sigma)[:, None]
                               @ vt)  # fmt: skip


@pytest.mark.parametrize("width", [3, 7])
def test_projection_gives_the_gradient_of_autograd(width: int) -> None:
    live = nn.Linear(width, 5).double()
    held = {(e, n): Dense(0.3 * shaped(*t.shape, seed=s + len(n)))
            for s, e in enumerate("ab") for n, t in live.state_dict().items()}  # fmt: skip
    held["a", "weight"] = Factors(shaped(5, 2), shaped(2, width), torch.Size((5, width)))
    tau = TaskVectors(("a", "b"), live.state_dict(), lambda e, n: held[e, n])
    bases = shared_bases(tau, lambda name: int(name == "weight"))
    masks = ConcreteMasks({n: t.shape for n, t in tau.base.items()}, "row",
                          spectra={n: basis.sigma for n, basis in bases.items()})  # fmt: skip
    linear = LinearCoefficients(tau.names, tau.experts, lambda name: name, 0.7)
    both = MaskedCoefficients(linear, masks, "expected")
    merge, found = SubspaceMerge(live, tau, both, bases), []
    assert masks.logits[0].shape == (1, min(width, 5), 1) and masks.logits[1].shape == (5,)
    both.draw = 3
    for mode in ("projection", "autograd"):
        both.zero_grad()
        with merge.live(mode) as at:
            at.backward(at.model(shaped(3, width)).log_softmax(1)[:, 0].sum())
            at.collect()
        found.append([p.grad.clone() for p in both.parameters()])
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0

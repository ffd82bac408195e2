"""Lookup tables and affine modules mixed for every sample: each sample gets its own merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.modules.deltas import Factors
from fusewright.modules.embeddings import table_scale
from fusewright.modules.features import SharedMixture
from fusewright.modules.functional import with_weights
from fusewright.modules.mixed_rest import MixedAffine, MixedTable
from fusewright.modules.routers import Router
from fusewright.modules.stacks import FactorStack, stacked

ROWS, EXPERTS, WIDTH, SAMPLES = 11, 3, 6, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(weights: torch.Tensor | None = None) -> SharedMixture:
    made = SharedMixture(0, "here", Router(WIDTH, EXPERTS, 0), "sample", None)  # type: ignore
    made.weights = draw(SAMPLES, EXPERTS, seed=9) if weights is None else weights
    return made


class Scaled(nn.Embedding):
    """As Gemma's: of 3 times its rows."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return 3.0 * super().forward(indices)


class Shifted(nn.Embedding):
    """As OPT's positions: of other rows than are asked for."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices + 2)


class Normed(nn.Embedding):
    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(indices), dim=-1)


def table(of: SharedMixture, base: nn.Embedding | None = None) -> MixedTable:
    low = [Factors(draw(ROWS, 2, seed=t), draw(2, WIDTH, seed=5 + t), torch.Size((ROWS, WIDTH)))
           for t in range(EXPERTS)]  # fmt: skip
    stack = stacked(low, 1.0, torch.float32)
    assert isinstance(stack, FactorStack)
    base = nn.Embedding(ROWS, WIDTH) if base is None else base
    scale = table_scale(base)
    assert scale is not None
    return MixedTable(base, stack, of, scale)


def scaled(of: SharedMixture) -> MixedTable:
    return table(of, Scaled(ROWS, WIDTH, padding_idx=ROWS - 1))


def affine(of: SharedMixture) -> MixedAffine:
    base = nn.LayerNorm(WIDTH)
    values = {n: draw(EXPERTS, WIDTH, seed=at) for at, n in enumerate(("weight", "bias"))}
    return MixedAffine(base, values, of)


INDICES = torch.arange(SAMPLES * 5).reshape(SAMPLES, 5) % ROWS


@pytest.mark.parametrize("make", [table, scaled, affine])
def test_every_sample_is_answered_by_the_merge_of_its_own_weights(make) -> None:
    of = mixture()
    made = make(of)
    inputs = INDICES if make is not affine else draw(SAMPLES, 5, WIDTH)
    found = made(inputs)
    for at, weights in enumerate(of.weights):
        with with_weights(made.base, made.merged(weights)):
            torch.testing.assert_close(found[at], made.base(inputs[at]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [table, affine])
def test_without_experts_it_is_the_layer_as_it_was(make) -> None:
    of = mixture()
    made = make(of)
    inputs = INDICES if make is table else draw(SAMPLES, 5, WIDTH)
    with of.shared():
        assert made(inputs).equal(made.base(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_scale_of_a_table_is_found_whatever_its_rows_are(dtype: torch.dtype) -> None:
    assert table_scale(nn.Embedding(ROWS, WIDTH)) == 1
    zeros = nn.Embedding.from_pretrained(torch.zeros(ROWS, WIDTH))
    for made in (Scaled(ROWS, WIDTH), Scaled(ROWS, WIDTH, _weight=zeros.weight)):
        assert table_scale(made.to(dtype)) == pytest.approx(3, rel=1e-3)
    for other in (Shifted, Normed):
        assert table_scale(other(ROWS, WIDTH).to(dtype)) is None


def test_indices_of_one_axis_are_looked_up_for_every_sample() -> None:
    made = table(mixture())
    positions = torch.arange(5)
    assert made(positions).equal(made(positions.expand(SAMPLES, 5)))


@pytest.mark.parametrize("make", [table, affine])
def test_sixteen_bits_are_summed_in_32(make) -> None:
    weights = draw(EXPERTS, seed=9)
    made = make(mixture())
    half = make(mixture()).bfloat16()
    with torch.no_grad():
        for own, other in zip(half.state_dict().values(), made.state_dict().values(), strict=True):
            other.copy_(own)
    for name, tensor in made.merged(weights).items():
        assert half.merged(weights)[name].equal(tensor.bfloat16())

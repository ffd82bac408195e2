"""Lookup tables and affine modules mixed for every sample: each sample gets its own merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.modules.deltas import Factors
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


def table(of: SharedMixture) -> MixedTable:
    low = [Factors(draw(ROWS, 2, seed=t), draw(2, WIDTH, seed=5 + t), torch.Size((ROWS, WIDTH)))
           for t in range(EXPERTS)]  # fmt: skip
    stack = stacked(low, 1.0, torch.float32)
    assert isinstance(stack, FactorStack)
    return MixedTable(nn.Embedding(ROWS, WIDTH), stack, of)


def affine(of: SharedMixture) -> MixedAffine:
    base = nn.LayerNorm(WIDTH)
    values = {n: draw(EXPERTS, WIDTH, seed=at) for at, n in enumerate(("weight", "bias"))}
    return MixedAffine(base, values, of)


INDICES = torch.arange(SAMPLES * 5).reshape(SAMPLES, 5) % ROWS


@pytest.mark.parametrize("make", [table, affine])
def test_every_sample_is_answered_by_the_merge_of_its_own_weights(make) -> None:
    of = mixture()
    made = make(of)
    inputs = INDICES if make is table else draw(SAMPLES, 5, WIDTH)
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

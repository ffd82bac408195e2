"""Convolutions as a matrix times patches: alone, mixed for every sample, routed at every place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.modules import mixed, patches
from fusewright.modules.deltas import Dense, Factors
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.mixture import Mixture
from fusewright.modules.routed import RoutedLinear
from fusewright.modules.routers import Router
from fusewright.modules.stacks import stacked

IN, OUT, EXPERTS, SAMPLES = 3, 4, 2, 5
CONVOLUTIONS = {
    "flat": lambda: nn.Conv1d(IN, OUT, 3, stride=2, padding=1),
    "flat reflect": lambda: nn.Conv1d(IN, OUT, 4, padding=2, padding_mode="reflect"),
    "plain": lambda: nn.Conv2d(IN, OUT, 3),
    "point": lambda: nn.Conv2d(IN, OUT, 1, stride=2, bias=False),
    "uneven": lambda: nn.Conv2d(IN, OUT, (2, 3), (2, 1), (1, 2), (1, 2)),
    "same": lambda: nn.Conv2d(IN, OUT, (4, 3), padding="same"),
    "circular": lambda: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="circular"),
}  # fmt: skip
EACH = pytest.mark.parametrize("kind", CONVOLUTIONS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A convolution, and inputs."""
    torch.manual_seed(0)
    base = CONVOLUTIONS[kind]().double()
    return base, draw(SAMPLES, IN, 7, *([6] if isinstance(base, nn.Conv2d) else []))


def other(base: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    """What torch's convolution says with another weight."""
    tensors = {"weight": weight.reshape(base.weight.shape)}
    tensors |= {} if base.bias is None else {"bias": bias}
    return torch.func.functional_call(base, tensors, (x,))


@EACH
def test_a_convolution_is_its_matrix_times_patches(kind: str) -> None:
    base, x = made(kind)
    matrix = patches.matrix(base)
    found = patches.rows(base, x) @ matrix.T
    answer = patches.answered(base, x, found)
    bias = 0 if base.bias is None else base.bias.view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(answer + bias, base(x))
    assert patches.stored(base, matrix).equal(base.weight)
    torch.testing.assert_close(patches.convolved(base, x, matrix[None]) + bias, base(x))


def layer(base: nn.Module, density: float, low: bool) -> tuple[MixedLinear, torch.Tensor]:
    """A mixed layer and its deltas (experts, out, in)."""
    width = patches.matrix(base).shape[1]
    size = torch.Size((OUT, width))
    deltas = [Factors(draw(OUT, 1, seed=t), draw(1, width, seed=9 + t), size) if low
              else Dense(draw(OUT, width, seed=t)) for t in range(EXPERTS)]  # fmt: skip
    stack = stacked(deltas, density, torch.float64)
    shift = None if base.bias is None else draw(EXPERTS, OUT, seed=5)
    mixture = Mixture(0, "here", Router(IN, EXPERTS, 0), "sample", None)
    return MixedLinear(base, stack, shift, mixture), stack.whole(torch.float64)


@pytest.mark.parametrize("limit", [1, 2 * OUT * IN * 9 * 8, 1 << 30])
@pytest.mark.parametrize(("density", "low"), [(1.0, False), (0.3, False), (1.0, True)])
@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("few", [True, False])
@EACH
def test_every_sample_has_its_own_weights(
    kind, few, samples, density, low, limit, monkeypatch
) -> None:
    monkeypatch.setattr(mixed, "by_patches", lambda *_: few)
    monkeypatch.setattr(mixed, "_MERGED", limit)
    base, x = made(kind)
    own, deltas = layer(base, density, low)
    w = draw(samples, EXPERTS, seed=2)
    weights = patches.matrix(base) + torch.einsum("nt,tri->nri", w, deltas)
    biases = w @ own.shift + base.bias if own.shift is not None else [None] * samples
    own.mixture.weights = w
    expected = torch.cat([other(base, x[at : at + 1], weights[at % samples], biases[at % samples])
                          for at in range(SAMPLES)])  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(own(x), expected)
    merged = own.merged(w[0])
    torch.testing.assert_close(merged["weight"].flatten(1), weights[0])
    assert merged["weight"].shape == base.weight.shape
    x.requires_grad_()
    w.requires_grad_()
    weights = patches.matrix(base) + torch.einsum("nt,tri->nri", w, deltas)
    biases = w @ own.shift + base.bias if own.shift is not None else [None] * samples
    expected = torch.cat([other(base, x[at : at + 1], weights[at % samples], biases[at % samples])
                          for at in range(SAMPLES)])  # fmt: skip
    found = own(x)
    up = draw(*found.shape, seed=3)
    for one, two in zip(torch.autograd.grad(found, (x, w), up),
                        torch.autograd.grad(expected, (x, w), up), strict=True):  # fmt: skip
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("size", "few"), [(3, True), (4, False)])
def test_patches_are_made_where_they_are_far_smaller(size: int, few: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(IN, 64, 3, padding=1).double()
    stack = stacked([Dense(draw(64, 27, seed=t)) for t in range(EXPERTS)], 1.0, torch.float64)
    mixture = Mixture(0, "here", Router(IN, EXPERTS, 0), "sample", None)
    mixture.weights = draw(SAMPLES, EXPERTS)
    calls, rows = [], patches.rows
    monkeypatch.setattr(patches, "rows", lambda *of: calls.append(1) or rows(*of))
    with torch.no_grad():
        MixedLinear(base, stack, None, mixture)(draw(SAMPLES, IN, size, size))
    assert bool(calls) is few


def test_kernels_are_merged_for_few_samples_at_a_time(monkeypatch) -> None:
    base, x = made("plain")
    own, _ = layer(base, 1.0, False)
    seen, convolved = [], patches.convolved
    monkeypatch.setattr(patches, "convolved", lambda base, x, matrices: (
        seen.append((len(x), len(matrices))) or convolved(base, x, matrices)))  # fmt: skip
    monkeypatch.setattr(mixed, "_MERGED", 2 * OUT * IN * 9 * 8)
    for rows in (SAMPLES, 1):
        own.mixture.weights = draw(rows, EXPERTS)
        with torch.no_grad():
            own(x)
    assert seen == [(2, 2), (2, 2), (1, 1), (SAMPLES, 1)]


def test_sixteen_bits_of_a_convolution_are_summed_in_32() -> None:
    base = nn.Conv2d(2, 3, 2, padding=1).bfloat16()
    nn.init.constant_(base.weight, -512)
    nn.init.constant_(base.bias, -512)
    mixture = Mixture(0, "here", Router(2, 1, 0), "sample", None)
    stack = stacked([Dense(torch.full((3, 8), 512.0))], 1.0, torch.bfloat16)
    own = MixedLinear(base, stack, torch.full((1, 3), 512.0).bfloat16(), mixture)
    for rows in (1, 2):
        mixture.weights = torch.full((rows, 1), 1 + 2**-9)
        with torch.no_grad():
            inside = own(torch.ones(2, 2, 3, 3).bfloat16())[:, :, 1:3, 1:3]
        assert inside.dtype is torch.bfloat16 and bool((inside == 9).all())


def routed(base: nn.Module, top: int) -> RoutedLinear:
    width = patches.matrix(base).shape[1]
    up, down = draw(EXPERTS, OUT, 2), draw(EXPERTS, 2, width, seed=1)
    gate, shift = draw(EXPERTS, 2, width, seed=2), draw(EXPERTS, OUT, seed=3)
    return RoutedLinear(base, up, down, gate, shift, top)


@pytest.mark.parametrize("top", [1, 2])
@EACH
def test_every_place_goes_where_its_patch_says(kind: str, top: int) -> None:
    base, x = made(kind)
    own = routed(base, top)
    up, down, gate, shift = own.up, own.down, own.gate, own.shift
    zero = torch.zeros(OUT).double()
    gated = torch.stack([_alone(base, x, g) for g in gate]).norm(dim=2)  # experts, samples, places
    shares = gated.softmax(dim=0)
    if top == 1:
        shares = (shares == shares.amax(dim=0)).double()
    said = torch.stack([other(base, x, u @ d, zero) for u, d in zip(up, down, strict=True)])
    said = said + shift.view(EXPERTS, 1, OUT, *[1] * (x.dim() - 2))
    expected = base(x) + (shares[:, :, None] * said).sum(dim=0)
    for each in (x, x.clone().requires_grad_()):
        found = own(each)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # shares are in float32


def _alone(base: nn.Module, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """G_t of every patch, by a convolution with as many outputs."""
    return base._conv_forward(x, gate.reshape(len(gate), *base.weight.shape[1:]), None)


@pytest.mark.parametrize("base", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)], ids=["linear", "conv"])
def test_no_rows_are_answered_with_none(base) -> None:
    layer = RoutedLinear(base, torch.ones(2, 3, 2), torch.ones(2, 2, 4), torch.ones(2, 1, 4), None)
    nothing = torch.ones(0, 4) if isinstance(base, nn.Linear) else torch.ones(0, 4, 5, 5)
    assert layer(nothing).shape == base(nothing).shape

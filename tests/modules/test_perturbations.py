"""Perturbations stay in their ball and in the range of pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.modules.perturbations import Ball, added, ascend

NORMS = ["l2", "linf"]


@settings(deadline=None)
@given(st.sampled_from(NORMS), st.floats(1e-3, 2.0), st.integers(0, 2**31), st.floats(0.01, 50.0))
def test_a_projection_is_in_the_ball_and_leaves_alone_what_was(norm, radius, seed, size) -> None:
    draw = torch.Generator().manual_seed(seed)
    delta = size * torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64)
    ball = Ball(norm, radius)
    found = ball.project(delta)
    assert (ball.size(found) <= radius * (1 + 1e-9)).all()
    inside = ball.size(delta) <= radius
    torch.testing.assert_close(found[inside], delta[inside])
    torch.testing.assert_close(ball.project(found), found)


@pytest.mark.parametrize("norm", NORMS)
def test_each_row_has_a_ball_of_its_own(norm: str) -> None:
    delta = torch.stack([torch.full((1, 2, 2), 0.01), torch.full((1, 2, 2), 5.0)])
    found = Ball(norm, 0.1).project(delta)
    assert found[0].equal(delta[0]) and float(found[1].max()) == pytest.approx(0.1)


def test_a_step_without_a_gradient_is_none() -> None:
    for norm in NORMS:
        zero = torch.zeros(1, 1, 2, 2)
        assert Ball(norm, 0.1).ascended(zero, zero, 0.5).equal(zero)


def test_pixels_stay_pixels_and_noise_stays_where_it_was() -> None:
    raw = torch.tensor([0.0, 0.5, 0.95, -0.2, 1.3])
    torch.testing.assert_close(added(raw, torch.tensor(0.1)),
                               torch.tensor([0.1, 0.6, 1.0, -0.1, 1.3]))  # fmt: skip
    torch.testing.assert_close(added(raw, torch.tensor(-0.1)),
                               torch.tensor([0.0, 0.4, 0.85, -0.2, 1.2]))  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_ascent_reaches_the_edge_where_a_linear_gain_is_largest(norm: str) -> None:
    slope = torch.tensor([[[[3.0, -4.0], [0.0, 1.0]]]])
    ball = Ball(norm, 0.2)
    found = ascend(lambda delta, step: (delta * slope).sum(), torch.zeros(1, 1, 2, 2), ball, 60)
    best = {"linf": 0.2 * slope.sign(), "l2": 0.2 * slope / slope.square().mean().sqrt()}[norm]
    torch.testing.assert_close(found, best, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_a_share_of_the_radius_whatever_the_gradients_size(norm: str) -> None:
    ball, zero = Ball(norm, 0.2), torch.zeros(2, 1, 2, 2)
    one = torch.tensor([[[3.0, -4.0], [2.0, 1.0]]])
    slope = torch.stack([1e-3 * one, 1e3 * one])
    found = ball.ascended(zero, slope, 0.25)
    torch.testing.assert_close(ball.size(found), torch.full((2,), 0.05))
    torch.testing.assert_close(found[0], found[1])
    assert float((found * slope).sum()) > 0


def test_ascent_begins_in_the_ball_by_steps_that_fall_to_nothing() -> None:
    ball, seen = Ball("linf", 0.4), []

    def gain(delta: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(delta.detach().clone())
        return delta.sum()

    seen.append(ascend(gain, torch.full((1, 1, 1, 1), -9.0), ball, 4, rate=0.5))
    assert [round(float(x), 6) for x in seen] == [-0.4, -0.2, -0.05, 0.05, 0.1]

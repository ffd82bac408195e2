"""The descent of learned methods: deterministic, resumable, and it keeps the best state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.errors import NumericError
from fusewright.methods.learned.fitter import Fitter


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([2.0, -1.0]))


def towards_zero(point: Point):
    def step(number: int):
        loss = point.at.square().sum()
        loss.backward()
        return {"a": float(loss.detach())}

    return step


def test_it_is_adam() -> None:
    point, other = Point(), Point()
    fit = Fitter(20, 0.1).run(point, towards_zero(point))
    adam = torch.optim.Adam(other.parameters(), lr=0.1)
    for _ in range(20):
        adam.zero_grad()
        other.at.square().sum().backward()
        adam.step()
    assert point.at.equal(other.at)
    assert len(fit.losses) == 20 and fit.losses[0] == 5.0 and fit.kept == 20


def test_the_cosine_schedule_ends_where_it_stands() -> None:
    point = Point()
    moved = []

    def step(number: int):
        moved.append(point.at.detach().clone())
        return towards_zero(point)(number)

    Fitter(100, 0.01, schedule="cosine").run(point, step)
    first, last = (moved[1] - moved[0]).abs().max(), (moved[-1] - moved[-2]).abs().max()
    assert first == pytest.approx(0.01, rel=1e-3) and last < 1e-4


def test_the_best_state_is_kept() -> None:
    point = Point()

    def score() -> float:  # best near 1.5
        return -abs(float(point.at[0].detach()) - 1.5)

    fit = Fitter(60, 0.05, every=5, score=score).run(point, towards_zero(point))
    steps, scores = zip(*fit.scores, strict=True)
    assert steps == tuple(range(0, 61, 5))
    assert fit.kept == steps[scores.index(max(scores))] not in (0, 60)
    assert score() == max(scores)


def test_a_start_that_is_never_bettered_stays() -> None:
    point = Point()
    fit = Fitter(10, 0.1, every=2, score=lambda: float(point.at[0].detach())).run(
        point, towards_zero(point)
    )
    assert fit.kept == 0 and point.at.tolist() == [2.0, -1.0]


def test_a_loss_that_is_no_number_leaves_the_best_state() -> None:
    point = Point()

    def step(number: int):
        losses = towards_zero(point)(number)
        return {"a": losses["a"], "b": float("nan") if number == 7 else 0.0}

    fitter = Fitter(20, 0.1, every=5, score=lambda: -float(point.at[0].detach()))
    with pytest.raises(NumericError, match=r"b[\s\S]*step 7|step 7[\s\S]*b"):
        fitter.run(point, step)
    other = Point()
    Fitter(5, 0.1).run(other, towards_zero(other))
    assert point.at.equal(other.at)


def test_a_killed_fit_goes_on_to_the_same_end(tmp_path) -> None:
    whole, point = Point(), Point()
    Fitter(30, 0.1).run(whole, towards_zero(whole))

    def dies(number: int):
        if number == 17:
            raise KeyboardInterrupt
        return towards_zero(point)(number)

    fitter = Fitter(30, 0.1, every=5, checkpoint=tmp_path / "fit")
    with pytest.raises(KeyboardInterrupt):
        fitter.run(point, dies)
    again = Point()
    seen = []
    step = towards_zero(again)
    fit = fitter.run(again, lambda number: seen.append(number) or step(number))
    assert again.at.equal(whole.at) and seen == list(range(15, 30)) and len(fit.losses) == 30

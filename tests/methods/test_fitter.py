"""The descent of learned methods: deterministic, resumable, and it keeps the best state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusewright.errors import FusewrightWarning, MemoryShortage, NumericError
from fusewright.methods.learned import fitter as room
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


def spoilt(point: Point, at: int):
    def step(number: int):
        losses = towards_zero(point)(number)
        return {"a": losses["a"], "b": float("nan") if number == at else 0.0}

    return step


def test_a_loss_that_is_no_number_ends_the_fit_with_the_best_state(tmp_path) -> None:
    point = Point()
    fitter = Fitter(20, 0.1, every=5, score=lambda: -float(point.at[0].detach()))
    with pytest.warns(FusewrightWarning, match=r"\(step 7: {'b': nan}\)[\s\S]*of step 5, is kept"):
        fit = fitter.run(point, spoilt(point, 7))
    other = Point()
    Fitter(5, 0.1).run(other, towards_zero(other))
    assert point.at.equal(other.at)
    assert (fit.stopped, fit.kept, len(fit.losses)) == (7, 5, 7)
    assert [at for at, _ in fit.scores] == [0, 5]


@pytest.mark.parametrize("score", [None, lambda: 1.0])
def test_it_is_an_error_where_no_state_was_found_good(score) -> None:
    point, scored = Point(), score is not None
    with pytest.raises(NumericError, match=r"step 4[\s\S]*'b'[\s\S]*fewer steps: 4 went well; !"):
        Fitter(20, 0.1, every=5, score=score, advice="; !").run(point, spoilt(point, 4))
    assert (point.at.tolist() == [2.0, -1.0]) == scored
    with pytest.raises(NumericError, match="first inputs"):
        Fitter(20, 0.1, every=5).run(Point(), spoilt(Point(), 0))


def test_a_gradient_that_is_no_number_spoils_nothing() -> None:
    point = Point()

    def step(number: int):
        losses = towards_zero(point)(number)
        if number == 3:
            point.at.grad[1] = float("inf")
        return losses

    with pytest.raises(NumericError, match=r"gradient[\s\S]*step 3[\s\S]*at"):
        Fitter(9, 0.1).run(point, step)
    other = Point()
    Fitter(3, 0.1).run(other, towards_zero(other))
    assert point.at.equal(other.at)


def test_a_score_that_is_no_number_is_not_the_best() -> None:
    point, scores = Point(), iter([1.0, 2.0, float("nan")])
    fitter = Fitter(9, 0.1, every=3, score=lambda: next(scores))
    with pytest.warns(FusewrightWarning, match="the score"):
        fit = fitter.run(point, towards_zero(point))
    assert (fit.kept, fit.stopped) == (3, 6)
    with pytest.raises(NumericError, match="the score"):
        Fitter(9, 0.1, score=lambda: float("nan")).run(Point(), towards_zero(Point()))


def test_the_last_state_is_looked_at_where_another_is_kept() -> None:
    point, other = Point(), Point()
    how = {"every": 2, "ending": point.at.tolist}
    worse, better = (lambda sign=sign: sign * float(point.at[0].detach()) for sign in (1, -1))
    fit = Fitter(6, 0.1, score=worse, **how).run(point, towards_zero(point))
    Fitter(6, 0.1).run(other, towards_zero(other))
    assert fit.ended == other.at.tolist() and point.at.tolist() == [2.0, -1.0]
    assert Fitter(6, 0.1, score=better, **how).run(point, towards_zero(point)).ended is None
    assert Fitter(6, 0.1, **how).run(point, towards_zero(point)).ended is None


def test_half_a_step_is_not_saved(tmp_path) -> None:
    point, again, calls = Point(), Point(), []

    def constrain() -> None:
        calls.append(0)
        if len(calls) == 7:
            raise MemoryError

    how = {"every": 5, "checkpoint": tmp_path / "fit"}
    with pytest.raises(MemoryShortage):
        Fitter(9, 0.1, constrain=constrain, **how).run(point, towards_zero(point))
    seen, step = [], towards_zero(again)
    Fitter(9, 0.1, constrain=constrain, **how).run(again, lambda n: seen.append(n) or step(n))
    other = Point()
    Fitter(9, 0.1).run(other, towards_zero(other))
    assert seen == [5, 6, 7, 8] and again.at.equal(other.at)


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


def test_the_rate_falls_along_the_cosine_to_its_floor() -> None:
    point, moved = Point(), []

    def step(number: int):
        moved.append(point.at.detach().clone())
        point.at.sum().backward()  # Adam then moves by the rate
        return {"a": 0.0}

    Fitter(8, 0.01, schedule="cosine", floor=0.2).run(point, step)
    moved.append(point.at.detach())
    for number in range(8):
        share = 0.2 + 0.8 * (1 + math.cos(math.pi * number / 8)) / 2
        assert float((moved[number] - moved[number + 1])[0]) == pytest.approx(
            0.01 * share, rel=1e-3
        )


def test_of_equal_scores_the_first_is_kept_and_none_is_forgotten() -> None:
    scores = iter([0.0, 2.0, 1.0, 1.5, 2.0])
    point = Point()
    fit = Fitter(8, 0.1, every=2, score=lambda: next(scores)).run(point, towards_zero(point))
    other = Point()
    Fitter(2, 0.1).run(other, towards_zero(other))
    assert fit.kept == 2 and point.at.equal(other.at)


def test_constraints_hold_after_each_step_and_progress_is_of_that_step() -> None:
    point, told = Point(), []

    def constrain() -> None:
        with torch.no_grad():
            point.at.clamp_(min=-0.5)

    def step(number: int):
        assert number == 0 or float(point.at.detach().min()) >= -0.5
        return {"a": towards_zero(point)(number)["a"], "b": 1.0}

    fitter = Fitter(3, 0.1, constrain=constrain, tell=lambda *now: told.append(now))
    fit = fitter.run(point, step)
    assert told == [(done + 1, 3, fit.losses[done]) for done in range(3)]
    assert fit.losses[0] == 3.0 and len(set(fit.losses)) == 3


def test_a_resumed_fit_reports_as_a_whole_one(tmp_path) -> None:
    whole, point, again = Point(), Point(), Point()

    def scored(of: Point, **where) -> Fitter:
        return Fitter(12, 0.1, every=3, score=lambda: -float(of.at.detach().norm()), **where)

    def dies(number: int):
        if number == 6:
            raise KeyboardInterrupt
        return towards_zero(point)(number)

    with pytest.raises(KeyboardInterrupt):
        scored(point, checkpoint=tmp_path / "fit").run(point, dies)
    fit = scored(again, checkpoint=tmp_path / "fit").run(again, towards_zero(again))
    assert fit == scored(whole).run(whole, towards_zero(whole))
    assert [at for at, _ in fit.scores] == [0, 3, 6, 9, 12] and len(fit.tasks["a"]) == 12


def test_long_steps_are_saved_between_scores(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SAVED_EVERY", 0.0)
    point, again, seen = Point(), Point(), []

    def dies(number: int):
        if number == 7:
            raise KeyboardInterrupt
        return towards_zero(point)(number)

    fitter = Fitter(9, 0.1, every=100, checkpoint=tmp_path / "fit")
    with pytest.raises(KeyboardInterrupt):
        fitter.run(point, dies)
    step = towards_zero(again)
    fitter.run(again, lambda number: seen.append(number) or step(number))
    assert seen == [7, 8]


@pytest.mark.parametrize("how", ["python", "torch"])
def test_memory_that_runs_out_loses_nothing(how: str, tmp_path) -> None:
    file = tmp_path / "fit.pt"

    def short(number: int):
        if number == 7:
            if how == "python":
                raise MemoryError
            torch.empty(2**60, dtype=torch.uint8)
        return towards_zero(point)(number)

    point = Point()
    with pytest.raises(MemoryShortage, match="goes on at step 7"):
        Fitter(20, 0.1, checkpoint=file).run(point, short)
    stopped, again = point.at.detach().clone(), Point()
    fit = Fitter(20, 0.1, checkpoint=file).run(again, towards_zero(again))
    whole = Point()
    Fitter(20, 0.1).run(whole, towards_zero(whole))
    assert len(fit.losses) == 20 and again.at.equal(whole.at) and not stopped.equal(whole.at)
    with pytest.raises(MemoryShortage, match="smaller batch"):
        Fitter(20, 0.1).run(Point(), short)


def test_what_a_step_drew_and_wrote_before_memory_ran_out_is_taken_back(tmp_path) -> None:
    class Noisy(Point):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(()))

    def step_of(noisy: Noisy, short: int | None = None):
        def step(number: int):
            noisy.sum += torch.rand(())
            if number == short:
                raise MemoryError
            loss = (noisy.at * noisy.sum).square().sum()
            loss.backward()
            return {"a": float(loss.detach())}

        return step

    whole, stopped, again = Noisy(), Noisy(), Noisy()
    torch.manual_seed(0)
    Fitter(9, 0.1).run(whole, step_of(whole))
    fitter = Fitter(9, 0.1, checkpoint=tmp_path / "fit")
    with pytest.raises(MemoryShortage):
        fitter.run(stopped, step_of(stopped, 6))
    fitter.run(again, step_of(again))
    assert again.at.equal(whole.at) and again.sum.equal(whole.sum)


def test_other_errors_of_a_step_are_not_taken_for_a_shortage() -> None:
    def wrong(number: int):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Fitter(2, 0.1).run(Point(), wrong)

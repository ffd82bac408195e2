"""Intervals cover what they promise, and pairing takes away what is shared."""

from __future__ import annotations

import numpy as np
import pytest

from fusewright.bench.statistics import (
    bootstrap,
    mean_interval,
    normalised_interval,
    over_all,
    paired_difference,
    paired_normalised_difference,
)


def draws(rate: float, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < rate


def test_the_value_is_the_plain_mean():
    outcomes = draws(0.7, (3, 2, 50), 0)
    found = mean_interval(outcomes)
    assert found.value == pytest.approx(outcomes.mean())
    assert found.low < found.value < found.high


def test_95_percent_intervals_cover_the_truth_about_95_percent_of_the_time():
    covered = []
    for trial in range(300):
        found = mean_interval(draws(0.8, (150,), trial), resamples=500, seed=trial)
        covered.append(found.low <= 0.8 <= found.high)
    # 300 trials at 0.95: a standard error of 1.3 points; the percentile bootstrap is a little short
    assert 0.91 <= np.mean(covered) <= 0.985


def test_intervals_of_a_difference_cover_the_truth():
    covered = []
    for trial in range(300):
        rng = np.random.default_rng(trial)
        hard = rng.random(150) < 0.3
        ours = ~hard | (rng.random(150) < 0.5)      # 0.85
        theirs = ~hard & (rng.random(150) < 0.9)    # 0.63
        found = paired_difference(ours, theirs, resamples=500, seed=trial)
        covered.append(found.low <= 0.22 <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_a_lower_level_gives_a_narrower_interval():
    outcomes = draws(0.6, (200,), 1)
    wide, narrow = mean_interval(outcomes), mean_interval(outcomes, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_repeating_an_item_under_many_seeds_does_not_pretend_to_more_items():
    once = draws(0.7, (1, 100), 2)
    thrice = np.repeat(once, 3, axis=0)
    assert mean_interval(once).low == pytest.approx(mean_interval(thrice).low)
    assert mean_interval(once).high == pytest.approx(mean_interval(thrice).high)


def test_pairing_removes_what_both_share():
    theirs = draws(0.6, (400,), 3)
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:12]] = True
    paired = paired_difference(ours, theirs)
    alone = mean_interval(ours)
    assert paired.value == pytest.approx(0.03)
    assert paired.excludes_zero
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_a_difference_of_nothing_is_exactly_nothing():
    outcomes = draws(0.6, (2, 100), 4)
    found = paired_difference(outcomes, outcomes)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero


def test_normalised_accuracy_weighs_tasks_alike():
    reference = np.ones((1, 2, 100), bool)
    reference[0, 1, 50:] = False                    # experts: 1.0 and 0.5
    ours = reference.copy()
    ours[0, 0, 80:] = False                         # 0.8 of the first, all of the second
    assert normalised_interval(ours, reference).value == pytest.approx(0.9)
    assert normalised_interval(reference, reference).low == pytest.approx(1)
    gain = paired_normalised_difference(reference, ours, reference)
    assert gain.value == pytest.approx(0.1)


def test_a_reference_that_is_never_right_has_no_ratio():
    nothing = np.zeros((1, 1, 10), bool)
    assert np.isnan(normalised_interval(nothing, nothing).value)


def test_the_same_seed_gives_the_same_interval_and_another_another():
    outcomes = draws(0.6, (100,), 5)
    assert mean_interval(outcomes, seed=1) == mean_interval(outcomes, seed=1)
    assert mean_interval(outcomes, seed=1) != mean_interval(outcomes, seed=2)


@pytest.mark.parametrize("shapes", [((10,), (11,)), ((0,), (0,))])
def test_items_must_be_shared_and_exist(shapes):
    with pytest.raises(ValueError, match="share their items"):
        bootstrap(lambda a, b: over_all(a - b), *(np.zeros(shape) for shape in shapes))

"""Rows are compared on the same items of the same pools, and only then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.synthetic_results import TASKS, cell, results
from fusewright.bench.comparison import Samples, adjusted, compare, difference, pool, seen
from fusewright.bench.results import Results
from fusewright.bench.statistics import (
    calibration_error,
    effective,
    holm,
    mcnemar,
    normal_interval,
    paired_tasks_difference,
    percentiles,
    resampled,
    with_disagreements,
    with_successes,
)
from fusewright.errors import FusewrightError
from fusewright.tasks.outcomes import Outcomes

pytest.importorskip("scipy")


def test_resamples_hold_the_weighted_mean_first_and_spread_as_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    scores, weight = rng.random((2, 300)), np.ones(300)
    found = resampled(scores, weight, resamples=4000)
    assert found.shape == (2, 4001)
    assert found[:, 0] == pytest.approx(scores.mean(axis=1))
    error = scores.std(axis=1, ddof=1) / np.sqrt(300)
    assert found[:, 1:].std(axis=1) == pytest.approx(error, rel=0.05)


def test_weights_count_in_the_estimate_and_in_every_resample() -> None:
    scores, weight = np.array([[1.0, 0.0, 0.0]]), np.array([4.0, 1.0, 1.0])
    found = resampled(scores, weight, resamples=50)
    assert found[0, 0] == pytest.approx(4 / 6)
    assert set(found[0, 1:].round(6)) == {0.0, 0.8, 1.0}  # two of the three are drawn
    assert effective(np.array([1.0, 1.0, 0.0])) == 2


def test_models_of_a_task_share_their_resamples_and_tasks_do_not() -> None:
    scores = np.random.default_rng(0).random((1, 100))
    one, same, other = (resampled(scores, np.ones(100), stratum=s) for s in ("a", "a", "b"))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_one_item_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two items"):
        resampled(np.ones((1, 1)), np.ones(1))


def test_all_right_is_not_certainty() -> None:
    means = resampled(np.ones((1, 50)), np.ones(50))
    assert percentiles(means[0]).low == 1
    found = percentiles(with_successes(means, [50])[0])
    assert found.value == 1 and 0.85 < found.low < 0.99


def test_no_disagreement_is_not_equality() -> None:
    same = with_disagreements(resampled(np.zeros((1, 50)), np.ones(50)), [50])
    found, p = normal_interval(same[0])
    assert found.value == 0 and found.low < 0 < found.high and p > 0.5


def test_what_has_no_number_is_not_told_apart() -> None:
    assert normal_interval(np.array([0.1, np.nan, 0.2, 0.3]))[1] == 1


def test_the_interval_and_its_p_value_agree() -> None:
    rng = np.random.default_rng(3)
    for shift in np.linspace(-3, 3, 25):
        found, p = normal_interval(np.append(shift, rng.standard_normal(500) + shift))
        assert found.excludes_zero == (p < 0.05)


def test_differences_over_tasks_weigh_tasks_alike() -> None:
    ours = [np.ones(400), np.zeros(100)]
    theirs = [np.zeros(400), np.zeros(100)]
    assert paired_tasks_difference(ours, theirs).value == 0.5
    with pytest.raises(ValueError, match="share their items"):
        paired_tasks_difference([np.ones(3)], [np.ones(4)])


def test_mcnemar_counts_items_that_only_one_got_right() -> None:
    from scipy.stats import binomtest

    gains = np.array([1] * 9 + [-1] * 2 + [0] * 30)
    found = mcnemar(gains)
    assert (found.ours, found.theirs) == (9, 2)
    assert found.p == pytest.approx(binomtest(9, 11).pvalue)
    assert mcnemar(np.zeros(5)).p == 1


def test_holm_on_a_known_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_a_p_value_nor_changes_their_order(p: list[float]) -> None:
    found = holm(p)
    assert all(a >= b and a <= 1 for a, b in zip(found, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.asarray(found)[order]) >= 0)


def test_calibration_error_of_a_model_as_sure_as_it_is_right() -> None:
    right = np.tile([1, 1, 1, 0], 100)
    assert calibration_error(np.full(400, 0.75), right) == pytest.approx(0)
    assert calibration_error(np.full(400, 0.95), right) == pytest.approx(0.2)


def test_calibration_error_bins_by_equal_width() -> None:
    sure, right = np.array([0.70, 0.99, 0.50]), np.array([1, 1, 0])
    assert calibration_error(sure, right) == pytest.approx((0.3 + 0.01 + 0.5) / 3)
    assert calibration_error(sure, right, bins=1) == pytest.approx(abs(2 - 2.19) / 3)


def test_calibration_error_has_fifteen_bins() -> None:
    sure, right = np.array([0.93, 0.94]), np.array([0, 1])  # on either side of 14 / 15
    assert calibration_error(sure, right) == pytest.approx((0.93 + 0.06) / 2)


def test_what_is_told_apart_is_so_after_correction() -> None:
    (one,) = compare(results({"ties": 0.8}), results({"ties": 0.7}))
    each = adjusted([replace(one, p=0.03), replace(one, p=0.04)])
    assert [d.adjusted for d in each] == pytest.approx([0.06, 0.06])
    assert not any(d.told_apart() for d in each) and each[0].told_apart(0.9)


def test_a_subset_is_another_pool_and_judged_by_its_own_tasks() -> None:
    part, base = cell("ties", 0.7, experts=("mnist", "dtd")), cell("base", 0.5, experts=())
    found = results({}, more=[part, base])
    assert pool(part, found)[2] == ("dtd", "mnist") and pool(base, found)[2] == ()
    assert seen(part, found) == ("mnist", "dtd") and seen(base, found) == tuple(TASKS)
    alone = cell("expert dtd", 0.5, experts=("dtd",), requirement="expert")
    assert pool(alone, found)[2] == ()


def test_a_better_run_is_told_from_a_worse_and_equal_ones_are_not() -> None:
    before = results({"own expert": 0.93, "ties": 0.70, "average": 0.60})
    after = results({"own expert": 0.93, "ties": 0.80, "average": 0.60})
    found = {one.ours: one for one in compare(after, before)}
    assert found["ties"].told_apart() and found["ties"].value.low > 5
    assert not found["average"].told_apart() and found["average"].value.value == 0
    assert found["ties"].measure == "normalised" and found["ties"].pools == 3
    assert found["ties"].all_items.ours == sum(m.ours for m in found["ties"].items.values()) > 0


def test_without_experts_mean_scores_are_compared_in_points() -> None:
    found, = compare(results({"ties": 0.8}), results({"ties": 0.7}))
    each = [one.value for one in found.tasks.values()]
    assert found.measure == "mean" and found.value.value == pytest.approx(np.mean(each))
    assert 5 < found.value.value < 20


def test_only_pools_that_both_have_are_compared() -> None:
    found = compare(results(seeds=(0, 1)), results(seeds=(1, 2)))
    assert {one.pools for one in found} == {1}


def test_swapping_the_two_turns_the_sign() -> None:
    a, b = results({"ties": 0.8}), results({"ties": 0.7})
    (one,), (other,) = compare(a, b), compare(b, a)
    assert one.value.value == -other.value.value
    assert one.value.low == pytest.approx(-other.value.high, abs=0.2)
    assert one.all_items.ours == other.all_items.theirs


def likelihoods(shift: float) -> Results:
    scores = np.random.default_rng(0).normal(-2, 0.3, 80)
    made = [
        replace(cell(row, 0.5), outcomes={
            "mnist": {"clean": Outcomes("log_likelihood", scores + more, np.arange(1.0, 81))}})
        for row, more in (("own expert", 0.0), ("ties", shift))
    ]  # fmt: skip
    return results({}, more=made, merged=("mnist",), unseen=())


def test_log_likelihoods_are_normalised_by_ratios_of_perplexities() -> None:
    found = {d.ours: d for d in compare(likelihoods(-0.1), likelihoods(-0.2))}["ties"]
    assert found.value.value == pytest.approx(100 * (np.exp(-0.1) - np.exp(-0.2)))
    assert found.tasks["mnist"].value == pytest.approx(0.1)


def changed(found: Results, **columns: Any) -> Results:
    """The same with other columns of one task."""
    cells = []
    for one in found.cells:
        other = replace(one.outcomes["dtd"]["clean"], **columns)
        cells.append(replace(one, outcomes={**one.outcomes, "dtd": {"clean": other}}))
    return replace(found, cells=tuple(cells))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"columns": {"label": np.arange(200)}}, "labels are not the same"),
        ({"weight": np.arange(200.0)}, "weights are not the same"),
        ({"metric": "exact_match"}, "metrics differ"),
        ({"score": np.ones(7), "weight": np.ones(7), "columns": {}}, "numbers of items differ"),
    ],
)
def test_other_items_are_refused(columns: dict[str, Any], problem: str) -> None:
    first = results({"ties": 0.7})
    with pytest.raises(FusewrightError, match=problem) as refused:
        compare(changed(first, **columns), first)
    assert "dtd" in str(refused.value) and "fix:" in str(refused.value)


def test_other_suites_and_strangers_are_refused() -> None:
    first = results({"ties": 0.7})
    with pytest.raises(FusewrightError, match="different suites"):
        compare(first, replace(first, suite="other"))
    with pytest.raises(FusewrightError, match="nothing to compare"):
        compare(first, results({"average": 0.7}))


def test_too_few_items_are_refused_by_task() -> None:
    one = changed(results({"ties": 0.7}), score=np.ones(1), weight=np.ones(1), columns={})
    with pytest.raises(FusewrightError, match="too few items") as refused:
        compare(one, one)
    assert "dtd" in str(refused.value)


def test_tasks_about_the_same_items_are_resampled_together() -> None:
    scores = np.random.default_rng(0).random(100).round()
    both = {t: {"clean": Outcomes("accuracy", scores, np.ones(100))} for t in ("mnist", "dtd")}
    made = [replace(cell(row, 0.5), outcomes=both) for row in ("a", "b")]
    apart = results({}, more=made)
    together = replace(apart, facts={"items": {"mnist": "images", "dtd": "images"}})
    a, b = made
    for found, same in ((apart, False), (together, True)):
        samples = Samples(found)
        assert np.array_equal(samples(a, "mnist"), samples(a, "dtd")) is same
    assert difference([(a, b)], ["mnist", "dtd"], Samples(together)).value.value == 0


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    pytest.importorskip("pyarrow")
    from fusewright.bench.sweep.store import Store, save_results

    found = []
    for name, rate in (("before", 0.70), ("after", 0.80)):
        made = results({"own expert": 0.93, "average": 0.6, "ties": rate}, seeds=(0,))
        store, keys = Store(tmp_path / name), []
        store.lock().release()
        for number, one in enumerate(made.cells):
            store.save(f"{number}", one)
            keys.append(f"{number}")
        save_results(tmp_path / name, made, keys)
        found.append(str(tmp_path / name))
    return found


def command(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from fusewright.cli.app import app

    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_command_shows_what_differs(folders: list[str]) -> None:
    shown = command(*folders, "--tasks")
    assert shown.exit_code == 0, shown.output
    lines = {line.split("  ")[0]: line for line in shown.stdout.splitlines()}
    assert lines["average"].endswith("not told apart") and lines["ties"].endswith("  differs")
    assert "eurosat" in lines


def test_the_command_gives_every_number_as_json(folders: list[str]) -> None:
    told = {row["row"]: row for row in json.loads(command(*folders, "--json").stdout)["rows"]}
    assert told["ties"]["differs"] and told["ties"]["value"]["low"] > 0
    assert not told["average"]["differs"]
    back = {row["row"]: row for row in
            json.loads(command(*reversed(folders), "--json").stdout)["rows"]}  # fmt: skip
    assert back["ties"]["value"]["value"] < 0
    assert told["ties"]["items"]["dtd"]["ours"] == back["ties"]["items"]["dtd"]["theirs"]


def test_the_command_says_where_results_are_missing(folders: list[str], tmp_path: Path) -> None:
    failed = command(folders[0], str(tmp_path / "nothing"))
    assert failed.exit_code == 1 and "holds no results" in failed.stderr


def test_rows_of_other_variants_and_subsets_are_told_apart() -> None:
    from fusewright.cli.compare import _rows

    def measured(rate: float) -> Results:
        lora = [cell("ties", rate + 0.1, axes={"tuning": "LoRA"})]
        few = [cell("ties", rate - 0.1, experts=("mnist", "dtd"))]
        return results({"ties": rate}, seeds=(0,), more=[*lora, *few])

    found = compare(measured(0.7), measured(0.6))
    assert [(one.pools, dict(one.axes), len(one.tasks)) for one in found] == [
        (1, {}, 3), (1, {"tuning": "LoRA"}, 3), (1, {}, 2)]  # fmt: skip
    assert [row[0] for row in _rows(found, 0.95).rows] == [
        "ties", "ties, tuning LoRA", "ties, merging mnist, dtd"]  # fmt: skip

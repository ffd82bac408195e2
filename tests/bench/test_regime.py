"""The regime of a pool: what is measured, on models of two numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fusewright.bench.regime import SCALES, Regime, TaskRegime, check, spearman  # noqa: E402
from fusewright.tasks.outcomes import Outcomes  # noqa: E402

BASE = {"w": torch.tensor([3.0, 4.0]), "steps": torch.tensor(7)}
EXPERTS = {
    "a": {"w": torch.tensor([4.0, 4.0]), "steps": torch.tensor(8)},
    "b": {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)},
}


def outcomes(score, **columns):
    found = {name: np.full(2, value) for name, value in columns.items()}
    return Outcomes("accuracy", np.full(2, float(score)), np.ones(2), found)


def first_weight(state, task):
    """A score that shows which weights were evaluated."""
    return outcomes(state["w"][0 if task == "a" else 1])


def test_scores_are_of_the_base_the_average_and_each_tasks_own_expert():
    found = check(BASE, EXPERTS, first_weight)
    assert (found.tasks["a"].base, found.tasks["a"].average, found.tasks["a"].expert) == (3, 3.5, 4)
    assert (found.tasks["b"].base, found.tasks["b"].average, found.tasks["b"].expert) == (4, 5, 6)
    assert (found.gap, found.gain, found.room) == (1.5, 0.75, 0.75)


def log_likelihood(state, task):
    """Base, average and expert of the task "a" have the perplexities 8, 4 and 2."""
    at = float(state["w"][0] - 3)
    return Outcomes("log_likelihood", np.full(2, (2 * at - 3) * np.log(2)), np.ones(2))


def test_log_likelihoods_are_shares_of_the_experts_perplexity():
    found = check(BASE, EXPERTS, log_likelihood, unseen=["c"])
    task = found.tasks["a"]
    assert (task.base, task.average, task.expert) == pytest.approx((0.25, 0.5, 1))
    assert task.shown == pytest.approx((8, 4, 2)) and task.shown_in == "perplexity"
    assert found.unseen["c"] == pytest.approx((1, 2))
    assert "8.00, 4.00, 2.00" in found.table()


def test_a_language_suite_is_judged_as_any_other():
    found = check(BASE, {"a": EXPERTS["a"]}, log_likelihood)
    assert found.gap == pytest.approx(0.75)
    assert any("averaging is only 0.000 below" in doubt for doubt in found.doubts())


def test_unseen_tasks_have_the_base_and_the_average():
    assert check(BASE, EXPERTS, first_weight, unseen=["c"]).unseen == {"c": (4.0, 5.0)}


def test_norms_are_relative_and_orthogonal_steps_have_cosine_zero():
    found = check(BASE, EXPERTS, first_weight)
    assert found.tasks["a"].norm == pytest.approx(1 / 5)
    assert found.tasks["b"].norm == pytest.approx(2 / 5)
    assert found.cosines == {("a", "b"): 0.0}


def test_opposite_steps_have_cosine_minus_one():
    experts = {"a": {"w": BASE["w"] + 1}, "b": {"w": BASE["w"] - 2}}
    assert check({"w": BASE["w"]}, experts, first_weight).cosines["a", "b"] == pytest.approx(-1)


def test_integers_are_the_bases_and_nothing_given_is_changed():
    seen = []
    check(BASE, EXPERTS, lambda s, task: seen.append(int(s["steps"])) or outcomes(0))
    assert set(seen) == {7}
    assert BASE["w"].tolist() == [3, 4]
    assert EXPERTS["a"]["w"].tolist() == [4, 4]


def test_tied_tensors_count_once():
    def more(state, at):
        return {**state, "v": torch.full((2,), at)}

    def tied(state):
        return {**state, "again": state["v"]}

    base, experts = more(BASE, 1.0), {"a": more(EXPERTS["a"], 2.0), "b": more(EXPERTS["b"], 3.0)}
    plain = check(base, experts, first_weight)
    found = check(tied(base), {n: tied(e) for n, e in experts.items()}, first_weight)
    assert found.cosines == plain.cosines
    assert [t.norm for t in found.tasks.values()] == [t.norm for t in plain.tasks.values()]


def test_running_statistics_are_the_experts_mean_at_every_scale_and_no_weights():
    """Their sum would be a negative variance."""
    def narrowed(state, at):
        return {**state, "bn.running_var": torch.full((2,), at)}

    base = narrowed(BASE, 1.0)
    experts = {name: narrowed(EXPERTS[name], at) for name, at in (("a", 0.2), ("b", 0.4))}
    seen = []

    def evaluate(state, task):
        seen.append((float(state["w"][0]), round(float(state["bn.running_var"][0]), 6)))
        return first_weight(state, task)

    found, plain = check(base, experts, evaluate), check(BASE, EXPERTS, first_weight)
    assert found.cosines == plain.cosines
    assert [t.norm for t in found.tasks.values()] == [t.norm for t in plain.tasks.values()]
    assert min(variance for _, variance in seen) == 0.2
    for scale in SCALES:
        assert (round(3 + scale, 6), 0.3) in [(round(w, 6), v) for w, v in seen]


@pytest.mark.parametrize(("hill", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_a_barrier_is_the_excess_over_the_straight_line(hill, expected):
    def evaluate(state, task):
        at = float(state["w"][0] - 3)  # 0 at the base, 1 at the expert
        return outcomes(0, loss=2 - at + 4 * hill * at * (1 - at), entropy=0)

    found = check(BASE, {"a": EXPERTS["a"]}, evaluate)
    assert found.tasks["a"].barrier == pytest.approx(expected)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, -1.0)])
def test_entropy_is_ranked_against_loss_along_the_scales(sign, expected):
    def evaluate(state, task):
        at = float(state["w"][0] - 3)
        return outcomes(0, loss=(at - 0.35) ** 2, entropy=sign * (at - 0.35) ** 2)

    found = check(BASE, {"a": EXPERTS["a"]}, evaluate).tasks["a"]
    assert found.rank == pytest.approx(expected)
    assert found.loss == pytest.approx([(s - 0.35) ** 2 for s in SCALES], abs=1e-6)


def test_scales_move_by_the_sum_of_all_steps():
    seen = []
    check(BASE, EXPERTS, lambda s, task: seen.append(s["w"].tolist()) or outcomes(0), scales=[2.0])
    assert [5.0, 8.0] in seen


def test_outcomes_without_loss_leave_barrier_and_rank_unknown():
    found = check(BASE, EXPERTS, first_weight)
    assert found.tasks["a"].barrier is None
    assert found.tasks["a"].rank is None
    assert np.isnan(found.mean("rank"))
    assert "-" in found.table()


def test_experts_that_are_the_base_have_no_gap():
    found = check(BASE, {"a": BASE, "b": BASE}, first_weight)
    assert (found.gap, found.tasks["a"].norm) == (0, 0)
    assert np.isnan(found.cosines["a", "b"])


def regime(base=0.6, average=0.7, expert=0.9, rank=0.5):
    return Regime({"a": TaskRegime(base, average, expert, 0.1, 0.0, (1.0,), (1.0,), rank)}, {})


def test_a_suite_that_discriminates_raises_no_doubt():
    assert regime().doubts() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"expert": 0.8}, "experts' mean"),
        ({"base": 0.85, "average": 0.86, "expert": 0.93}, "only 0.080 below the experts, not 0.1"),
        ({"average": 0.6}, "gains nothing"),
        ({"average": 0.88}, "averaging is only"),
        ({"rank": -0.2}, "less entropy"),
        ({"rank": float("nan")}, "less entropy"),
    ],
)
def test_each_way_out_of_the_regime_is_said(changed, said):
    found = regime(**changed)
    assert len(found.doubts()) == 1
    assert said in found.doubts()[0]
    assert found.doubts()[0] in str(found)


def test_the_table_names_every_task():
    found = check(BASE, EXPERTS, first_weight, unseen=["c"])
    assert all(f"\n{name} " in found.table() for name in ("a", "b", "c", "mean"))


def test_without_experts_there_is_no_regime():
    with pytest.raises(ValueError, match="at least one expert"):
        check(BASE, {}, first_weight)


def test_an_expert_that_lacks_a_tensor_is_refused():
    with pytest.raises(KeyError, match="w"):
        check(BASE, {"a": {}}, first_weight)


def test_equal_values_share_their_rank():
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


numbers = st.lists(st.integers(-50, 50), min_size=2, max_size=8)


@given(numbers)
def test_rank_correlation_sees_only_the_order(values):
    if len(set(values)) > 1:
        assert spearman(values, [v**3 + v for v in values]) == pytest.approx(1)
        assert spearman(values, [-v for v in values]) == pytest.approx(-1)

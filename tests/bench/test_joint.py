"""Joint training: every combination trains, and gives the direction its paper says."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle, relative
from fusewright.bench.joint import COMBINATIONS, combination, train_joint
from fusewright.bench.joint.gradients import gramian
from fusewright.bench.joint.gradnorm import GradNorm
from fusewright.errors import FusewrightError, NumericError, RecipeError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.task import Batch, Split, Task

for _library in ("torchjd", "cvxpy", "clarabel", "qpsolvers", "quadprog"):
    pytest.importorskip(_library)


class Points(Split):
    def __init__(self, count: int, seed: int = 0) -> None:
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        return {"x": [self.x[n] for n in numbers]}


@dataclass(frozen=True)
class Regression(Task):
    """Targets are a linear map of the inputs."""

    direction: tuple[float, ...] = (1.0, 0.0, 0.0)

    def batches(
        self, split: Split, size: int, *, seed: int | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        draw = torch.Generator().manual_seed(seed or 0)
        for rows in torch.randperm(len(split), generator=draw).split(size):
            yield {"x": torch.stack(list(split.rows(rows.tolist())["x"])), "items": rows}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).squeeze(-1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        wanted = batch["x"] @ torch.tensor(self.direction)
        return (self.logits(model, batch) - wanted).square().mean()

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        raise NotImplementedError


TASKS = (Regression("a", (1.0, 0.5, 0.0)), Regression("b", (0.5, 1.0, 0.0)))
SPLITS = {"a": Points(50), "b": Points(33, 1)}
RECIPE: dict[str, Any] = dict(steps=60, batch_size=16, lr=0.05, seed=3)


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def total(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return sum(t.loss(model, next(t.batches(SPLITS[t.name], 33))).item() for t in TASKS)


@pytest.mark.parametrize("how", COMBINATIONS)
def test_every_combination_trains_and_leaves_the_base_alone(how: str) -> None:
    base, seen = small(), []
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = train_joint(base, TASKS, SPLITS, how=how, **RECIPE,
                        progress=lambda done, of: seen.append((done, of)))  # fmt: skip
    assert not any(part.training for part in model.modules())
    assert total(model) < 0.35 * total(base)
    assert all(torch.equal(base.state_dict()[k], v) for k, v in before.items())
    assert seen == [(n, 60) for n in range(1, 61)]


@pytest.mark.parametrize("how", ["sum", "pcgrad", "gradnorm"])
def test_training_follows_from_the_seed_alone(how: str) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(torch.seed() % 1000)  # whatever the caller did before
        recipe = RECIPE | {"seed": seed, "steps": 8}
        model = train_joint(small(), TASKS, SPLITS, how=how, **recipe)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_rates_by_size_move_each_tensor_by_the_same_share() -> None:
    base, share = small(), 0.01
    model = train_joint(base, TASKS, SPLITS, how="sum", **RECIPE | {"steps": 1, "lr": share},
                        by_size=True)  # fmt: skip
    first = OneCycle(relative([torch.ones(1)], share), 1, share)._optimiser.param_groups[0]["lr"]
    for (name, before), after in zip(base.named_parameters(), model.parameters(), strict=True):
        moved = (after - before).abs().max().item()
        size = before.square().mean().sqrt().item()
        assert moved == pytest.approx(first * size, rel=1e-2), name


def test_decay_by_size_is_for_matrices_alone() -> None:
    decays = [group["weight_decay"] for group in relative(small().parameters(), 0.1, 0.5)]
    assert decays == [0.5, 0.0, 0.5, 0.0]


def test_the_callers_random_state_is_given_back() -> None:
    state = torch.get_rng_state()
    train_joint(small(), TASKS, SPLITS, how="pcgrad", **RECIPE | {"steps": 2})
    assert torch.equal(torch.get_rng_state(), state)


def test_sum_is_plain_autograd() -> None:
    model = small().eval()
    losses = [t.loss(model, next(t.batches(SPLITS[t.name], 8))) for t in TASKS]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    combination("sum", 2).backward(losses, parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_frozen_parameters_stay() -> None:
    base = small()
    base[0].requires_grad_(False)  # type: ignore[index]
    model = train_joint(base, TASKS, SPLITS, how="upgrad", **RECIPE)
    assert torch.equal(model[0].weight, base[0].weight)  # type: ignore[index]
    assert not torch.equal(model[3].weight, base[3].weight)  # type: ignore[index]


@pytest.mark.parametrize("how", COMBINATIONS)
def test_a_parameter_that_no_task_reaches_stays_in_spite_of_weight_decay(how: str) -> None:
    base = small()
    base.spare = nn.Parameter(torch.ones(2))
    model = train_joint(base, TASKS, SPLITS, how=how, **RECIPE | {"steps": 3}, weight_decay=0.5)
    assert torch.equal(model.spare, torch.ones(2))


@pytest.mark.parametrize("how", ["sum", "pcgrad"])
def test_lower_precision_still_trains(how: str) -> None:
    base = small()
    model = train_joint(base, TASKS, SPLITS, how=how, autocast=torch.bfloat16, **RECIPE)
    assert total(model) < 0.35 * total(base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Probe:
    """A plug-in that only watches."""

    def __init__(self, tasks: int) -> None:
        self.tasks, self.losses, self.epochs = tasks, 0, []

    def parameters(self) -> list[Tensor]:
        return []

    def backward(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        assert len(losses) == self.tasks
        self.losses += 1
        sum(losses).backward()

    def end_epoch(self) -> None:
        self.epochs.append(self.losses)


@pytest.mark.parametrize(("steps", "ends"), [(60, [6, 12, 18]), (10, [2, 4, 6]), (2, [1, 2])])
def test_an_epoch_shows_as_many_items_as_all_splits_hold_or_a_fifth_of_training(
    steps: int, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Probe] = []
    monkeypatch.setitem(COMBINATIONS, "probe", lambda tasks: made.append(Probe(tasks)) or made[-1])
    train_joint(small(), TASKS, SPLITS, how="probe", **RECIPE | {"steps": steps})
    assert made[0].epochs[:3] == ends  # 83 items, 16 a step


@dataclass(frozen=True)
class Watched(Regression):
    seen: list[list[int]] = field(default_factory=list)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert model.training
        self.seen.append(batch["items"].tolist())
        return super().loss(model, batch)


def test_tasks_share_a_batch_equally_and_epochs_have_orders_of_their_own() -> None:
    tasks = (Watched("a"), Watched("b"))
    train_joint(small().eval(), tasks, {"a": Points(50), "b": Points(50)}, **RECIPE)
    whole = 6  # full batches of 8 in 50 items
    for task in tasks:
        assert {len(items) for items in task.seen} == {8}
        first, second = task.seen[:whole], task.seen[whole : 2 * whole]
        assert len({item for items in first for item in items}) == 8 * whole
        assert first[0] != second[0]
    assert tasks[0].seen[0] != tasks[1].seen[0]


def test_batches_are_augmented_by_draws_from_the_seed() -> None:
    drawn: list[float] = []

    def noisy(batch: Batch, draw: torch.Generator) -> Batch:
        noise = torch.randn(batch["x"].shape, generator=draw)
        drawn.append(noise.sum().item())
        return {**batch, "x": batch["x"] + noise}

    recipe = RECIPE | {"steps": 3}
    one, two = (train_joint(small(), TASKS, SPLITS, augment=noisy, **recipe) for _ in range(2))
    assert drawn[:6] == drawn[6:] and len(set(drawn)) == 6
    assert torch.equal(one[0].weight, two[0].weight)  # type: ignore[index]
    plain = train_joint(small(), TASKS, SPLITS, **recipe)
    assert not torch.equal(one[0].weight, plain[0].weight)  # type: ignore[index]


# --- Directions ---------------------------------------------------------------------------------

ONE, TWO = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])


def direction(how: str, *gradients: Tensor) -> Tensor:
    """The step's gradient when the losses are linear with the gradients given."""
    at = torch.zeros_like(gradients[0], requires_grad=True)
    combination(how, len(gradients)).backward([g @ at for g in gradients], [at])
    assert at.grad is not None
    return at.grad


def test_pcgrad_projects_each_gradient_off_the_other() -> None:
    """g1 - (g1·g2/|g2|²) g2 = (½, ½); g2 - (g2·g1/|g1|²) g1 = (0, 1)."""
    torch.testing.assert_close(direction("pcgrad", ONE, TWO), torch.tensor([0.5, 1.5]))


def test_upgrad_is_the_mean_of_projections_onto_the_dual_cone() -> None:
    """The same projections, averaged; TorchJD adds 1e-4 to the diagonal."""
    expected = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(direction("upgrad", ONE, TWO), expected, atol=1e-3, rtol=0)


vectors = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3).map(torch.tensor)


@settings(deadline=None, max_examples=40)
@given(vectors, vectors)
def test_mgda_is_the_shortest_vector_between_two_gradients(one: Tensor, two: Tensor) -> None:
    """γ g1 + (1 - γ) g2 with γ = (g2 - g1)·g2 / |g1 - g2|², cut to [0, 1]."""
    gap = (one - two).square().sum()
    if gap < 1e-3:
        return
    share = (((two - one) @ two) / gap).clamp(0, 1)
    expected = share * one + (1 - share) * two
    torch.testing.assert_close(direction("mgda", one, two), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_cagrad_improves_the_worst_task_most_within_its_radius(scale: float) -> None:
    """d = g0 + c|g0| g_w/|g_w|, where w minimises g_w·g0 + c|g0||g_w|: by a fine grid."""
    one, two, c = scale * torch.tensor([1.0, 0.2]), scale * torch.tensor([-0.4, 1.5]), 0.4
    mean, share = (one + two) / 2, torch.linspace(0, 1, 20001)[:, None]
    mixed = share * one + (1 - share) * two
    radius = c * mean.norm()
    best = mixed[(mixed @ mean + radius * mixed.norm(dim=1)).argmin()]
    expected = mean + radius * best / best.norm()
    found = direction("cagrad", one, two)
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-3, rtol=0)


def test_uncertainty_halves_losses_at_first_and_learns_their_variance() -> None:
    at = torch.zeros(2, requires_grad=True)
    plan = combination("uncertainty", 2)
    plan.backward([(at - 2).square().sum(), (at - 1).square().sum()], [at])
    torch.testing.assert_close(at.grad, torch.tensor([-3.0, -3.0]))  # ½ (2·-2 + 2·-1)
    (log_variance,) = plan.parameters()  # ∂/∂s of ½ e^-s L + ½ s at 0: ½ (1 - L), L = 8, 2
    torch.testing.assert_close(log_variance.grad, torch.tensor([-3.5, -0.5]))


def test_dwa_weighs_by_how_slowly_losses_fall() -> None:
    """λ = 2 softmax(w / 2) with w = L(t-1) / L(t-2), after two epochs; 1 before."""
    plan, at = combination("dwa", 2), torch.zeros(1, requires_grad=True)

    def slope(*values: float) -> Tensor:
        losses = [v + (at * (10**i)).sum() for i, v in enumerate(values)]
        at.grad = None
        plan.backward(losses, [at])
        assert at.grad is not None
        return at.grad

    torch.testing.assert_close(slope(4.0, 2.0), torch.tensor([11.0]))
    plan.end_epoch()
    torch.testing.assert_close(slope(2.0, 2.0), torch.tensor([11.0]))
    plan.end_epoch()
    first, second = (2 * torch.tensor([0.5, 1.0]).div(2).softmax(0)).tolist()
    torch.testing.assert_close(slope(1.0, 1.0), torch.tensor([first + 10 * second]))


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, [3.0, -1.0]), (2.0, [-3.0, 1.0])])
def test_gradnorm_by_hand(alpha: float, expected: list[float]) -> None:
    """Norms 3 and 1, weights 1: Ḡ = 2. Ratios 3 and 1: r = 3/2, 1/2. Targets 2 r^α are 2.4 and 1.4
    for α = ½ (G_1 = 3 above, G_2 = 1 below), 4.5 and 0.5 for α = 2 (the other way round)."""
    plan = GradNorm(2, alpha=alpha)
    slope = plan.slope(torch.tensor([3.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double())
    assert slope.tolist() == expected


def linear_losses(values: Sequence[float], slopes: Sequence[float], at: Tensor) -> list[Tensor]:
    return [v + s * at[i] for i, (v, s) in enumerate(zip(values, slopes, strict=True))]


def test_gradnorm_steps_by_its_old_weights_then_renews_them() -> None:
    plan, at = GradNorm(3, lr=0.1), torch.zeros(3, requires_grad=True)
    plan.backward(linear_losses([1, 1, 1], [3, 1, 1], at), [at])
    torch.testing.assert_close(at.grad, torch.tensor([3.0, 1.0, 1.0]))
    # At the first step all ratios are 1 and targets Ḡ = 5/3; Adam's first step is lr · sign.
    expected = torch.tensor([0.9, 1.1, 1.1]).double() * 3 / 3.1
    torch.testing.assert_close(plan.weights.detach(), expected)


def test_gradnorm_compares_losses_with_the_first_ones() -> None:
    """Like norms; the second task's loss fell to a tenth, so the first is given more weight."""
    plan, at = GradNorm(2), torch.zeros(2, requires_grad=True)
    for values in ([1.0, 10.0], [1.0, 1.0], [1.0, 1.0]):
        plan.backward(linear_losses(values, [1, 1], at), [at])
    assert plan.weights[0] > 1 > plan.weights[1]


def test_gradnorm_never_trains_backwards() -> None:
    plan, at = GradNorm(2, lr=0.5), torch.zeros(2, requires_grad=True)
    for _ in range(10):
        plan.backward(linear_losses([1, 1], [1e4, 1e-4], at), [at])
        assert (plan.weights > 0).all()
        assert plan.weights.sum().item() == pytest.approx(2)


def test_log_variances_are_learned_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], COMBINATIONS["uncertainty"]
    monkeypatch.setitem(COMBINATIONS, "watched", lambda n: made.append(make(n)) or made[-1])
    train_joint(small(), TASKS, SPLITS, how="watched", **RECIPE)
    (log_variance,) = made[0].parameters()
    assert (log_variance < -0.05).all()  # the losses end below 1


def test_inner_products_count_each_parameter_that_a_loss_reaches() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    rows = [(one, None), (one * 2, two)]
    assert gramian(rows).tolist() == [[5.0, 10.0], [10.0, 29.0]]  # type: ignore[arg-type]


# --- Refusals -----------------------------------------------------------------------------------


def test_an_unknown_combination_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'pcgrad'"):
        train_joint(small(), TASKS, SPLITS, how="pc-grad", **RECIPE)


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"steps": 0}])
def test_too_few_items_or_steps_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="batch_size"):
        train_joint(small(), TASKS, SPLITS, **RECIPE | change)


@pytest.mark.parametrize("splits", [{"a": Points(5)}, {"a": Points(5), "b": Points(0)}])
def test_a_task_without_rows_is_named(splits: dict[str, Split]) -> None:
    with pytest.raises(FusewrightError, match=r"where: +b"):
        train_joint(small(), TASKS, splits, **RECIPE)


def test_a_loss_that_explodes_is_named_by_task_and_step() -> None:
    tasks = (TASKS[0], Regression("b", (float("inf"), 0.0, 0.0)))
    with pytest.raises(NumericError, match="b, step 1"):
        train_joint(small(), tasks, SPLITS, **RECIPE)


def test_a_split_smaller_than_its_share_is_shown_whole() -> None:
    train_joint(small(), TASKS, {"a": Points(3), "b": Points(50)}, **RECIPE | {"steps": 5})


def test_a_task_without_full_batches_is_named() -> None:
    class Short(Regression):
        def batches(self, split: Split, size: int, **rest: Any) -> Iterator[Batch]:
            return super().batches(split, 1, **rest)

    with pytest.raises(FusewrightError, match="no full batch"):
        train_joint(small(), (Short("a"), TASKS[1]), SPLITS, **RECIPE)


@pytest.mark.parametrize(
    ("how", "library"),
    [("sum", "torchjd"), ("cagrad", "cvxpy"), ("cagrad", "clarabel"), ("upgrad", "quadprog")],
)
def test_a_missing_library_names_the_extra(
    how: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(FusewrightError, match=r"fusewright\[bench\]"):
        combination(how, 2)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="requires gradients"):
        train_joint(small().requires_grad_(False), TASKS, SPLITS, **RECIPE)

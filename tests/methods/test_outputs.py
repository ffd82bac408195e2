"""Output ensembles: what is averaged, that logits come back, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.errors import PlanError, RecipeError
from fusewright.methods.outputs import (
    ENSEMBLES,
    MaxEnsemble,
    SimpleEnsemble,
    WeightedEnsemble,
    combine,
)

SURE = torch.tensor([[10.0, 0.0, 0.0]])
MILD = torch.tensor([[0.0, 1.0, 0.0]])


def random_logits(seed: int, models: int = 3, shape: tuple[int, ...] = (5, 4)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(models)]


@settings(deadline=None)
@given(st.integers(0, 100))
def test_simple_is_the_mean_of_distributions(seed: int) -> None:
    logits = random_logits(seed)
    expected = torch.stack([z.softmax(-1) for z in logits]).mean(0)
    torch.testing.assert_close(combine(logits, "simple").exp(), expected)


@settings(deadline=None)
@given(st.integers(0, 100))
def test_weighted_is_the_weighted_mean_of_distributions(seed: int) -> None:
    logits = random_logits(seed)
    expected = (logits[0].softmax(-1) + 3 * logits[2].softmax(-1)) / 4
    torch.testing.assert_close(combine(logits, "weighted", [1, 0, 3]).exp(), expected)


def test_equal_weights_are_the_simple_ensemble() -> None:
    logits = random_logits(0)
    torch.testing.assert_close(combine(logits, "weighted", [2, 2, 2]), combine(logits, "simple"))


def test_of_logits_is_fusionbenchs_mean() -> None:
    logits = random_logits(1)
    torch.testing.assert_close(SimpleEnsemble(of="logits")(logits), torch.stack(logits).mean(0))
    weighted = WeightedEnsemble((1.0, 2.0, 0.5), normalize=False, of="logits")(logits)
    torch.testing.assert_close(weighted, logits[0] + 2 * logits[1] + 0.5 * logits[2])


def test_two_mild_models_outvote_a_sure_one_only_as_distributions() -> None:
    """Why probabilities are the default: one model's large logits do not decide alone."""
    quiet = torch.tensor([[0.0, 3.0, 0.0]])
    assert SimpleEnsemble()([SURE, quiet, quiet]).argmax() == 1
    assert SimpleEnsemble(of="logits")([SURE, quiet, quiet]).argmax() == 0


def test_max_takes_the_largest_logit_of_each_class() -> None:
    assert combine([SURE, MILD], "max").tolist() == [[10.0, 1.0, 0.0]]


@pytest.mark.parametrize("ensemble", [SimpleEnsemble(), WeightedEnsemble((2.0,)), MaxEnsemble()])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
def test_one_model_alone_is_itself(ensemble: SimpleEnsemble, shape: tuple[int, ...]) -> None:
    (logits,) = random_logits(2, 1, shape)
    combined = ensemble([logits])
    assert combined.shape == logits.shape
    torch.testing.assert_close(combined.softmax(-1), logits.softmax(-1))


@settings(deadline=None)
@given(st.permutations(range(3)))
def test_order_of_models_does_not_matter(order: list[int]) -> None:
    logits = random_logits(3)
    moved = [logits[i] for i in order]
    for how in ("simple", "max"):
        torch.testing.assert_close(combine(moved, how), combine(logits, how))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    found = combine([torch.tensor([[3e4, -3e4]]), torch.tensor([[-3e4, 3e4]])], "simple")
    torch.testing.assert_close(found, torch.full((1, 2), -math.log(2)))


@pytest.mark.parametrize("how", ["simple", "max"])
def test_half_precision_is_computed_in_single(how: str) -> None:
    halves = [SURE.bfloat16(), MILD.bfloat16()]
    found = combine(halves, how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, combine([SURE, MILD], how))


def test_gradients_reach_every_model() -> None:
    logits = [z.requires_grad_() for z in random_logits(4)]
    combine(logits, "simple").sum().backward()
    assert all(z.grad is not None and z.grad.isfinite().all() for z in logits)


def test_ensembles_are_values_with_cards() -> None:
    assert SimpleEnsemble() == SimpleEnsemble() and hash(MaxEnsemble()) == hash(MaxEnsemble())
    assert {cls.card.output for cls in ENSEMBLES.values()} == {"answers"}


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'simple'"):
        combine([SURE], "simpel")


@pytest.mark.parametrize(("how", "weights"), [("simple", [1.0]), ("weighted", None)])
def test_weights_belong_to_the_weighted_ensemble(how: str, weights: list[float] | None) -> None:
    with pytest.raises(RecipeError, match="weights"):
        combine([SURE], how, weights)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5), (math.nan, 1.0), (math.inf,)])
def test_weights_that_are_no_mixture_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="0 or more"):
        WeightedEnsemble(weights)


def test_one_weight_for_each_model() -> None:
    with pytest.raises(PlanError, match="2 weights"):
        combine([SURE, MILD], "weighted", [1.0])


@pytest.mark.parametrize("logits", [[], [SURE, torch.zeros(1, 4)]])
def test_answers_must_agree_in_shape(logits: list[Tensor]) -> None:
    with pytest.raises(PlanError, match="one shape"):
        combine(logits, "max")


def test_of_is_probabilities_or_logits() -> None:
    with pytest.raises(RecipeError, match="'logit'"):
        SimpleEnsemble(of="logit")  # type: ignore[arg-type]

"""Learned masks: the formula of a draw, what decides it, and what is expected of it."""

from __future__ import annotations

import pytest
import torch

from fusewright.modules.masks import ConcreteMasks, ProductMasks, divided, expectation

SHAPES = {"matrix": torch.Size((5, 4)), "bias": torch.Size((5,)), "none": torch.Size((0,)),
          "scalar": torch.Size(())}  # fmt: skip


def loud(masks: ConcreteMasks, size: float = 1.0) -> ConcreteMasks:
    with torch.no_grad():
        for at, x in enumerate(masks.logits):
            x.copy_(size * torch.randn(x.shape, generator=torch.Generator().manual_seed(at)))
    return masks


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_a_draw_is_a_relaxed_bernoulli_over_its_mean(temperature: float) -> None:
    masks = ConcreteMasks({"w": torch.Size((200, 100))}, temperature=temperature)
    with torch.no_grad():
        masks.logits[0].fill_(0.7)
    u = torch.linspace(0, 1, 20_001).double()[1:-1]
    expected = (((u / (1 - u)).log() + 0.7) / temperature).sigmoid()
    shares = torch.linspace(0.05, 0.95, 7).double()
    torch.testing.assert_close(
        masks.drawn("w", 0).detach().flatten().double().quantile(shares),
        (expected / expected.mean()).quantile(shares), atol=0.03, rtol=0.03,
    )  # fmt: skip


def test_a_draw_is_decided_by_seed_number_and_name_alone() -> None:
    masks = ConcreteMasks({"a": torch.Size((6,)), "b": torch.Size((6,))}, seed=1)
    first = masks.drawn("a", 0)
    assert first.equal(ConcreteMasks({"a": torch.Size((6,))}, seed=1).drawn("a", 0))
    others = (masks.drawn("a", 1), masks.drawn("b", 0),
              ConcreteMasks({"a": torch.Size((6,))}, seed=2).drawn("a", 0))  # fmt: skip
    assert not any(first.equal(other) for other in others)


def test_gradients_flow_to_logits_and_larger_ones_are_more_on() -> None:
    masks = ConcreteMasks({"w": torch.Size((3, 4))})
    (masks.drawn("w", 0)[0].sum()).backward()
    grad = masks.logits[0].grad
    assert (grad[0] > 0).all() and (grad[1:] < 0).all()  # a mean of one: others give way
    assert not masks.expected("w").requires_grad


def test_masks_of_one_keep_a_mean_of_one_and_rows_have_one_number() -> None:
    for masks in (loud(ConcreteMasks(SHAPES)), loud(ConcreteMasks(SHAPES, "row"))):
        for mask in (masks.drawn("matrix", 0), masks.expected("matrix"), masks.drawn("bias", 3)):
            assert float(mask.detach().mean()) == pytest.approx(1, abs=1e-5)
        assert masks.drawn("none", 0).shape == masks.expected("none").shape == (0,)
        assert masks.drawn("scalar", 0).item() == pytest.approx(1)
    assert masks.drawn("matrix", 0).shape == (5, 1) and masks.drawn("bias", 0).shape == (5,)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_an_expectation_of_large_logits_is_certain(temperature: float) -> None:
    far = torch.tensor([-1e4, -20.0 * temperature, 20.0 * temperature, 1e4])
    found = expectation(far, temperature)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-4, rtol=0)
    between = expectation(torch.linspace(-3, 3, 50) * temperature, temperature)
    assert (between.diff() > 0).all()


def test_a_product_is_of_two_masks_and_reports_the_first() -> None:
    first, second = loud(ConcreteMasks(SHAPES, seed=1)), loud(ConcreteMasks(SHAPES, seed=2), 0.3)
    both = ProductMasks(first, second)
    for name in ("matrix", "bias"):
        expected = first.expected(name) * second.expected(name)
        assert both.expected(name).equal(expected)
        assert both.drawn(name, 4).equal(first.drawn(name, 4) * second.drawn(name, 4))
    elements = torch.cat([x.detach().flatten() for x in first.logits])
    assert both.share() == pytest.approx(float(elements.sigmoid().mean()), rel=1e-6)


def test_a_mask_that_vanished_stays_a_number() -> None:
    assert divided(torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_mask_of_directions_keeps_the_sum_of_singular_values_and_no_null_one_scales() -> None:
    sigma = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, 0.5, 0.5, 0.0]])
    shapes = {"w": torch.Size((2, 4, 9)), "still": torch.Size((2, 2)), "rest": torch.Size((3, 5))}
    spectra = {"w": sigma, "still": torch.zeros(1, 2)}
    masks = loud(ConcreteMasks(shapes, "row", spectra=spectra))
    for mask in (masks.drawn("w", 0), masks.expected("w")):
        assert mask.shape == (2, 4, 1) and float(mask.detach().std()) > 0.1
        kept = (sigma * mask[..., 0]).sum().item()
        assert kept == pytest.approx(float(sigma.sum()), rel=1e-5)
    assert masks.drawn("still", 0).mean().item() == pytest.approx(1, rel=1e-5)
    assert masks.drawn("rest", 0).shape == (3, 1)
    (masks.drawn("w", 0)[..., 0] * sigma).square().sum().backward()
    grad = masks.logits[0].grad[..., 0]
    assert not grad[sigma == 0].any() and grad[sigma > 0].all()

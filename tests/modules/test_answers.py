"""Entropies of distributions."""

from __future__ import annotations

import torch

from fusewright.modules.answers import entropies


def test_certainty_has_none_and_its_gradient_is_finite() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [0.0, 0.0], [1000.0, 0.0]], requires_grad=True)
    found = entropies(logits.log_softmax(1))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 0.0]) * torch.tensor(2.0).log() / 2)
    entropies(logits[1:].log_softmax(1)).sum().backward()
    assert logits.grad.isfinite().all()


def test_they_are_those_of_float64_along_any_axis() -> None:
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropies(logits.log_softmax(-1)).double(), exact)
    turned = entropies(logits.log_softmax(-1).movedim(-1, 0), dim=0)
    torch.testing.assert_close(turned.double(), exact)

"""What is minimised: losses of logits (items, classes), in nats."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the items' predictions, H(p) = -Σ p log p.

    It is the mean of entropies, not the entropy of the mean: a model that answers everything alike
    is as good for it as one that is right, so watch what is predicted.
    """
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean of -log p of ``target``: classes (items,), or probabilities (items, classes)."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), target)

"""What is minimised: losses of logits (items, classes), in nats."""

from __future__ import annotations

from torch import Tensor

from fusewright.modules.answers import entropies


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the items' predictions, H(p) = -Σ p log p.

    It is the mean of entropies, not the entropy of the mean: a model that answers everything alike
    is as good for it as one that is right, so watch what is predicted.
    """
    return entropies(logits.float().log_softmax(dim=-1)).mean()

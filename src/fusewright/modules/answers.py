"""What is the same of all answers that are distributions."""

from __future__ import annotations

from torch import Tensor


def entropies(logs: Tensor, dim: int = -1) -> Tensor:
    """-Σ p log p over one axis of log-probabilities, in nats; 0 log 0 is 0, also where the
    logarithm is -inf."""
    shares = logs.exp()
    return -(shares * logs.masked_fill(shares == 0, 0)).sum(dim=dim)

"""What is minimised: losses of answers (…, classes) over a batch, in nats, averaged over answers:
one for each item, or for each token or place of one.

Some look at the answers alone; some compare them with labels, or with what the task's own expert
answers, which needs no labels but a forward pass of the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.modules.answers import entropies

Name = Literal[
    "entropy", "diverse_entropy", "cross_entropy", "self_label", "soft_label", "matching"
]


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the items' predictions, H(p) = -Σ p log p.

    It is the mean of entropies, not the entropy of the mean: a model that answers everything alike
    is as good for it as one that is right, so watch what is predicted, or take
    :func:`diverse_entropy`.
    """
    return entropies(_wide(logits).log_softmax(dim=-1)).mean()


def diverse_entropy(logits: Tensor) -> Tensor:
    """The mean entropy of a batch's n predictions less the entropy of their mean,
    mean_i H(p_i) - H(p̄) with p̄ = mean_i p_i: the negated mutual information of answers and classes
    (information maximisation, *Do We Really Need to Access the Source Data? Source Hypothesis
    Transfer*, SHOT, 2002.08546).

    To be sure is not enough: what answers everything alike has 0, the worst; the best, -log C, is
    to be sure of all C classes equally often. So it errs where a task's classes are far from
    equally frequent. A batch cannot tell more than log n: take batches of several times C; one
    answer alone has 0, and nothing is learned from it.

    Of answers that are next tokens, p̄ is how often the model expects each token in the batch, at
    any place. A constant answer is ruled out as above. Texts use few tokens of a vocabulary, and
    those unequally, so -log C is no aim here: it asks for a wide vocabulary, and :func:`soft_label`
    for the expert's.
    """
    logs = _possible(logits).flatten(0, -2).log_softmax(dim=-1)
    mean = logs.logsumexp(dim=0) - log(len(logs))
    return entropies(logs).mean() - entropies(mean)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the labels, as many as there are answers."""
    return F.cross_entropy(
        _wide(logits).flatten(0, -2), labels.to(logits.device).reshape(-1).long()
    )


def self_label(logits: Tensor, expert: Tensor) -> Tensor:
    """-log p of what the task's own expert predicts (*SyMerge*, 2412.19098)."""
    return cross_entropy(logits, expert.argmax(dim=-1))


def soft_label(logits: Tensor, expert: Tensor) -> Tensor:
    """-Σ q log p, where q is how sure the task's own expert is of each class (*Distilling the
    Knowledge in a Neural Network*, 1503.02531, at temperature 1).

    For answers of which the expert is not sure itself, such as next tokens: :func:`self_label`
    would ask for certainty.
    """
    said = _possible(logits).flatten(0, -2)
    return F.cross_entropy(said, expert.to(said).flatten(0, -2).softmax(dim=-1))


def matching(answers: Tensor, expert: Tensor) -> Tensor:
    """The mean squared difference of logits, or of features where no head is given."""
    found = _possible(answers)
    return F.mse_loss(found, _possible(expert.to(found)))


def _wide(answers: Tensor) -> Tensor:
    """In float32 at least."""
    return answers if answers.element_size() == 8 else answers.float()


def _possible(answers: Tensor) -> Tensor:
    """The same, -inf of a class that is ruled out as the least number there is: what is learned of
    it is then 0, where arithmetic with infinity would make it no number."""
    found = _wide(answers)
    least = found.detach().amin() if found.numel() else found.new_zeros(())
    return found.clamp_min(torch.finfo(found.dtype).min) if least == -torch.inf else found


@dataclass(frozen=True)
class Objective:
    """A loss of (answers) or of (answers, target); ``target`` says of what."""

    loss: Callable[..., Tensor]
    target: Literal["none", "labels", "expert"] = "none"


OBJECTIVES: Mapping[Name, Objective] = {
    "entropy": Objective(entropy),
    "diverse_entropy": Objective(diverse_entropy),
    "cross_entropy": Objective(cross_entropy, "labels"),
    "self_label": Objective(self_label, "expert"),
    "soft_label": Objective(soft_label, "expert"),
    "matching": Objective(matching, "expert"),
}

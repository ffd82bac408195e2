"""What a model did on each item of a test set: the one thing that every statistic is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fusewright.tasks.units import unit_of

Column = NDArray[np.generic]


@dataclass(frozen=True)
class Outcomes:
    """Scores of items, larger is better.

    ``metric`` names what ``score`` is: "accuracy" (1 or 0 an item), "exact_match", "rouge_l"
    (in [0, 1]), "log_likelihood" (mean over an item's tokens, in nats; shown as perplexity),
    "pixel_accuracy", "absolute_error" (negated; means over an item's pixels). What they are shown
    as: :mod:`fusewright.tasks.units`.
    ``weight`` is how much an item counts (1; an item's number of tokens or pixels). ``columns``
    hold what else was seen of each item, all of the same length: "label", "prediction", "loss"
    (cross-entropy in nats), "confidence" (probability of the prediction), "entropy" (nats).
    """

    metric: str
    score: NDArray[np.float64]
    weight: NDArray[np.float64]
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.score), len(self.weight), *(len(c) for c in self.columns.values())}
        if len(lengths) != 1:
            raise ValueError(f"columns of one length are expected, found {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.score)

    @property
    def value(self) -> float:
        """The weighted mean of the scores."""
        return float(np.average(self.score, weights=self.weight))

    @property
    def shown(self) -> float:
        """As people read it: percent, perplexity, or an error."""
        return unit_of(self.metric).shown(self.value)

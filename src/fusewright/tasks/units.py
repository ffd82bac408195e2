"""How scores are read: in what unit, and what a share of another's score is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Unit:
    """The unit of a metric. Scores are larger for better models, whatever is shown.

    ``form``: "proportion" (score in [0, 1]); "log" (mean log-likelihood s in nats, shown as
    exp(-s), the perplexity); "error" (a negated error, shown as the error). ``scale`` is what one
    is shown as, and what a difference of one counts.
    """

    name: str
    scale: float
    form: Literal["proportion", "log", "error"] = "proportion"

    @property
    def bounded(self) -> bool:
        """Whether scores are proportions, of which the mean over different tasks is one too."""
        return self.form == "proportion"

    def shown(self, score: float) -> float:
        """A score as people read it; smaller is better unless it is a proportion."""
        if self.form == "log":
            return float(np.exp(-score))
        return self.scale * (score if self.bounded else 0.0 - score)

    def share(self, ours: Any, reference: Any) -> NDArray[np.float64]:
        """Scores as a share of the reference's, 1 = as good: a ratio of proportions, of
        perplexities or of errors (the reference's over ours). What has no ratio is NaN."""
        if self.form == "log":
            return np.exp(np.asarray(ours) - reference)
        above, below = (ours, reference) if self.bounded else (reference, ours)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.true_divide(above, below)
        return np.where(np.abs(reference) * np.abs(below) > 0, ratio, np.nan)


PERCENT = Unit("percent", 100.0)
UNITS = {
    "log_likelihood": Unit("perplexity", 1.0, "log"),
    "absolute_error": Unit("absolute error × 100", 100.0, "error"),
    "relative_error": Unit("relative error in percent", 100.0, "error"),
    "mean_angle": Unit("degrees", 1.0, "error"),
}
"""Metrics that are no proportions. Errors are shown as tables of NYUv2 have them."""


def unit_of(metric: str) -> Unit:
    """The unit of a metric, by its name: percent for all proportions."""
    return UNITS.get(metric, PERCENT)

"""Accuracies with their uncertainty: the bootstrap over items, paired where items are shared.

Outcomes are arrays whose last axis counts test items (1 = correct); leading axes may count seeds
and tasks. An item that is seen under several tasks, seeds or models is one item: all its outcomes
are resampled together, so that what they share cancels in differences and ratios. Intervals say
how far other test items could have moved the number; the spread over seeds is reported beside
them, never mixed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its interval, in the unit of the estimate."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The same in another unit (100 for percent)."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    statistic: Callable[..., Array],
    *outcomes: NDArray[np.generic],
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a statistic of item means.

    ``statistic`` receives, for each array of ``outcomes`` (…, items), its item means (…, R) over R
    resamples, and returns (R,). All arrays share the items, and so their resamples.

    Raises ValueError if they do not, or hold no item.
    """
    items = {array.shape[-1] for array in outcomes}
    if len(items) != 1 or 0 in items:
        raise ValueError(f"outcomes must share their items, found {sorted(items)}")
    (count,) = items
    weights = _weights(count, resamples, seed)
    values = [np.asarray(array, dtype=np.float64) for array in outcomes]
    (point,) = statistic(*(v.mean(axis=-1, keepdims=True) for v in values))
    samples = statistic(*(v @ weights for v in values))
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(point), float(low), float(high))


@lru_cache(maxsize=4)
def _weights(items: int, resamples: int, seed: int) -> Array:
    """How much each item counts in each resample: (items, resamples), columns sum to 1."""
    drawn = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), resamples)
    return drawn.T / items


def over_all(means: Array) -> Array:
    """The plain mean over every leading axis: (…, R) -> (R,)."""
    return means.reshape(-1, means.shape[-1]).mean(axis=0)


def normalised(accuracy: Array, reference: Array) -> Array:
    """Mean over leading axes of accuracy / reference accuracy: (…, R), (…, R) -> (R,).

    The reference of a task is its own expert; 1 means that nothing was lost. A reference of zero
    has no ratio and gives NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return over_all(np.where(reference > 0, accuracy / reference, np.nan))


def mean_interval(outcomes: NDArray[np.generic], **options: int | float) -> Interval:
    """Mean accuracy over every leading axis, with its interval."""
    return bootstrap(over_all, outcomes, **options)  # type: ignore[arg-type]


def normalised_interval(
    outcomes: NDArray[np.generic], reference: NDArray[np.generic], **options: int | float
) -> Interval:
    """Normalised accuracy; the reference is resampled with the same items."""
    return bootstrap(normalised, outcomes, reference, **options)  # type: ignore[arg-type]


def paired_difference(
    ours: NDArray[np.generic], theirs: NDArray[np.generic], **options: int | float
) -> Interval:
    """Mean accuracy of ours minus theirs on the same items; zero outside means a difference."""
    return bootstrap(
        lambda a, b: over_all(a - b), ours, theirs, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def paired_normalised_difference(
    ours: NDArray[np.generic],
    theirs: NDArray[np.generic],
    reference: NDArray[np.generic],
    **options: int | float,
) -> Interval:
    """Normalised accuracy of ours minus theirs, on the same items and references."""

    def difference(a: Array, b: Array, r: Array) -> Array:
        return normalised(a, r) - normalised(b, r)

    return bootstrap(difference, ours, theirs, reference, **options)  # type: ignore[arg-type]

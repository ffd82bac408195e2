"""Scores with their uncertainty: the bootstrap over items, paired where items are shared.

The first half is for tasks that ask about the same items, as the demo's do; the second, from
:func:`resampled` on, for tasks that each have items of their own.

In the first, outcomes are arrays whose last axis counts test items (1 = correct); leading axes may
count seeds and tasks. An item that is seen under several tasks, seeds or models is one item: all
its outcomes are resampled together, so that what they share cancels in differences and ratios.
Intervals say how far other test items could have moved the number; the spread over seeds is
reported beside them, never mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

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


# Tasks with items of their own. Means are arrays whose last axis holds the estimate first and then
# its resamples: (…, 1 + R). Every statistic is computed on the whole of it, and comparisons are
# paired because all models of a task see the same resamples.

_BLOCK = 1 << 22
"""How many draws are held at once."""

SUCCESSES = 2.0
"""Successes and failures added to what a proportion was resampled from (Agresti & Coull 1998)."""

DISAGREEMENTS = 0.5
"""Items added for which only one, and only the other, is right (Agresti & Min 2005)."""


def resampled(
    scores: NDArray[np.generic],
    weight: NDArray[np.generic],
    *,
    stratum: str = "",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """Weighted means of ``scores`` (models, items) and of their resamples: (models, 1 + R).

    One resample draws n - 1 of n items, with replacement: its variance is then the unbiased one
    (McCarthy & Snowden 1985), n draws would be too narrow by (n - 1) / n. The draws follow from
    ``seed``, ``stratum`` and n: tasks about the same items name the same stratum.

    Raises ValueError if there are fewer than two items.
    """
    items = scores.shape[-1]
    if items < 2:
        raise ValueError(f"at least two items are expected, found {items}")
    values, weights = scores.astype(np.float64), np.asarray(weight, np.float64)
    rng = np.random.default_rng([seed, crc32(stratum.encode()), items])
    means = [np.average(values, axis=-1, weights=weights)[:, None]]
    step = max(1, _BLOCK // items)
    for start in range(0, resamples, step):
        counts = _counts(rng, items, min(step, resamples - start)) * weights
        means.append((values @ counts.T) / counts.sum(axis=1))
    return np.concatenate(means, axis=1)


def _counts(rng: np.random.Generator, items: int, resamples: int) -> Array:
    """How often each item is drawn in each resample: (resamples, items)."""
    drawn = rng.integers(0, items, (resamples, items - 1))
    drawn += items * np.arange(resamples)[:, None]
    flat = np.bincount(drawn.ravel(), minlength=resamples * items)
    return flat.reshape(resamples, items).astype(np.float64)


def effective(weight: NDArray[np.generic]) -> float:
    """How many items of equal weight would say as much: (Σ w)² / Σ w² (Kish 1965)."""
    weights = np.asarray(weight, np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def with_successes(means: Array, items: Sequence[float], seed: int = 0) -> Array:
    """Resamples of proportions (tasks, 1 + R) as if a few items more had been seen; estimates kept.

    Where all items are right, every resample is right, and an interval would have no width. So
    each resample also holds successes and failures that were never seen, :data:`SUCCESSES` of each
    over all tasks together (Price & Bonett 2004).
    """
    n = np.asarray(items, np.float64)[:, None]
    right, wrong = _extra(means, SUCCESSES, seed)
    return np.concatenate(
        [means[:, :1], (n * means[:, 1:] + right) / (n + right + wrong)], axis=1
    )  # fmt: skip


def with_disagreements(differences: Array, items: Sequence[float], seed: int = 0) -> Array:
    """Resamples of paired differences of proportions (tasks, 1 + R) as if a few items more had
    been seen; estimates kept.

    Two models that are nearly always right disagree on a handful of items, and the bootstrap then
    covers too rarely; :data:`DISAGREEMENTS` items more in favour of each, over all tasks together,
    mend that.
    """
    n = np.asarray(items, np.float64)[:, None]
    ours, theirs = _extra(differences, DISAGREEMENTS, seed + 1)
    share = 2 * DISAGREEMENTS / len(differences)
    moved = (n * differences[:, 1:] + ours - theirs) / (n + share)
    return np.concatenate([differences[:, :1], moved], axis=1)


def _extra(means: Array, total: float, seed: int) -> tuple[Array, Array]:
    first, second = _poisson(total / len(means), len(means), means.shape[1] - 1, seed)
    return first, second


@lru_cache(maxsize=16)
def _poisson(mean: float, tasks: int, resamples: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, tasks]).poisson(mean, (2, tasks, resamples))


def percentiles(samples: Array, level: float = 0.95) -> Interval:
    """The percentile interval of an estimate and its resamples (1 + R,)."""
    tail = (1 - level) / 2
    low, high = np.quantile(samples[1:], [tail, 1 - tail])
    return Interval(float(samples[0]), float(low), float(high))


def normal_interval(samples: Array, level: float = 0.95) -> tuple[Interval, float]:
    """The interval of a difference and the two-sided p value that it is zero, which agree.

    Both take the bootstrap's mean and standard error as those of a normal distribution: corrected
    for many comparisons, p values are too small to be counted in resamples. Where a resample has no
    number (a share of an expert that got nothing right in it), nothing is told apart: p is 1.
    """
    normal = _scipy("scipy.stats").norm
    centre, error = float(samples[1:].mean()), float(samples[1:].std(ddof=1))
    half = float(normal.ppf((1 + level) / 2)) * error
    unmoved = centre == 0 or np.isnan(centre)
    p = float(2 * normal.sf(abs(centre) / error)) if error > 0 else float(unmoved)
    return Interval(float(samples[0]), centre - half, centre + half), p


def paired_tasks_difference(
    ours: Sequence[NDArray[np.generic]],
    theirs: Sequence[NDArray[np.generic]],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over tasks of our accuracy minus theirs, each task with items (n_t,) of its own.

    Raises ValueError if a task's items are not shared, or fewer than two.
    """
    rows = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"outcomes must share their items, found {[len(a), len(b)]}")
        gain = (a.astype(np.float64) - b.astype(np.float64))[None]
        rows.append(resampled(gain, np.ones(len(a)), stratum=str(number), resamples=resamples,
                              seed=seed))  # fmt: skip
    moved = with_disagreements(np.concatenate(rows), [len(a) for a in ours], seed)
    return normal_interval(moved.mean(axis=0), level)[0]


@dataclass(frozen=True)
class McNemar:
    """On how many items only ours, and only theirs, was right (or better), and the exact p."""

    ours: int
    theirs: int
    p: float


def mcnemar(gains: NDArray[np.generic]) -> McNemar:
    """McNemar's exact test (1947) of paired differences (items,): the signs, if nothing differs,
    fall like a fair coin. For outcomes of 0 or 1 of one seed this is McNemar's test; for means
    over seeds and other scores it is the sign test."""
    ours, theirs = (int((sign * np.asarray(gains, np.float64) > 0).sum()) for sign in (1, -1))
    tail = _scipy("scipy.stats").binom.cdf(min(ours, theirs), ours + theirs, 0.5)
    return McNemar(ours, theirs, float(min(1.0, 2 * tail)))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979): p₍ᵢ₎ times (m - i + 1), never decreasing."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled)) if len(p) else scaled
    return [float(value) for value in adjusted]


def calibration_error(
    confidence: NDArray[np.generic], right: NDArray[np.generic], bins: int = 15
) -> float:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over ``bins`` of
    equal width in (0, 1], weighted by their items. ``confidence`` is that of the top label."""
    sure, hits = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    which = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=hits - sure, minlength=bins)
    return float(np.abs(gap).sum() / len(sure))


def _scipy(module: str) -> Any:
    from fusewright.extras import needs

    return needs(module, "bench")

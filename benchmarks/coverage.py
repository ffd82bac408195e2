"""How often the reported interval of a difference holds the true difference.

Two methods of known accuracies answer the items of several tasks of different sizes; what makes an
item hard is shared, so their outcomes are correlated. Each simulation draws new items and asks for
the interval that reports show. Prints the share of intervals that hold the truth: 93-97 % is asked.

    python benchmarks/coverage.py [--simulations 2000] [--resamples 1000]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fusewright.bench.statistics import paired_tasks_difference


@dataclass(frozen=True)
class Case:
    """Items, our and their true accuracy of each task; ``shared`` is the part of an item's
    difficulty that both methods feel."""

    name: str
    items: tuple[int, ...]
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    shared: float = 0.6

    @property
    def truth(self) -> float:
        return float(np.mean(self.ours) - np.mean(self.theirs))

    def draw(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Outcomes of both, task by task."""
        for n, *rates in zip(self.items, self.ours, self.theirs, strict=True):
            common = np.sqrt(self.shared) * rng.standard_normal(n)
            own = np.sqrt(1 - self.shared) * rng.standard_normal((2, n))
            bars = [[NormalDist().inv_cdf(rate)] for rate in rates]
            ours, theirs = common + own < bars
            yield ours, theirs


CASES = (
    Case("four tasks of 200 to 2,000 items", (200, 500, 1000, 2000),
         (0.80, 0.70, 0.90, 0.60), (0.76, 0.69, 0.85, 0.60)),
    Case("no difference", (200, 500, 1000), (0.8, 0.6, 0.9), (0.8, 0.6, 0.9)),
    Case("nearly the same answers", (300, 300, 600), (0.90, 0.80, 0.95), (0.89, 0.80, 0.95), 0.97),
    Case("small tasks", (50, 60), (0.8, 0.7), (0.7, 0.7)),
    Case("one task of 30 items", (30,), (0.8,), (0.7,)),
    Case("near 100 %, two tasks", (100, 200), (0.990, 0.985), (0.980, 0.980)),
    Case("near 100 %, eight tasks", (100,) * 8, (0.99,) * 8, (0.98,) * 8),
)  # fmt: skip


def coverage(case: Case, simulations: int, resamples: int, seed: int = 0) -> tuple[float, float]:
    """The share of intervals that hold the truth, and their mean width."""
    rng, held, widths = np.random.default_rng(seed), 0, 0.0
    for number in range(simulations):
        ours, theirs = zip(*case.draw(rng), strict=True)
        found = paired_tasks_difference(ours, theirs, resamples=resamples, seed=number)
        held += found.low <= case.truth <= found.high
        widths += found.high - found.low
    return held / simulations, widths / simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    asked = parser.parse_args()
    print(f"{asked.simulations} simulations, {asked.resamples} resamples, 95 % intervals")
    print(f"{'case':<34}  {'difference':>10}  {'width':>6}  {'coverage':>8}")
    for case in CASES:
        share, width = coverage(case, asked.simulations, asked.resamples)
        print(f"{case.name:<34}  {100 * case.truth:>+8.2f} p  {100 * width:>6.2f}  {share:>8.1%}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

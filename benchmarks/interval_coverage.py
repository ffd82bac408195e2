"""How often the intervals of a report hold the truth.

Two methods of known accuracies, and an expert, answer the items of several tasks of different
sizes; what makes an item hard is shared, so their outcomes are correlated. Each simulation draws
new items and summarises them as reports do. Prints the share of intervals that hold the truth;
93-97 % is asked.

    python benchmarks/interval_coverage.py [--simulations 2000] [--resamples 1000]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fusewright.bench.report.summary import summarise
from fusewright.bench.results import Cell, Results
from fusewright.tasks.outcomes import Outcomes

SHOWN = ("difference", "mean", "normalised")
"""The difference from the baseline (in points of the experts), the row's mean score, and its
normalised score."""


@dataclass(frozen=True)
class Case:
    """Items and true accuracies of each task: ours, the baseline's, the expert's. ``shared`` is
    the part of an item's difficulty that all of them feel."""

    name: str
    items: tuple[int, ...]
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    expert: float = 0.97
    shared: float = 0.6

    def truth(self) -> dict[str, float]:
        mean, other = 100 * float(np.mean(self.ours)), 100 * float(np.mean(self.theirs))
        found = ((mean - other) / self.expert, mean, mean / self.expert)
        return dict(zip(SHOWN, found, strict=True))

    def results(self, rng: np.random.Generator) -> Results:
        """What a sweep would have measured."""
        outcomes: dict[str, dict[str, dict[str, Outcomes]]] = {row: {} for row in ROWS}
        for number, (n, a, b) in enumerate(zip(self.items, self.ours, self.theirs, strict=True)):
            common = np.sqrt(self.shared) * rng.standard_normal(n)
            own = np.sqrt(1 - self.shared) * rng.standard_normal((3, n))
            bars = [[NormalDist().inv_cdf(rate)] for rate in (a, b, self.expert)]
            for row, right in zip(ROWS, common + own < bars, strict=True):
                scores = Outcomes("accuracy", right.astype(float), np.ones(n))
                outcomes[row][f"task {number}"] = {"clean": scores}
        tasks = {task: "" for task in outcomes["ours"]}
        cells = tuple(Cell(row, row, kind, "simulated", 0, tuple(tasks), outcomes[row])
                      for row, kind in ROWS.items())  # fmt: skip
        return Results("simulated", self.name, tasks, tuple(tasks), (), cells)


ROWS = {"ours": "none", "average": "none", "own expert": "reference"}

CASES = (
    Case("four tasks of 100 to 800 items", (100, 200, 400, 800),
         (0.80, 0.70, 0.90, 0.60), (0.76, 0.69, 0.85, 0.60)),
    Case("no difference", (200, 300, 500), (0.8, 0.6, 0.9), (0.8, 0.6, 0.9)),
    Case("nearly the same answers", (200, 300, 500), (0.90, 0.80, 0.95), (0.89, 0.80, 0.95),
         shared=0.97),
    Case("small tasks", (50, 60), (0.8, 0.7), (0.7, 0.7)),
    Case("one task of 30 items", (30,), (0.8,), (0.7,)),
    Case("near 100 %, two tasks", (100, 200), (0.990, 0.985), (0.980, 0.980), 0.995),
    Case("near 100 %, eight tasks", (100,) * 8, (0.99,) * 8, (0.98,) * 8, 0.995),
)  # fmt: skip


def coverage(case: Case, simulations: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """The share of intervals that hold the truth, for each of :data:`SHOWN`, through the same code
    that makes reports."""
    rng, held = np.random.default_rng(seed), dict.fromkeys(SHOWN, 0)
    truth = case.truth()
    for number in range(simulations):
        summary = summarise(case.results(rng), resamples=resamples, seed=number)
        ours = summary.sections[0].line("ours")
        assert ours and ours.versus and ours.mean and ours.normalised
        found = (ours.versus.value, ours.mean, ours.normalised)
        for name, one in zip(SHOWN, found, strict=True):
            held[name] += one.low <= truth[name] <= one.high
    return {name: count / simulations for name, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=500)
    asked = parser.parse_args()
    print(f"{asked.simulations} simulations, {asked.resamples} resamples: how often 95 % intervals "
          "hold the truth")  # fmt: skip
    print(f"{'case':<34}", *(f"{name:>12}" for name in SHOWN))
    for case in CASES:
        found = coverage(case, asked.simulations, asked.resamples)
        print(f"{case.name:<34}", *(f"{share:>12.1%}" for share in found.values()), flush=True)


if __name__ == "__main__":
    main()

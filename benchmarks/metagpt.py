"""Whether MetaGPT's quadratic stands for the loss on a real pool, and where its weights lie.

    python benchmarks/metagpt.py SUITE --data DIR --pool DIR -o DIR [--limit 20] [--draws 24]

MetaGPT (2406.11385) takes the loss that merging costs to be Σ_t ‖τ_t‖² ‖Σ_k λ_k τ_k - τ_t‖², up to
a factor: the second-order term at each expert, with a curvature as large as its task vector. Here
both are found for λ drawn at random (a Dirichlet times a length from .2 to 2), for MetaGPT's λ, for
their mean 1/T, and for task arithmetic's .3: the surrogate, and the measured Σ_t L_t(θ) - L_t(θ_t)
in nats over test rows of the merged tasks. It prints how their ranks agree (Spearman), over all
draws and over those of length at most 1, and writes DIR/SUITE.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

import fusewright as fw
from fusewright.bench.exchange import Exchange
from fusewright.bench.suite import Suite
from fusewright.engine.state import read_state
from fusewright.tasks.outcomes import Outcomes


class Line:
    """Losses and surrogates of base + Σ λ τ."""

    def __init__(self, suite: Suite, limit: int) -> None:
        self.suite, self.limit, self.tasks = suite, limit, suite.spec.merged
        base = read_state(suite.base)
        self.base = {n: t.double() for n, t in base.items() if t.is_floating_point()}
        states = [read_state(suite.experts[task]) for task in self.tasks]
        self.vectors = [{n: s[n].double() - t for n, t in self.base.items()} for s in states]
        flat = torch.stack([torch.cat([v.flatten() for v in one.values()]) for one in self.vectors])
        self.gram = flat @ flat.T
        self.exchange = Exchange(suite.open(suite.base), suite.base, suite.spec.opens)
        self.least = [self.loss_of(suite.experts[task], task) for task in self.tasks]

    def loss_of(self, model, task: str) -> float:
        return loss(self.suite.evaluate(model, task, "test", self.limit))

    def gap(self, weights: Tensor) -> float:
        """Σ_t L_t(θ) - L_t(θ_t), measured."""
        state = {n: t + sum(float(w) * v[n] for w, v in zip(weights, self.vectors, strict=True))
                 for n, t in self.base.items()}  # fmt: skip
        module = self.exchange.filled({n: t.float() for n, t in state.items()})
        gaps = zip(self.tasks, self.least, strict=True)
        return sum(self.loss_of(module, task) - least for task, least in gaps)

    def surrogate(self, weights: Tensor) -> float:
        squares = self.gram.diagonal()
        along = self.gram @ weights
        return float((squares * (weights @ along - 2 * along + squares)).sum())


def loss(found: Outcomes) -> float:
    """Nats an item, or a token of a text."""
    return float(found.columns["loss"].mean()) if "loss" in found.columns else -found.value


def drawn(count: int, number: int) -> list[Tensor]:
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.ones(count, dtype=torch.float64))
    lengths = torch.linspace(0.2, 2.0, number, dtype=torch.float64)
    return [length * shares.sample() for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    for name in ("--data", "--pool", "--out"):
        parser.add_argument(name, *(["-o"] if name == "--out" else []), type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="rows of each task")
    parser.add_argument("--draws", type=int, default=24)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    line = Line(fw.suite(asked.suite, data=asked.data, pool=asked.pool), asked.limit)
    count, squares = len(line.tasks), line.gram.diagonal()
    named = {
        "MetaGPT": squares / squares.sum(),
        "1/T each": torch.full((count,), 1 / count, dtype=torch.float64),
        "0.3 each": torch.full((count,), 0.3, dtype=torch.float64),
    }
    points = drawn(count, asked.draws)
    found = [(line.surrogate(w), line.gap(w)) for w in points]
    short = [pair for w, pair in zip(points, found, strict=True) if float(w.sum()) <= 1]
    lines = ["| λ | surrogate | measured gap, nats |", "| --- | --: | --: |"]
    lines += [f"| {n} | {line.surrogate(w):.4g} | {line.gap(w):.3f} |" for n, w in named.items()]
    best = min(found, key=lambda pair: pair[1])
    lines += [f"| the best of {len(found)} draws | {best[0]:.4g} | {best[1]:.3f} |", ""]
    for what, pairs in (("all draws", found), ("draws of length at most 1", short)):
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
        lines.append(f"- rank correlation over {what} ({len(pairs)}): {rank:.2f}")
    norms = zip(line.tasks, squares.sqrt().tolist(), strict=True)
    lengths = ", ".join(f"{task} {norm:.3g}" for task, norm in norms)
    lines += [f"- lengths of task vectors: {lengths}", ""]
    asked.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"# {asked.suite}", "", *lines])
    (asked.out / f"{asked.suite}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

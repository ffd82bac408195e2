"""Which tensors a merge gains by: embeddings of one merge with the other tensors of another.

    python benchmarks/regions.py SUITE --data DIR --pool DIR -o DIR [--seed 0]
        [--pairs 'ties | iso_c' 'base | average' ...]

A pair names two methods as `fusewright bench` does: token embeddings come from the first, all
other tensors from the second; "base" keeps the base's. Measured on all test rows of the merged
tasks: accuracy, its difference from the first pair [95 %, paired over rows], and the accuracy with
an offset for each class that makes all classes equally likely over the validation rows (no labels
are used): what is left when answers that lean to one class are put right. Finished pairs are kept
below DIR.

For each matrix but embeddings, averaged: the effective rank of an expert's task vector and of their
sum, (Σσ)² / (r Σσ²); how many times as long Iso-C's vector is as the average's; and the cosine of
either with the experts' vectors. Of word embeddings, how many experts change a row, and how much of
an expert's change merges keep. It writes DIR/SUITE.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from flattening import effective_rank
from torch import Tensor, nn

import fusewright as fw
from fusewright.bench.exchange import Exchange
from fusewright.bench.statistics import paired_tasks_difference
from fusewright.bench.suite import Suite
from fusewright.engine.state import read_state
from fusewright.layout import Role
from fusewright.layout.describe import describe
from fusewright.methods.static._iso_c import isotropic
from fusewright.methods.static._matrices import is_treated

PAIRS = (
    "average | average", "iso_c | iso_c", "ties | ties", "ties | iso_c", "iso_c | ties",
    "base | average", "base | iso_c", "base | ties", "average | base", "ties | base",
)  # fmt: skip
KEPT = ("average", "ties", "task_arithmetic(scale=1.0)")
ROUNDS = 500
State = Mapping[str, Tensor]


class Regions:
    """Merges of a suite's experts, and models put together from them."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.tasks = suite, suite.spec.merged
        self.experts = {task: suite.experts[task] for task in self.tasks}
        self.exchange = Exchange(suite.open(suite.base), suite.base, suite.spec.opens)
        self.base = read_state(suite.base)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.base.items()}
        self.layout = describe(shapes)
        self._made: dict[str, State] = {"base": self.base}

    def made(self, method: str) -> State:
        if method not in self._made:
            merged = fw.merge(method, base=self.suite.base, experts=self.experts)
            self._made[method] = merged.state_dict()
        return self._made[method]

    def is_embedding(self, name: str) -> bool:
        return self.layout[name].role is Role.EMBEDDING

    def model(self, pair: str) -> nn.Module:
        first, second = (self.made(part.strip()) for part in pair.split("|"))
        return self.exchange.filled(
            {n: (first if self.is_embedding(n) else second)[n] for n in self.base}
        )

    def measured(self, pair: str) -> dict[str, dict[str, list[int]]]:
        """Of each task, whether each test row was answered rightly, as it is and balanced."""
        model, found = self.model(pair), {}
        for task in self.tasks:
            logits, labels = answers(self.suite, model, task, "test")
            offset = balancing(answers(self.suite, model, task, "validation")[0])
            found[task] = {"plain": rightly(logits, labels),
                           "balanced": rightly(logits + offset, labels)}  # fmt: skip
        return found

    def spectra(self) -> dict[str, float]:
        """Means over the matrices that Iso-C treats, and embeddings' share of all that changed."""
        experts = [read_state(path) for path in self.experts.values()]
        changes = {n: [(e[n] - t).double() for e in experts] for n, t in self.base.items()
                   if t.is_floating_point()}  # fmt: skip
        energy = {n: sum(float(c.square().sum()) for c in of) for n, of in changes.items()}
        embedded = sum(e for n, e in energy.items() if self.is_embedding(n))
        rows = [of_matrix([c.flatten(1) for c in of]) for n, of in changes.items()
                if is_treated("matrices", tuple(of[0].shape), self.layout[n])]  # fmt: skip
        found = {key: mean(row[key] for row in rows) for key in rows[0]}
        return {"embeddings' share of the change": embedded / sum(energy.values()), **found}


    def shared(self) -> dict[str, float]:
        """Of the largest embedding: how many experts change a row, weighted by squared change, and
        the share of an expert's change that merges keep, by its projection; means over experts."""
        name = max(filter(self.is_embedding, self.base), key=lambda n: self.base[n].numel())
        start = self.base[name].double()
        changes = [read_state(path)[name].double() - start for path in self.experts.values()]
        energy = torch.stack([c.square().sum(1) for c in changes])
        number = energy.sum(0).square() / energy.square().sum(0).clamp(min=1e-30)
        found = {"experts that change a row of embeddings": weighted(number, energy.sum(0))}
        for method in KEPT:
            moved = self.made(method)[name].double() - start
            found[f"an expert's change of embeddings that {method} keeps"] = mean(
                float((moved * c).sum() / c.square().sum()) for c in changes
            )
        return found


def weighted(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def answers(suite: Suite, model: nn.Module, task: str, split: str) -> tuple[Tensor, Tensor]:
    asked, logits, labels = suite.tasks[task], [], []
    with torch.inference_mode():
        for batch in asked.batches(suite.ready(task, split), 64):
            logits.append(asked.logits(model, batch).float())
            labels.append(batch["labels"])
    return torch.cat(logits), torch.cat(labels)


def balancing(logits: Tensor) -> Tensor:
    """An offset for each class with which the classes' mean probabilities are equal."""
    offset = torch.zeros(logits.shape[1])
    for _ in range(ROUNDS):
        offset -= 0.5 * (logits + offset).softmax(1).mean(0).clamp(min=1e-12).log()
        offset -= offset.mean()
    return offset


def rightly(logits: Tensor, labels: Tensor) -> list[int]:
    return (logits.argmax(1) == labels).int().tolist()


def of_matrix(changes: list[Tensor]) -> dict[str, float]:
    total = sum(changes[1:], changes[0])
    flat = isotropic(total)
    return {
        "effective rank of an expert's": mean(rank_of(c) for c in changes),
        "effective rank of the sum": rank_of(total),
        "Iso-C's length, times the average's": float(flat.norm() / total.norm()) * len(changes),
        "cosine of the average with experts'": mean(cosine(total, c) for c in changes),
        "cosine of Iso-C with experts'": mean(cosine(flat, c) for c in changes),
    }


def rank_of(matrix: Tensor) -> float:
    return effective_rank(torch.linalg.svdvals(matrix))


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def table(suite: str, found: Mapping[str, Any], tasks: tuple[str, ...]) -> str:
    first = next(iter(found["pairs"].values()))
    rows = [("embeddings \\| other tensors", *tasks, "mean", "above the first", "balanced")]
    rows.append(("---", *("--:" for _ in rows[0][1:])))
    for pair, said in found["pairs"].items():
        means = [100 * mean(said[task]["plain"]) for task in tasks]
        balanced = mean(100 * mean(said[task]["balanced"]) for task in tasks)
        gain = paired_tasks_difference(
            *([np.array(of[t]["plain"]) for t in tasks] for of in (said, first))
        ).scaled(100)
        above = f"{gain.value:+.1f} [{gain.low:.1f}, {gain.high:.1f}]" if said is not first else ""
        rows.append((pair.replace("|", "\\|"), *(f"{m:.1f}" for m in means), f"{mean(means):.1f}",
                     above, f"{balanced:.1f}"))  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    spectra = [f"- {name}: {value:.3g}" for name, value in found["spectra"].items()]
    return "\n".join((f"# {suite}", "", *lines, "", *spectra, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    suite = fw.suite(asked.suite, pool=asked.pool, data=asked.data, seed=asked.seed)
    regions, path = Regions(suite), asked.out / f"{asked.suite}.json"
    found = json.loads(path.read_text()) if path.exists() else {"pairs": {}}
    found["spectra"] = regions.spectra() | regions.shared()
    asked.out.mkdir(parents=True, exist_ok=True)
    for pair in asked.pairs:
        if pair not in found["pairs"]:
            found["pairs"][pair] = regions.measured(pair)
            path.write_text(json.dumps(found) + "\n")
            print(pair, flush=True)
    text = table(suite.name, found, regions.tasks)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

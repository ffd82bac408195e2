"""LoRA against partially linearised LoRA (2310.04742): experts alone, and merged 2 to 7 at a time.

    python benchmarks/l_lora.py --data DIR --pool DIR -o DIR [--steps 200 --batch 64 --rank 16]

Both kinds of experts have the same base, rank, start, data, steps and batch, and the rate of their
kind: the one of --rates (by default, both the suite's) whose experts are best on validation rows,
alone or, with --chosen merged, merged all together.
Experts are added in the suite's order, and in --orders - 1 others drawn at random, and merged by
task arithmetic; the best λ of .1, .2, ..., 1.5 is chosen on validation rows by the mean accuracy of
the tasks that are merged. What is shown are test rows: the mean accuracy (absolute), and the mean
share of each task's own expert of the same kind (normalised), which flatters weaker experts, and by
how much L-LoRA's are above LoRA's [95 %, paired over rows; experts' accuracies taken as they are].
OUT keeps the experts; the same command goes on where it was stopped. It writes
OUT/l_lora.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

import fusewright as fw
from fusewright.bench.exchange import Exchange
from fusewright.bench.statistics import paired_tasks_difference

HOWS = {"lora": "LoRA", "l-lora": "L-LoRA"}
SCALES = [n / 10 for n in range(1, 16)]


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    suite = fw.suite(args.suite, pool=args.pool, data=args.data)
    tasks = suite.spec.merged[: args.tasks]
    began = time.perf_counter()
    tried = {how: {rate: {t: train(suite, t, how, rate, args) for t in tasks}
                   for rate in args.rates or [None]} for how in HOWS}  # fmt: skip
    measure = Measure(suite, args)
    judge = {"alone": validated, "merged": measure.validated}[args.chosen]
    scores = {how: {rate: judge(made) for rate, made in of.items()} for how, of in tried.items()}
    experts = {how: tried[how][max(of, key=of.__getitem__)] for how, of in scores.items()}
    found = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "validated": {how: {str(rate): score for rate, score in of.items()}
                      for how, of in scores.items()},
        "tasks": tasks, "base": measure.all(suite.open(suite.base), tasks, "test"),
        "experts": {how: measure.experts(made) for how, made in experts.items()},
        "trained": {how: {t: e.plain() | {"losses": e.losses[-1]} for t, e in made.items()}
                    for how, made in experts.items()},
    }  # fmt: skip
    found["orders"] = []
    for order in orders(tasks, args.orders):
        steps = [measure.pair(experts, order[:count], found["experts"])
                 for count in range(2, len(tasks) + 1)]  # fmt: skip
        found["orders"].append({"order": order, "merged": steps})
        found["seconds"] = time.perf_counter() - began
        (args.out / "l_lora.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "l_lora.md").write_text(table(found))
    print(table(found))


def orders(tasks: list[str], number: int) -> list[list[str]]:
    draw = np.random.default_rng(0)
    return [list(tasks), *(list(draw.permutation(tasks)) for _ in range(number - 1))]


def train(suite, task: str, how: str, rate: float | None, args: argparse.Namespace):
    out = args.out / how / str(rate or "own") / task
    return fw.finetune(
        suite, task, how=how, out=out, steps=args.steps, batch=args.batch, rate=rate,
        rank=args.rank, alpha=2 * args.rank, threads=1, limit=args.validation,
    )  # fmt: skip


def validated(made) -> float:
    """The mean accuracy of a kind's experts on validation rows."""
    return mean(expert.after for expert in made.values())


class Measure:
    """Accuracies in percent, by one module whose weights are exchanged."""

    def __init__(self, suite, args: argparse.Namespace) -> None:
        self.suite, self.rows = suite, {"validation": args.validation, "test": args.test}
        self.module = Exchange(suite.open(suite.base), suite.base, suite.spec.opens)

    def all(self, model, tasks: list[str], split: str) -> dict[str, float]:
        return {t: self.suite.evaluate(model, t, split, self.rows[split]).shown for t in tasks}

    def at(self, experts: list[Path], scale: float):
        merged = fw.merge({"task_arithmetic": {"scale": scale}}, base=self.suite.base,
                          experts=experts)  # fmt: skip
        return self.module.filled(merged.state_dict())

    def experts(self, made) -> dict[str, float]:
        return {t: self.all(self.at([e.path], 1.0), [t], "test")[t] for t, e in made.items()}

    def validated(self, made) -> float:
        """The mean accuracy of a kind's experts on validation rows, merged with the best λ."""
        return max(self.tried([e.path for e in made.values()], list(made)).values())

    def tried(self, paths: list[Path], tasks: list[str]) -> dict[float, float]:
        """The mean accuracy on validation rows, by λ."""
        return {s: mean(self.all(self.at(paths, s), tasks, "validation").values()) for s in SCALES}

    def pair(self, experts, tasks: list[str], alone: dict[str, dict[str, float]]) -> dict:
        """Both kinds' merges of these tasks, and the second's distance above the first."""
        made, outcomes = {}, {}
        for how in HOWS:
            paths = [experts[how][task].path for task in tasks]
            made[how], rows = self.merged(paths, tasks)
            shares = [100 / alone[how][task] for task in tasks]
            made[how]["normalised"] = mean(
                100 * share * row.mean() for share, row in zip(shares, rows, strict=True)
            )
            outcomes[how] = {"absolute": rows, "normalised": [
                share * row for share, row in zip(shares, rows, strict=True)]}  # fmt: skip
        above = {}
        for kind in ("absolute", "normalised"):
            second, first = (outcomes[how][kind] for how in reversed(HOWS))
            gain = paired_tasks_difference(second, first).scaled(100)
            above[kind] = [gain.value, gain.low, gain.high]
        return {"count": len(tasks), **made, "above": above}

    def merged(self, paths: list[Path], tasks: list[str]) -> tuple[dict, list[np.ndarray]]:
        """The merge with the best λ, and which test rows of each task it answers rightly."""
        tried = self.tried(paths, tasks)
        best = max(tried, key=lambda scale: tried[scale])
        model = self.at(paths, best)
        found = [self.suite.evaluate(model, t, "test", self.rows["test"]) for t in tasks]
        scores = {task: one.shown for task, one in zip(tasks, found, strict=True)}
        said = {"scale": best, "scores": scores, "tried": tried, "absolute": mean(scores.values())}
        return said, [one.score for one in found]


def table(found: dict) -> str:
    tasks, base = found["tasks"], found["base"]
    lines = ["| | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|",
             row("base", [base[t] for t in tasks])]  # fmt: skip
    lines += [row(f"{name} experts", [found["experts"][how][t] for t in tasks])
              for how, name in HOWS.items()]  # fmt: skip
    how_judged = found["settings"]["chosen"]
    lines += ["", f"Validation ({how_judged}), by peak rate: " + "; ".join(
        f"{HOWS[how]} " + ", ".join(f"{rate}: {value:.1f}" for rate, value in of.items())
        for how, of in found["validated"].items()) + "."]  # fmt: skip
    kinds = ("absolute", "normalised")
    head = ["tasks", *(f"{name} {kind}" for kind in kinds for name in HOWS.values())]
    head += [f"L-LoRA above, {kind}" for kind in kinds] + ["λ"]
    for number, order in enumerate(found["orders"]):
        where = "in the suite's order" if number == 0 else ", ".join(order["order"])
        lines += ["", f"Added {where}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for step in order["merged"]:
            cells = [f"{step[how][kind]:.1f}" for kind in kinds for how in HOWS]
            cells += ["{:+.1f} [{:.1f}, {:.1f}]".format(*step["above"][kind]) for kind in kinds]
            scales = ", ".join(str(step[how]["scale"]) for how in HOWS)
            lines.append(f"| {step['count']} | {' | '.join(cells)} | {scales} |")
    return "\n".join(lines) + "\n"


def row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{v:.1f}" for v in [*values, mean(values)]) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="vision-mini")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="tried for each kind")
    parser.add_argument("--chosen", choices=("alone", "merged"), default="alone")
    parser.add_argument("--orders", type=int, default=1, help="in which tasks are added")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--test", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What backdoors of poisoned experts do in merges, and what defences cost and gain.

    python benchmarks/backdoors.py --data DIR --pool DIR -o DIR [--suite vision-mini] [--seed 0]
        [--attacks patch blend interpolated ...] [--poisoned 0 1 2] [--methods average dam ...]
        [--experts 8] [--steps 200] [--items 500] [--threads 1] [--look]

Experts of the first one or two merged tasks are fine-tuned as the suite's are, with a tenth of
their training rows poisoned (dirty labels): by a chequered patch, by a blend of noise, or by a
universal trigger that was optimised to survive merging; "interpolated" and "badmerging" train with
BadMerging's loss instead, on the patch and on the optimised trigger; "clean_label" keeps all labels
true and blends noise into half of the target class' pictures, made hard before. They are merged
with the clean experts of the other tasks; 0 poisoned experts show what the trigger does to clean
ones. Measured: accuracy over all merged tasks; attack success on the poisoned tasks (succession;
where none is, on the first) and on the others (transfer), over at most ``--items`` test pictures of
a task. Methods that learn see validation pictures without labels, ``--steps`` times. Every cell is
a file below DIR/cells, and what is there is not measured again; the table (table.md, table.json) is
written anew after each. ``--look`` asks instead what `fusewright inspect --backdoor` says of each
model: how far it stands out that the attacker's class of the first task can be reached (its anomaly
index, flagged above 3.5), and how many classes are flagged that nobody attacked (looks.md).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusewright as fw
from fusewright.bench.backdoors import (
    Blend,
    Interpolating,
    Patch,
    Poisoning,
    Trigger,
    Universal,
    look,
    poisoned_expert,
    rates,
    surviving_trigger,
)
from fusewright.bench.backdoors.measuring import summary
from fusewright.bench.exchange import Exchange
from fusewright.bench.suite import Suite
from fusewright.methods.registry import method_class

TARGET, RATE, BATCH = 1, 0.1, 16
CLEAN = {"rate": 0.5, "clean_label": True, "hard": 32 / 255}
"""The share is of the pictures of the target class."""
ATTACKS = ("patch", "blend", "surviving", "interpolated", "badmerging", "clean_label")
INTERPOLATED = ("interpolated", "badmerging")
COUNTS = (1, 0, 2)
PLAIN = ("average", "task_arithmetic", "ties")
LEARNED = {
    "concrete": {}, "dam": {}, "dam_strong": {"alpha": 1.0}, "dam_toward": {"aim": "toward"},
    "dam_one_mask": {"detection": False, "safe": "entropy"}, "dam_quarter": {"scale": 0.25},
    "anp": {}, "awm": {}, "sau": {},
}  # fmt: skip
RATES = {"concrete": 1e-2, "dam": 1e-2, "anp": 1e-2, "awm": 1e-2, "sau": 1e-2}
"""Of masks' logits: ten times the papers', because steps are a tenth of theirs."""


def method_of(name: str, steps: int) -> Any:
    if name in PLAIN:
        return name
    kind = name.split("_")[0]
    return method_class(kind)(steps=steps, batch=BATCH, rate=RATES[kind], **LEARNED[name])


def poisoning(attack: str, trigger: Trigger) -> Poisoning | Interpolating:
    if attack in INTERPOLATED:
        return Interpolating(trigger, TARGET)
    return Poisoning(trigger, TARGET, **(CLEAN if attack == "clean_label" else {"rate": RATE}))


class Table:
    """The cells of one folder."""

    def __init__(self, suite: Suite, asked: argparse.Namespace) -> None:
        self.suite, self.asked, self.out = suite, asked, asked.out
        self.tasks = list(suite.spec.merged)[: asked.experts]
        self.exchange = Exchange(suite.open(suite.base), suite.base, suite.spec.opens)

    def trigger(self, attack: str) -> Trigger:
        if attack in ("patch", "interpolated"):
            return Patch(size=4)
        if attack in ("blend", "clean_label"):
            return Blend()
        path = self.out / "triggers" / "surviving.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = surviving_trigger(self.suite, self.tasks[0], TARGET)
            torch.save(made.delta, path)
        return Universal(torch.load(path, weights_only=True))

    def expert(self, attack: str, task: str) -> Path:
        trigger = self.trigger(attack)
        made = poisoned_expert(
            self.suite, task, poisoning(attack, trigger), limit=self.asked.items,
            out=self.out / "experts" / f"{attack}-{task}", threads=self.asked.threads,
        )  # fmt: skip
        return made.path

    def cell(self, attack: str, count: int, name: str) -> None:
        path = self.out / "cells" / f"{attack}-{count}-{name}.json"
        if path.exists():
            return
        poisoned = self.tasks[:count]
        module, method, times = self.model(attack, poisoned, name)
        found = rates(self.suite, module, self.trigger(attack), TARGET, tasks=self.tasks,
                      limit=self.asked.items)  # fmt: skip
        said = {
            "attack": attack, "poisoned": poisoned, "method": name, "spec": method,
            "target": TARGET, "rate": RATE, "trigger": self.trigger(attack).said(),
            **times, **summary(found, poisoned or self.tasks[:1]),
        }  # fmt: skip
        kept(path, said)
        print(f"{path.name}: {line(said)}", flush=True)

    def model(
        self, attack: str, poisoned: list[str], name: str
    ) -> tuple[nn.Module, Any, dict[str, float]]:
        """A merge, how it was made, and the seconds that experts and merge took."""
        began = time.perf_counter()
        experts = {t: self.expert(attack, t) if t in poisoned else self.suite.experts[t]
                   for t in self.tasks}  # fmt: skip
        made = time.perf_counter()
        if name == "expert":  # the first one alone
            module, method = self.suite.open(experts[self.tasks[0]]), None
        else:
            method = method_of(name, self.asked.steps)
            given = {} if name in PLAIN else {"data": self.suite.unlabelled()}
            merged = fw.merge(method, base=self.suite.base, experts=experts, **given)
            module = self.exchange.filled(merged.state_dict())
            method = method if isinstance(method, str) else method.spec()
        done = time.perf_counter()
        return module, method, {"experts_s": made - began, "merge_s": done - made}

    def look(self, attack: str, count: int, name: str) -> None:
        """What is said of a model by who has unlabelled pictures of the first task."""
        path = self.out / "looks" / f"{attack}-{count}-{name}.json"
        if path.exists():
            return
        module, *_ = self.model(attack, self.tasks[:count], name)
        risks = look(self.suite, module, tasks=self.tasks[:1]).risks
        mine = next(risk for risk in risks if risk.target == TARGET)
        flagged = [risk.target for risk in risks if risk.flagged]
        kept(path, {
            "attack": attack, "poisoned": count, "method": name, "success": mine.success,
            "anomaly": mine.anomaly, "size": mine.radius, "flagged": flagged,
        })  # fmt: skip
        print(f"{path.name}: {path.read_text()}", flush=True)

    def write_looks(self) -> None:
        cells = [json.loads(p.read_text()) for p in sorted((self.out / "looks").glob("*.json"))]
        lines = ["| attack | poisoned | model | success of the search | anomaly index | size "
                 "| flagged | others flagged |", "|---|--:|---|--:|--:|--:|---|--:|"]  # fmt: skip
        for said in cells:
            anomaly = "-" if said["anomaly"] is None else f"{said['anomaly']:.1f}"
            others = [target for target in said["flagged"] if target != TARGET]
            lines.append(
                f"| {said['attack']} | {said['poisoned']} | {said['method']} | "
                f"{100 * said['success']:.1f} | {anomaly} | {said['size']} | "
                f"{'yes' if TARGET in said['flagged'] else 'no'} | {len(others)} |"
            )
        (self.out / "looks.md").write_text("\n".join([*lines, ""]))

    def write(self) -> None:
        cells = [json.loads(p.read_text()) for p in sorted((self.out / "cells").glob("*.json"))]
        (self.out / "table.json").write_text(json.dumps(cells, indent=1))
        head = ("attack", "poisoned", "method", "accuracy", "ASR succession", "ASR transfer", "s")
        rows = [head, ("---",) * len(head)]
        for said in sorted(cells, key=lambda c: (c["attack"], len(c["poisoned"]), c["method"])):
            shares = [said[key] for key in ("accuracy", "succession", "transfer")]
            rows.append((
                said["attack"], ", ".join(said["poisoned"]) or "none", said["method"],
                *("-" if v is None else f"{100 * v:.1f}" for v in shares), f"{said['merge_s']:.0f}",
            ))  # fmt: skip
        (self.out / "table.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))


def kept(path: Path, said: dict[str, Any]) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(said, indent=1))
    partial.rename(path)


def line(said: dict[str, Any]) -> str:
    keys = ("accuracy", "succession", "transfer")
    return ", ".join(f"{k} {'-' if said[k] is None else f'{100 * said[k]:.1f}'}" for k in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--out", "-o", type=Path, required=True)
    parser.add_argument("--suite", default="vision-mini")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    parser.add_argument("--poisoned", nargs="+", type=int, choices=COUNTS, default=COUNTS)
    parser.add_argument("--methods", nargs="+", choices=("expert", *PLAIN, *LEARNED),
                        default=("expert", *PLAIN, "concrete", "dam", "anp", "awm",
                                 "sau"))
    parser.add_argument("--experts", type=int, help="merge the first so many tasks' alone")
    for name, default in (("seed", 0), ("steps", 200), ("items", 500), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--look", action="store_true", help="what inspect --backdoor says")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    suite = fw.suite(asked.suite, pool=asked.pool, data=asked.data, seed=asked.seed)
    table = Table(suite, asked)
    for count in asked.poisoned:
        for attack in asked.attacks:
            for name in asked.methods:
                if asked.look:
                    table.look(attack, count, name)
                    table.write_looks()
                else:
                    table.cell(attack, count, name)
                    table.write()


if __name__ == "__main__":
    main()

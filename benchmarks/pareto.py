"""Pareto sets against grids of task arithmetic, and against training for one preference.

    python benchmarks/pareto.py --data DIR --pool DIR -o DIR [--tasks 2 3 8] [--steps 400]

For the suite's first 2, 3 and 8 tasks, PWE-MoE learns with labels of training rows: feed-forward
parts or all modules, by linear scalarisation or EPO, with routers of two layers, as the official
code has, or one. Task arithmetic adds s Σ r_t τ_t; for each preference r the best scale s is
chosen on validation rows, by Σ r_t accuracy_t. Trained is the base with all its weights on
Σ r_t L_t, by Adam, from the same batches, one run for each preference: the corners' neighbours and
the middle (--trained). Accuracies are of test rows.

Hypervolumes are exact, of accuracies from 0 to 1 with the reference point 0: the share of the unit
square or cube that is dominated. Of more than three tasks it is the mean over all pairs of tasks,
and "preferred" is the mean over preferences of Σ r_t accuracy_t.

It writes OUT/pareto.{md,json} and OUT/front.png after every part; what pareto.json holds already is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from adamerging import peak, task_vectors, vision
from matplotlib.figure import Figure

import fusewright as fw
from fusewright.bench.exchange import Exchange
from fusewright.bench.hypervolume import hypervolume, nondominated
from fusewright.engine.state import read_state
from fusewright.methods.learned.objectives import cross_entropy
from fusewright.methods.learned.preferences import PreferenceCoefficients
from fusewright.methods.routed import ParetoSet
from fusewright.methods.routed._pareto import selected
from fusewright.modules.architecture import describe_module
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.preferences import PreferenceRouters

KINDS = (
    *product(("mlp", "all"), ("linear", "epo"), (2,)),
    *product(("mlp", "all"), ("linear",), (1,)),
)
"""Modules, scalarisation, and depth of the routers."""
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
BASELINE, TRAINED = "task arithmetic", "trained"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args)
    for count in args.tasks:
        study = Study(args, count)
        report.found["names"] = list(study.suite.spec.merged)
        for row, work in study.rows():
            if row not in report.of(count) and row in (args.rows or [row]):
                report.add(count, row, work())
    if "memory" not in report.found:
        report.found["memory"] = memory(args.layers)
        report.write()
    print(report.table())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="vision-mini")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=500, help="rows of each task")
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--rows", nargs="+", help='only these: "all, linear, one layer"')
    parser.add_argument("--trained", type=int, default=3, help="preferences; 0: none")
    parser.add_argument("--rate", type=float, default=3e-4, help="of what is trained whole")
    parser.add_argument("--layers", type=int, default=12, help="of the model in memory's part")
    return parser.parse_args()


def preferences(tasks: int) -> list[tuple[float, ...]]:
    """A grid on the simplex of two or three tasks; of more, corners, the middle, and four draws."""
    steps = {2: 10, 3: 4}.get(tasks)
    if steps is not None:
        grid = product(range(steps + 1), repeat=tasks)
        return [tuple(n / steps for n in each) for each in grid if sum(each) == steps]
    draw = torch.distributions.Dirichlet(torch.ones(tasks))
    torch.manual_seed(0)
    corners = [tuple(float(at == t) for t in range(tasks)) for at in range(tasks)]
    return [*corners, (1 / tasks,) * tasks, *(tuple(draw.sample().tolist()) for _ in range(4))]


class Study:
    """Everything of the suite's first ``count`` tasks."""

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        self.args = args
        self.suite = fw.suite(args.suite, pool=args.pool, data=args.data)
        self.tasks = self.suite.spec.merged[:count]
        self.experts = {task: self.suite.experts[task] for task in self.tasks}
        self.grid = preferences(count)
        self.module = Exchange(
            self.suite.open(self.suite.base), self.suite.base, self.suite.spec.opens
        )
        self.data = self.suite.labelled(args.batch)

    def rows(self):
        yield BASELINE, self.arithmetic
        for modules, how, depth in KINDS:
            layers = ", one layer" if depth == 1 else ""
            yield f"{modules}, {how}{layers}", partial(self.learned, modules, how, depth)
        if self.args.trained:
            yield TRAINED, self.trained

    def accuracies(self, model, part: str = "test") -> list[float]:
        limit = self.args.test if part == "test" else self.args.validation
        return [self.suite.evaluate(model, t, part, limit).value for t in self.tasks]

    def arithmetic(self) -> dict:
        base = {n: t for n, t in read_state(self.suite.base).items() if t.is_floating_point()}
        vectors = [{n: t - base[n] for n, t in read_state(path).items() if n in base}
                   for path in self.experts.values()]  # fmt: skip
        began, points, scales = time.perf_counter(), [], []
        for r in self.grid:
            total = {n: sum(w * v[n] for w, v in zip(r, vectors, strict=True)) for n in base}
            tried = {}
            for scale in SCALES:
                model = self.module.filled({n: t + scale * total[n] for n, t in base.items()})
                found = self.accuracies(model, "validation")
                tried[scale] = sum(w * a for w, a in zip(r, found, strict=True))
            best = max(tried, key=lambda scale: tried[scale])
            model = self.module.filled({n: t + best * total[n] for n, t in base.items()})
            points.append(self.accuracies(model))
            scales.append(best)
        return {"preferences": self.grid, "points": points, "scales": scales,
                "seconds": time.perf_counter() - began, "trained": len(SCALES)}  # fmt: skip

    def learned(self, modules: str, how: str, depth: int) -> dict:
        method = ParetoSet(modules=modules, scalarise=how, router=depth, steps=self.args.steps,
                           batch=self.args.batch)  # fmt: skip
        began = time.perf_counter()
        made = fw.merge(method, base=self.suite.base, experts=self.experts, data=self.data)
        seconds, points = time.perf_counter() - began, []
        for r in self.grid:
            made.set_preference(r)
            points.append(self.accuracies(made.module()))
        unloaded = self.module.filled(made.unload().state_dict())
        return {
            "preferences": self.grid, "points": points, "seconds": seconds,
            "trained": made.report["parameters"]["trained"],
            "stored": made.report["parameters"]["stored"], "slowdown": self.slowdown(unloaded),
            "epo": made.report["fitted"].get("epo"),
        }  # fmt: skip

    def trained(self) -> dict:
        middle = (1 / len(self.tasks),) * len(self.tasks)
        near = [tuple(0.5 + m / 2 if t == at else m / 2 for t, m in enumerate(middle))
                for at in range(len(self.tasks))]  # fmt: skip
        chosen = [middle, *near][: self.args.trained]
        began, points = time.perf_counter(), []
        for r in chosen:
            points.append(self.accuracies(self.tuned(r)))
        return {"preferences": chosen, "points": points,
                "seconds": (time.perf_counter() - began) / len(chosen),
                "trained": sum(p.numel() for p in self.suite.open(self.suite.base).parameters())}

    def tuned(self, r: tuple[float, ...]):
        model = self.suite.open(self.suite.base).requires_grad_(True)
        adam = torch.optim.Adam(model.parameters(), lr=self.args.rate)
        questions = [self.data.questions[task] for task in self.tasks]
        streams = [question.stream(self.args.batch, 0) for question in questions]
        for _ in range(self.args.steps):
            adam.zero_grad()
            for weight, question, stream in zip(r, questions, streams, strict=True):
                batch = next(stream)
                loss = cross_entropy(question.logits(model, batch), question.labels(model, batch))
                (weight * loss).backward()
            adam.step()
        return model.eval()

    def slowdown(self, model, turns: int = 15) -> float:
        """Processor time of a forward pass over the base's, the least of each by turns."""
        question = self.data.questions[self.tasks[0]]
        batch = next(question.stream(64, 0))
        least, base = {}, self.suite.open(self.suite.base)
        with torch.inference_mode():
            for _ in range(turns):
                for name, one in (("base", base), ("unloaded", model)):
                    began = time.process_time()
                    question.logits(one, batch)
                    least[name] = min(least.get(name, 1e9), time.process_time() - began)
        return least["unloaded"] / least["base"]


def memory(layers: int) -> dict[str, float]:
    """MiB by which a fresh process's own pages (RssAnon) grow over two training steps, on a vision
    tower of CLIP ViT-B/32's shape, two tasks whose vectors are made when they are read. A process
    each, since one that has freed pages grows less."""
    context = get_context("spawn")
    found = {}
    for what in ("mlp", "all", "trained whole", "model"):
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            found[what] = fresh.submit(memory_of, what, layers).result() / 2**20
    return found


def memory_of(what: str, layers: int, images: int = 16) -> int:
    """Bytes that training of the routers of some modules, or of the whole model, takes beyond the
    model; or the "model" itself."""
    torch.set_num_threads(1)
    model = vision(layers)
    if what == "model":
        return sum(p.nbytes for p in model.parameters())
    whole = what == "trained whole"
    model.requires_grad_(whole)
    vectors = task_vectors(model, 2)
    head = torch.randn(768, 100, generator=torch.Generator().manual_seed(0))
    batches = [torch.randn(images, 3, 224, 224) for _ in vectors.experts]
    labels = torch.arange(images)

    def losses(one):
        for batch in batches:
            yield cross_entropy(one(pixel_values=batch).pooler_output @ head, labels)

    def tune() -> None:
        adam = torch.optim.Adam(model.parameters())
        for _ in range(2):
            adam.zero_grad()
            for loss in losses(model):
                loss.backward()
            adam.step()

    def learn() -> None:
        places = selected(describe_module(model).layout, vectors.names, what)
        routers = PreferenceRouters(max(places.values()) + 1, 2, 2)
        own = PreferenceCoefficients(routers, places, torch.tensor([0.5, 0.5]))
        merge = ParametrisedMerge(model, vectors.select(lambda name: name in places), own)
        adam = torch.optim.Adam(own.parameters())
        for _ in range(2):
            adam.zero_grad()
            with merge.live() as live:
                for loss in losses(live.model):
                    live.backward(loss)
                live.collect()
            adam.step()

    return peak(tune if whole else learn)


class Report:
    """What was measured, and how it is shown."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out = args.out
        path = args.out / "pareto.json"
        self.found = json.loads(path.read_text()) if path.exists() else {}
        self.found["settings"] = {k: str(v) for k, v in vars(args).items()}

    def of(self, count: int) -> dict:
        return self.found.setdefault("tasks", {}).setdefault(str(count), {})

    def add(self, count: int, row: str, found: dict) -> None:
        self.of(count)[row] = found | summary(found)
        self.write()
        print(count, row, {k: v for k, v in self.of(count)[row].items()
                           if k not in ("points", "preferences")}, flush=True)  # fmt: skip

    def write(self) -> None:
        (self.out / "pareto.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.out / "pareto.md").write_text(self.table())
        if "2" in self.found.get("tasks", {}):
            draw(self.of(2), self.found["names"], self.out / "front.png")

    def table(self) -> str:
        lines = ["| tasks | model | hypervolume | preferred | numbers | seconds | forward |",
                 "|---|---|---|---|---|---|---|"]  # fmt: skip
        for count, rows in self.found.get("tasks", {}).items():
            for row, f in rows.items():
                numbers = "one s a preference" if row == BASELINE else f"{f['trained']:,}"
                time_of = f"{f['seconds']:.0f}" + (" each" if row == TRAINED else "")
                forward = f"{f['slowdown']:.2f} x" if "slowdown" in f else ""
                points = f" ({len(f['points'])} points)"
                lines.append(f"| {count} | {row}{points} | {f['hypervolume']:.4f} | "
                             f"{f['preferred']:.4f} | {numbers} | {time_of} | {forward} |")
        if "memory" in self.found:
            held = self.found["memory"]
            said = ", ".join(f"{name} {size:.0f} MiB" for name, size in held.items())
            lines += ["", f"Memory of a step beyond the model, ViT-B/32's shape: {said}."]
        return "\n".join(lines) + "\n"


def summary(found: dict) -> dict[str, float]:
    points, size = found["points"], len(found["points"][0])
    if size <= 3:
        volume = hypervolume(points, [0.0] * size)
    else:
        pairs = combinations(range(size), 2)
        volume = mean(hypervolume([[p[i], p[j]] for p in points], (0, 0)) for i, j in pairs)
    rows = zip(found["preferences"], points, strict=True)
    return {"hypervolume": volume,
            "preferred": mean(sum(w * a for w, a in zip(r, p, strict=True)) for r, p in rows)}


def draw(rows: dict, names: list[str], path: Path) -> None:
    """The outcomes of two tasks; lines join what no other outcome of the same model dominates."""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for colour, (row, found) in zip(COLOURS, rows.items(), strict=False):
        points = found["points"]
        front = sorted(points[at] for at in nondominated(points))
        axes.plot(*zip(*points, strict=True), "*" if row == TRAINED else "o", color=colour, ms=5,
                  alpha=0.6, label=row)  # fmt: skip
        axes.plot(*zip(*front, strict=True), "-", color=colour, alpha=0.8)
    axes.set(xlabel=f"accuracy on {names[0]}", ylabel=f"accuracy on {names[1]}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

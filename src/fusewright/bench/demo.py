"""The demo: train a base and experts, merge them on disk with every method, compare.

Everything lands in one folder: ``models/`` (base, experts and heads of the first seed),
``merged/`` (what each method made of them), ``leaderboard.json``, ``report.html``; ``cache/`` keeps
what was trained. Choices are made on validation images, numbers come from test images.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fusewright.bench.entries import Entry, entries
from fusewright.bench.leaderboard import Leaderboard, Row, measured, without_repeats
from fusewright.bench.progress import Stages, Step
from fusewright.weights.folders import make_folder

if TYPE_CHECKING:
    from torch import Tensor

    from fusewright.bench.digits.evaluate import Outcomes
    from fusewright.bench.digits.store import Trained
    from fusewright.bench.digits.train import Training

SEEDS = (0, 1, 2)
SCALES = (0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Seeds and the grid of scales are declared here, before anything is measured."""

AVERAGE, MERGED = "average", "merged"


def merge_on_disk(
    method: Any, base: Path, experts: Mapping[str, Path], out: Path, durable: bool = True
) -> tuple[Path, float]:
    """Merge through the engine; answers with the folder and the seconds it took."""
    import fusewright as fw

    began = perf_counter()
    fw.merge(method, base=base, experts=experts, out=out, overwrite=True, durable=durable)
    return out, perf_counter() - began


@dataclass
class _Run:
    """What is collected while the demo runs; one list entry for each seed."""

    out: Path
    outcomes: dict[str, list[Outcomes]] = field(default_factory=dict)
    chosen: dict[str, list[float]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: str, outcomes: Outcomes) -> None:
        self.outcomes.setdefault(key, []).append(outcomes)

    def all(self) -> dict[str, Outcomes]:
        """(seeds, tasks, items) of each row."""
        return {key: np.stack(found) for key, found in self.outcomes.items()}


def run_demo(
    out: Path = Path("out/demo"),
    *,
    methods: Sequence[Any] | None = None,
    progress: bool = True,
    training: Training | None = None,
    seeds: Sequence[int] = SEEDS,
) -> Leaderboard:
    """Train (or take from the cache), merge, evaluate, and write leaderboard.json, report.html.

    ``methods`` are written as in recipes; None means every registered one that needs no data and
    gives a plain model. The first of ``seeds``
    is the one whose models stay in ``out``.

    Raises FusewrightError if the extra ``demo`` is not installed, or a merge is refused.
    """
    from fusewright.extras import needs

    for module in ("sklearn", "transformers", "matplotlib", "jinja2"):
        needs(module, "demo")
    from fusewright.bench.digits.model import threads
    from fusewright.bench.digits.tasks import TASKS
    from fusewright.bench.digits.train import Training
    from fusewright.bench.report import write_report

    training, stages, out = training or Training(), Stages(progress), Path(out)
    chosen, left_out = entries(len(TASKS), methods, routed=False)
    make_folder(out)
    clock = [perf_counter()]
    suites = _trained(out, training, seeds, stages)
    clock.append(perf_counter())
    with threads(training.threads), stages.stage("merging", _steps(chosen, suites)) as step:
        run = _measure(out, suites, chosen, step)
    clock.append(perf_counter())
    rows = _rows(run, chosen, tuple(task.name for task in TASKS))
    board = Leaderboard(
        title=f"{len(TASKS)} tasks on handwritten digits, one expert each",
        tasks={task.name: task.question for task in TASKS}, rows=rows, seeds=tuple(seeds),
        items=run.outcomes["base"][0].shape[-1], left_out=left_out, facts=_facts(training),
        seconds={"training": clock[1] - clock[0], "merging and evaluation": clock[2] - clock[1]},
    )  # fmt: skip
    board.save(out / "leaderboard.json")
    write_report(board, out / "report.html")
    return board


def _facts(training: Training) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    import fusewright

    return {
        "training": asdict(training), "scales tried": list(SCALES),
        "fusewright": fusewright.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "processor": platform.machine(),
    }  # fmt: skip


def _trained(
    out: Path, training: Training, seeds: Sequence[int], stages: Stages
) -> list[Trained]:
    """Every seed's models; those of the first are also copied to ``models/``."""
    from fusewright.bench.digits import store

    cache = out / "cache"
    missing = [s for s in seeds if not store.is_trained(cache, training, s)]
    with stages.stage("training", len(missing) * len(store.names())) as step:
        suites = [store.trained(cache, training, seed, step) for seed in seeds]
    shutil.copytree(suites[0].root, out / "models", dirs_exist_ok=True)
    shown = store.Trained(out / "models", suites[0].seed)
    return [shown, *suites[1:]]


def _steps(chosen: Sequence[Entry], suites: Sequence[Trained]) -> int:
    return len(suites) * (1 + len(chosen) + sum(e.scale is not None for e in chosen))


def _measure(
    out: Path, suites: Sequence[Trained], chosen: Sequence[Entry], step: Step
) -> _Run:
    from tempfile import TemporaryDirectory

    run = _Run(out)
    with TemporaryDirectory(prefix="scratch-", dir=out) as scratch:
        for index, suite in enumerate(suites):
            folder = out / MERGED if index == 0 else Path(scratch) / str(suite.seed)
            _references(run, suite)
            step("references")
            for entry in chosen:
                _merge_and_tune(run, suite, entry, folder, step)
    return run


def _references(run: _Run, suite: Trained) -> None:
    """Base, experts, the best that is possible with each, their ensemble, joint training."""
    from fusewright.bench.digits.evaluate import ensemble, logits, outcomes, right
    from fusewright.bench.digits.model import open_model
    from fusewright.bench.digits.tasks import splits

    heads, test = suite.heads(), splits()["test"]
    said = {n: logits(open_model(path), heads, test) for n, path in suite.experts.items()}
    own = {name: right(scores, test) for name, scores in said.items()}
    run.add("base", outcomes(open_model(suite.base), heads, test))
    run.add("ensemble", right(ensemble(list(said.values())), test))
    run.add("multitask", outcomes(open_model(suite.multitask), heads, test))
    run.add("own expert", np.stack([own[task.name][i] for i, task in enumerate(heads)]))
    for name, found in own.items():
        run.add(f"expert {name}", found)


def _merge_and_tune(
    run: _Run, suite: Trained, entry: Entry, folder: Path, step: Step
) -> None:
    _merge_and_measure(run, suite, entry, folder)
    step(entry.key)
    if entry.scale is not None:
        best = _best_scale(suite, entry.scale, folder / entry.key)
        run.chosen.setdefault(entry.key, []).append(best)
        _merge_and_measure(run, suite, entry.scaled(best), folder)
        step(f"{entry.key}, scale chosen")


def _merge_and_measure(run: _Run, suite: Trained, entry: Entry, folder: Path) -> None:
    from fusewright.bench.digits.evaluate import outcomes
    from fusewright.bench.digits.model import open_model
    from fusewright.bench.digits.tasks import splits

    kept = folder.name == MERGED  # what is thrown away at the end need not survive a power cut
    path, seconds = merge_on_disk(
        entry.method, suite.base, suite.experts, folder / entry.key, durable=kept
    )
    run.times.setdefault(entry.key, []).append(seconds)
    run.add(entry.key, outcomes(open_model(path), suite.heads(), splits()["test"]))


def _best_scale(suite: Trained, scale: float, merged: Path) -> float:
    """The scale of the grid with the best mean accuracy on validation images.

    A scale multiplies the merged vector: v(λ) = (λ/λ0) v(λ0), so trials need no new merge; what
    is reported afterwards is merged anew with the scale that was chosen.
    """
    from fusewright.bench.digits.evaluate import outcomes
    from fusewright.bench.digits.model import open_model, with_weights
    from fusewright.bench.digits.tasks import splits

    base, heads, validation = open_model(suite.base), suite.heads(), splits()["validation"]
    start, end = base.state_dict(), open_model(merged).state_dict()

    def score(candidate: float) -> float:
        moved: dict[str, Tensor] = {
            k: start[k] + candidate / scale * (end[k] - start[k]) for k in start
        }
        return float(outcomes(with_weights(base, moved), heads, validation).mean())

    return max(SCALES, key=score)


REFERENCES = {
    "base": ("Base", "pre-trained; reads every task through its frozen head"),
    "own expert": ("Each task's own expert", "needs to know the task of every image"),
    "ensemble": ("Ensemble of all experts", "mean of their predictions; all run on every image"),
    "multitask": ("Trained on all tasks", "joint fine-tuning; needs everybody's data"),
}


def _rows(run: _Run, chosen: Sequence[Entry], tasks: tuple[str, ...]) -> tuple[Row, ...]:
    all_outcomes = run.all()
    own, average = all_outcomes["own expert"], all_outcomes.get(AVERAGE)

    def row(key: str, title: str, requirement: str, **facts: Any) -> Row:
        versus = None if key == AVERAGE or requirement == "expert" else average
        return measured(key, title, requirement, all_outcomes[key], own, tasks, versus, **facts)

    references = [row(k, title, "reference", note=note) for k, (title, note) in REFERENCES.items()]
    experts = [row(f"expert {task}", f"Expert on {task}", "expert", path=f"models/{task}")
               for task in tasks]  # fmt: skip
    merges = [row(e.key, e.title, "none", **_facts_of(run, e)) for e in chosen]
    for e in chosen:
        if e.key in run.chosen:
            found = run.chosen[e.key]
            tuned = e.scaled(found[0])
            facts = _facts_of(run, tuned) | {"chosen": {"scale": found}}
            merges.append(row(tuned.key, e.title, "labelled", **facts))
    return without_repeats([*references, *experts, *merges], all_outcomes)


def _facts_of(run: _Run, entry: Entry) -> dict[str, Any]:
    return {
        "method": entry.method.spec(), "path": f"{MERGED}/{entry.key}",
        "seconds": median(run.times[entry.key]),
    }  # fmt: skip

"""What a sweep consists of: jobs that each make one cell, in groups that share their work."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import comb
from typing import TYPE_CHECKING, Any

import fusewright
from fusewright.bench.benchmarks import digests
from fusewright.bench.corpora import files_of, is_corpus
from fusewright.bench.entries import Entry
from fusewright.bench.results import CLEAN
from fusewright.bench.sweep.ensembles import fitting
from fusewright.bench.sweep.identity import code_digest, digest, files_digest
from fusewright.bench.sweep.joint import TITLES, Recipes, training_key
from fusewright.bench.sweep.space import space
from fusewright.methods.contract import Program, Routed
from fusewright.methods.outputs import ENSEMBLES
from fusewright.methods.pipeline import Pipeline
from fusewright.tasks.data import row_files

if TYPE_CHECKING:
    from pathlib import Path

    from fusewright.bench.joint.recipe import JointRecipe
    from fusewright.bench.suite import Suite
    from fusewright.methods.contract import Method

FORMAT = 1
"""Raised when what a cell means changes, so that older cells are not taken for it."""

BASE, OWN, BEST = "base", "own expert", "best expert"
TUNED = ", tuned"
TEST_INPUTS = ", adapted on test inputs"


@dataclass(frozen=True)
class Pool:
    """Which models a cell is about: a training of the pool, and the experts that are merged."""

    seed: int
    variant: str | None
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One cell to make. ``how`` says what is evaluated: a "model" of the pool (``what``: its
    name), "own expert", "best expert", an "ensemble" (``what``: which), a "merge", a "tuned" one or
    a "transductive" one, adapted on the test inputs (``what``: the method), or "joint" training
    (``what``: how losses are combined; ``training``: the digest of what the trained model depends
    on)."""

    how: str
    row: str
    title: str
    requirement: str
    pool: Pool
    what: Any = None
    trials: int = 0
    training: str = ""
    key: str = ""


Group = tuple[Job, ...]
"""Jobs that one worker does after another, because later ones use what earlier ones found."""


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for, beyond its suite and methods. ``subsets`` are numbers of merged
    experts, each drawn ``draws`` times; all of them are merged anyway. ``conditions`` are
    CLEAN and names of corruptions. ``stream``: how many rows of each merged task to mix into one
    stream, 0 for none. ``transductive``: adapt on the test inputs, too."""

    tune: int = 0
    limit: int | None = None
    subsets: tuple[int, ...] = ()
    draws: int = 3
    conditions: tuple[str, ...] = (CLEAN,)
    joint: tuple[str, ...] = ()
    stream: int = 0
    transductive: bool = False


def groups(
    suites: Sequence[Suite], entries: Sequence[Entry], asked: Asked, recipes: Recipes
) -> list[Group]:
    """Every group of a sweep, each job with its key. ``recipes``: the suites that joint training
    is possible for; it is done for all merged experts' tasks, not for subsets of them."""
    found = []
    for suite in suites:
        models = _digests(suite)
        for number, experts in enumerate(_subsets(suite, asked)):
            pool = Pool(suite.seed, suite.variant, experts)
            parts = [tuple(_references(suite, pool, whole=number == 0))]
            if number == 0 and (recipe := recipes.get((suite.seed, suite.variant))):
                parts += [(_joint(suite, pool, how, recipe, models),) for how in asked.joint]
            parts += [tuple(_merges(entry, pool, asked)) for entry in entries]
            if asked.transductive:
                parts += [(_transductive(entry, pool),) for entry in entries if adapts(entry)]
            found += [tuple(_keyed(j, suite, models, asked) for j in part) for part in parts]
    return found


def _subsets(suite: Suite, asked: Asked) -> Iterator[tuple[str, ...]]:
    """All merged experts, then the draws; the same for every seed of the pool."""
    merged = tuple(suite.spec.merged)
    yield merged
    for size in asked.subsets:
        if size < len(merged):
            yield from _drawn(merged, size, min(asked.draws, comb(len(merged), size)))


def _drawn(merged: tuple[str, ...], size: int, wanted: int) -> Iterator[tuple[str, ...]]:
    """So many different subsets of one size."""
    seen: set[tuple[str, ...]] = set()
    for draw in count():
        if len(seen) == wanted:
            return
        chosen = set(random.Random(f"{size} {draw}").sample(merged, size))
        subset = tuple(name for name in merged if name in chosen)
        if subset not in seen:
            seen.add(subset)
            yield subset


def _references(suite: Suite, pool: Pool, whole: bool) -> Iterator[Job]:
    yield Job("model", BASE, "Base", "reference", pool, BASE)
    for name in suite.spec.experts if whole else pool.experts:
        yield Job("model", f"expert {name}", f"Expert on {name}", "expert", pool, name)
    yield Job(OWN, OWN, "Each task's own expert", "task id", pool)
    yield Job(BEST, BEST, "Best single expert", "expert", pool)
    for name, ensemble in fitting(suite).items():
        yield Job("ensemble", f"ensemble, {name}", ensemble.card.title, "reference", pool, name)
    for row in suite.extras if whole else ():
        yield Job("model", row, row.capitalize(), "reference", pool, row)


def _joint(
    suite: Suite, pool: Pool, how: str, recipe: JointRecipe, models: Mapping[str, str]
) -> Job:
    row, used = f"joint training, {how}", [models[name] for name in (BASE, "heads", "data")]
    training = training_key(suite, recipe, how, used)
    title = f"Joint training, {TITLES[how]}"
    return Job("joint", row, title, "labelled", pool, how, training=training)


def _merges(entry: Entry, pool: Pool, asked: Asked) -> Iterator[Job]:
    requirement = requirement_of(entry.method)
    yield Job("merge", entry.key, entry.title, requirement, pool, entry.method)
    if asked.tune and not learns(entry.method) and space(entry.method):
        row, told = entry.key + TUNED, requirement == "task id"
        yield Job("tuned", row, entry.title + TUNED, requirement if told else "labelled", pool,
                  entry.method, asked.tune)  # fmt: skip


def learns(method: Method) -> bool:
    """Whether a method learns from inputs: its budget are its steps, and it is not tuned."""
    return isinstance(method, Program | Routed) and method.needs != "none"


def adapts(entry: Entry) -> bool:
    """Whether a method learns from inputs without labels."""
    method = entry.method
    return isinstance(method, Program | Routed) and method.needs == "unlabelled"


def _transductive(entry: Entry, pool: Pool) -> Job:
    """The papers' protocol: a method adapts on the very inputs that it is then measured on."""
    return Job("transductive", entry.key + TEST_INPUTS, entry.title + TEST_INPUTS, "transductive",
               pool, entry.method)  # fmt: skip


def requirement_of(method: Method) -> str:
    """The class of a method as it comes: what the most demanding of its stages asks for. To be told
    the task of every input is more than labels to learn from, and those more than to be routed."""
    if isinstance(method, Routed) and method.card.task_id:
        return "task id"
    if isinstance(method, Routed) and method.needs != "labelled":
        return "routed"
    stages = method.chain if isinstance(method, Pipeline) else (method,)
    asked = {stage.needs for stage in stages}
    return next((data for data in ("labelled", "unlabelled") if data in asked), "none")


def _keyed(job: Job, suite: Suite, models: Mapping[str, str], asked: Asked) -> Job:
    said = {
        "format": FORMAT, "fusewright": fusewright.__version__, "suite": suite.spec.digest(),
        "how": job.how, "row": job.row, "trials": job.trials, "limit": asked.limit,
        "seed": job.pool.seed, "variant": job.pool.variant, "axes": suite.axes,
        "experts": job.pool.experts,
        "conditions": asked.conditions, "models": _used(job, models), "data": models["data"],
    }  # fmt: skip
    if asked.stream:  # absent otherwise, so that cells from before have their keys still
        said["stream"] = asked.stream
    if job.how == "tuned":
        said["space"] = {name: asdict(r) for name, r in space(job.what).items()}
    if job.how in ("merge", "tuned", "transductive"):
        said.pop("row")  # which may change with what else is measured
        stages = job.what.chain if isinstance(job.what, Pipeline) else (job.what,)
        parts = [part for s in stages for part in (s, *getattr(s, "stages", tuple)())]
        said |= {"method": job.what.spec(), "code": code_digest([type(part) for part in parts])}
    elif job.how == "ensemble":
        said["code"] = code_digest([ENSEMBLES[job.what]])
    elif job.how == "joint":
        said["training"] = job.training
    return Job(**{**vars(job), "key": digest(said)})


def _used(job: Job, models: Mapping[str, str]) -> list[str]:
    if job.how == "joint":  # trained from the base: the experts' weights are no part of it
        names = [BASE]
    else:
        names = [job.what] if job.how == "model" else [BASE, *job.pool.experts]
    return [models[name] for name in names] + [models["heads"]]


def _head_digest(head: Any) -> str:
    if isinstance(head, Mapping):
        return digest({name: digest(tensor.tolist()) for name, tensor in head.items()})
    return digest(head.tolist())


def _digests(suite: Suite) -> dict[str, str]:
    """The bytes of every model, of the heads, and of the data where they are local files."""
    paths: dict[str, Path] = {BASE: suite.base, **suite.experts, **suite.extras}
    found = {name: files_digest(path) for name, path in paths.items()}
    found["heads"] = digest({name: _head_digest(head) for name, head in suite.heads.items()})
    tasks = suite.spec.tasks.values()
    texts = [files_of(t, suite.data, list(t.splits)) for t in tasks if is_corpus(t)]
    folders = [suite.data / t.data for t in tasks if suite.data and t.data and not is_corpus(t)]
    files = sorted(file for folder in folders for file in row_files(folder))
    found["data"] = digest([*(files_digest(path) for path in files), *texts, *digests(suite)])
    return found

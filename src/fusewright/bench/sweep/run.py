"""A sweep from its suite to its results: what is finished stays, what is missing is made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fusewright
from fusewright.bench.benchmarks import KIND as LM_EVAL
from fusewright.bench.entries import Entry, entries
from fusewright.bench.gathering.check import compared_files, matches
from fusewright.bench.progress import Stages
from fusewright.bench.results import CLEAN, Results
from fusewright.bench.suite import Suite
from fusewright.bench.suite import suite as open_suite
from fusewright.bench.suite_file import SuiteError
from fusewright.bench.suite_tasks import DIGITS
from fusewright.bench.sweep.cells import TEST_INPUTS, Asked, Group, adapts, groups
from fusewright.bench.sweep.ensembles import without_logits
from fusewright.bench.sweep.execute import execute
from fusewright.bench.sweep.identity import digest, files_digest
from fusewright.bench.sweep.joint import DEFAULT, recipes
from fusewright.bench.sweep.joint import chosen as chosen_joint
from fusewright.bench.sweep.layers import layers
from fusewright.bench.sweep.store import Store, remembered, save_results
from fusewright.errors import FusewrightError, RecipeError, nearest
from fusewright.methods.registry import parse_method

ALWAYS = ("average", "task_arithmetic")
"""Merges that every sweep holds: what others are compared with."""
ROWS = "rows.json"
"""Keeps whether the data are the published rows."""


def bench(
    suite: Suite | str | Path,
    methods: Sequence[Any] | None = None,
    *,
    out: str | Path | None = None,
    tune: int = 0,
    seeds: int | Sequence[int] | None = None,
    limit: int | None = None,
    pool: str | Path | None = None,
    data: str | Path | None = None,
    variants: Sequence[str | None] | None = None,
    subsets: Sequence[int] = (),
    draws: int = 3,
    corruptions: bool | Sequence[str] = False,
    joint: str | Sequence[str] = DEFAULT,
    mixed_stream: int = 0,
    transductive: bool = False,
    jobs: int = 1,
    device: str = "cpu",
    progress: bool = True,
) -> Results:
    """Merge a suite's experts with every method and measure all of them on all tasks.

    ``methods`` are written as in recipes (all registered ones that fit, if not given); base,
    experts, ensembles, average, task arithmetic and joint training are always there. ``out`` keeps
    finished cells: the same call again makes only what is missing, and a changed method only
    itself. ``tune`` spends so many trials on validation rows for each method with something to
    tune. ``seeds``: how many of the pool's trainings, or which (the first). ``limit``: the most
    rows of each split. ``variants``: which kinds of the suite's models (None is the plain one).
    ``subsets``: numbers of experts to merge besides all, each drawn ``draws`` times.
    ``corruptions``: measure on corrupted pictures and texts too (all kinds that the suite's tasks
    can have, or those named). ``joint``: ways to train on all merged tasks together, with as many
    steps as their experts took ("sum", "pcgrad", …, "all", "none"); the plain sum by default,
    which costs what training the experts did, and each other way as much again.
    ``mixed_stream``: also ask the first so many test rows of each merged task in one stream, mixed,
    one row at a time (0: not). ``transductive``: methods that learn from unlabelled inputs also
    adapt on the test inputs, as their papers do, in rows of their own that are not ranked.
    ``jobs``: worker processes. ``device``: where models are trained and asked; merges are computed
    on the CPU, and an open suite has a device of its own.

    Raises SuiteError, RecipeError, and OutputError if another sweep writes to ``out``; a method
    that fails is left out, and ``facts["failed"]`` says why.
    """
    first = _opened(suite, pool, data, device)
    asked = Asked(tune, limit, tuple(subsets), draws, _conditions(first, corruptions),
                  chosen_joint(joint), mixed_stream, transductive)  # fmt: skip
    _check(asked, first)
    suites = _suites(first, seeds, variants)
    chosen, left_out = _entries(first, methods)
    for one in suites:
        if one.spec.is_trained:
            one.build(progress)
        one.check()
    how, not_trained = recipes(suites, asked.joint)
    left_out |= not_trained | _not_combined(first)
    if transductive and not any(map(adapts, chosen)):
        left_out["rows" + TEST_INPUTS] = "no method here learns from unlabelled inputs"
    work = groups(suites, chosen, asked, how)
    with _folder(out) as folder:
        return _swept(folder, suites, work, asked, left_out, jobs, progress)


def _opened(
    suite: Suite | str | Path, pool: str | Path | None, data: str | Path | None, device: str
) -> Suite:
    if not isinstance(suite, Suite):
        return open_suite(suite, pool=pool, data=data, device=device)
    if device not in ("cpu", suite.device):
        raise RecipeError("an open suite has its device", expected=suite.device, found=device,
                          fix=f"fw.suite(NAME, device={device!r})")  # fmt: skip
    return suite


def _swept(
    folder: Path, suites: Sequence[Suite], work: list[Group], asked: Asked,
    left_out: Mapping[str, str], jobs: int, progress: bool,
) -> Results:  # fmt: skip
    store = Store(folder)
    lock = store.lock()
    try:
        began = perf_counter()
        pending = [g for g in work if not all(store.is_finished(job.key) for job in g)]
        with Stages(progress).stage("sweep", sum(map(len, pending))) as step:
            failed = execute(store, suites, pending, asked, jobs, step)
        finished = {j.key: j for group in work for j in group if store.is_finished(j.key)}
        for key, job in finished.items():
            store.classify(key, row=job.row, title=job.title, requirement=job.requirement)
        keys = list(finished)
        facts = {
            **_facts(suites, asked), **_published(suites[0], folder),
            **_by_layer(suites[0], folder),
            "left out": dict(left_out), "failed": failed, "seconds": perf_counter() - began,
        }  # fmt: skip
        results = _results(suites[0], tuple(store.load(key) for key in keys), facts)
        save_results(folder, results, keys)
        return results
    finally:
        lock.release()


def _results(suite: Suite, cells: tuple[Any, ...], facts: Mapping[str, Any]) -> Results:
    spec = suite.spec
    questions = {name: task.question for name, task in spec.tasks.items()}
    return Results(
        suite.name, spec.title, questions, tuple(spec.merged), tuple(spec.unseen), cells, facts
    )


def _conditions(suite: Suite, corruptions: bool | Sequence[str]) -> tuple[str, ...]:
    if not corruptions:
        return (CLEAN,)
    known = list(dict.fromkeys(name for task in suite.tasks.values() for name in task.conditions))
    names = known if corruptions is True else corruptions
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise RecipeError("no task of the suite can be corrupted so", where=suite.name,
                              expected=", ".join(known) or "no corruptions", found=name,
                              fix=f"write {close}" if close else None)  # fmt: skip
    if not known:
        raise RecipeError("the suite's tasks cannot be corrupted", where=suite.name,
                          expected="pictures, or texts with classes", fix="no --corruptions")
    return (CLEAN, *names)


def _check(asked: Asked, suite: Suite) -> None:
    count = len(suite.spec.merged)
    if asked.tune < 0 or (asked.limit is not None and asked.limit < 1):
        raise SuiteError("a number is too small", expected="tune >= 0, limit >= 1",
                         found=f"tune={asked.tune}, limit={asked.limit}")  # fmt: skip
    if asked.stream < 0 or asked.stream == 1 or (asked.stream and asked.limit == 1):
        raise SuiteError("a stream is of two rows of each task or more, for its interval",
                         expected="mixed_stream >= 2, or 0 for none", found=asked.stream,
                         fix="--mixed-stream 250")  # fmt: skip
    for name, task in suite.spec.tasks.items():
        if task.kind != DIGITS:  # which have all
            for part in ("validation", "test") if name in suite.spec.merged else ("test",):
                task.rows(name, part)
    odd = [size for size in asked.subsets if not 2 <= size < count]
    if odd:
        raise SuiteError("a subset has at least two experts, and fewer than all",
                         expected=f"2 to {count - 1}", found=odd)  # fmt: skip


def _suites(
    first: Suite, seeds: int | Sequence[int] | None, variants: Sequence[str | None] | None
) -> list[Suite]:
    """The suite at every seed and variant asked for; prepared inputs are shared."""
    chosen = first.seeds(seeds) if isinstance(seeds, int) else seeds or [first.seed]
    return [first.at(seed, v) for v in variants or [first.variant] for seed in chosen]


def _entries(suite: Suite, methods: Sequence[Any] | None) -> tuple[list[Entry], dict[str, str]]:
    asked = methods
    if methods is not None:
        named = {parse_method(spec).name for spec in methods}
        asked = [*(name for name in ALWAYS if name not in named), *methods]
    return entries(len(suite.spec.merged), asked)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="fusewright-bench-") as folder:
        yield Path(folder)


def _by_layer(suite: Suite, folder: Path) -> dict[str, Any]:
    """The task vectors of one training of the pool; the sweep does not fail for want of it."""
    try:
        rows = layers(suite, folder)
    except FusewrightError as error:
        return {"layers of": f"not known: {error}"}
    count = len(suite.spec.merged)
    chance = f"unrelated signs of {count} would conflict in {1 - 2 ** (1 - count):.1%}"
    return {"layers": rows, "layers of": f"seed {suite.seed}, {count} merged experts; {chance}"}


def _not_combined(suite: Suite) -> dict[str, str]:
    """Why there is no output ensemble, by row."""
    found = ", ".join(without_logits(suite))
    return {"ensembles of outputs": f"{found}: answers are not made from logits"} if found else {}


def _items(suite: Suite) -> dict[str, str]:
    """Which tasks ask about the same test rows: a name for each set of them."""
    found = {}
    for name, task in suite.spec.tasks.items():
        rows = task.data or task.hub or (
            task.options.get("task", name) if task.kind == LM_EVAL else ""
        )
        found[name] = f"{task.kind} {rows} {task.splits.get('test', '')}".strip()
    return found


def _published(suite: Suite, folder: Path) -> dict[str, Any]:
    """Whether the data are the rows that others can have too: looked at once, while files stay as
    they are."""
    files = compared_files(suite.spec, suite.data)
    if not files:
        return {}
    key = digest([files_digest(file) if file.is_file() else None for file in files])
    said = remembered(folder / ROWS, key, lambda: matches(suite.spec, suite.data))
    return {"data": said}


def _facts(suites: Sequence[Suite], asked: Asked) -> dict[str, Any]:
    packages = {}
    for package in ("torch", "transformers", "numpy", "optuna", "lm_eval"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["fusewright", *sys.argv[1:]])
        if Path(sys.argv[0]).name in ("fusewright", "__main__.py") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite digest": suites[0].spec.digest(),
        "seeds": [one.seed for one in suites], "variants": [one.variant for one in suites],
        "trials": asked.tune, "limit": asked.limit, "subsets": list(asked.subsets),
        **({"mixed stream": f"{asked.stream} rows of each merged task"} if asked.stream else {}),
        "licence": suites[0].spec.licence, "items": _items(suites[0]),
        "versions": {"fusewright": fusewright.__version__, **packages,
                     "python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        + ("" if suites[0].device == "cpu" else f", {suites[0].device}"),
    }  # fmt: skip

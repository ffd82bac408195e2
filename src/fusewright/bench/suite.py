"""A suite opened: its models, heads, tasks and splits, from a notebook as from the command."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from fusewright.bench.results import CLEAN
from fusewright.bench.suite_file import (
    SuiteError,
    SuiteSpec,
    TaskSpec,
    find_suite,
    read_suite,
)
from fusewright.devices import checked
from fusewright.errors import nearest

if TYPE_CHECKING:
    from torch import nn

    from fusewright.tasks.adaptation import Adaptation, Question
    from fusewright.tasks.dense_maps import Head
    from fusewright.tasks.outcomes import Outcomes
    from fusewright.tasks.task import Batch, Split, Task

BATCH = 256
"""Items an evaluation sees at once; it changes no score beyond rounding."""
CACHED_BYTES = 2 * 2**30
"""Prepared inputs of all tasks that stay in memory; larger splits are prepared anew each time."""


def suite(
    name: str | Path,
    *,
    pool: str | Path | None = None,
    data: str | Path | None = None,
    seed: int | None = None,
    variant: str | None = None,
    device: str = "cpu",
) -> Suite:
    """Open a suite by its name or file.

    ``pool`` is the folder of its models (by default in the cache, see ``fusewright suite build``),
    ``data`` that of its data sets (FUSEWRIGHT_DATA, else the Hub). ``seed`` chooses among the
    pool's trainings (the suite's first), ``variant`` among its kinds of models. ``device``: where
    models are trained and asked.

    Raises SuiteError if there is no such suite, seed or variant, or it is not understood,
    RecipeError for a device that is not there.
    """
    path = find_suite(name)
    return Suite(
        path.stem, read_suite(path), None if pool is None else Path(pool), data, seed, variant,
        device, str(name),
    )  # fmt: skip


class Suite:
    """Models and tasks; nothing is opened before it is asked for. ``called``: what it was opened
    by, its name or its file, as commands take it; its name."""

    def __init__(
        self, name: str, spec: SuiteSpec, pool: Path | None = None, data: str | Path | None = None,
        seed: int | None = None, variant: str | None = None, device: str = "cpu",
        called: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.spec, self.called = name, spec, called or name
        self.device = "cpu" if device == "cpu" else str(checked(device))
        self.seed = spec.seeds[0] if seed is None else seed
        self.variant = variant
        self.pool = pool or _default_pool(*_trainer(name, spec))
        given = data or os.environ.get("FUSEWRIGHT_DATA")
        self.data = Path(given) if given else None
        if variant is not None and variant not in spec.variants:
            raise self._unknown("variant", variant, spec.variants)
        if self.seed not in spec.seeds:
            raise self._unknown("seed", self.seed, spec.seeds)
        self._inputs = _Inputs()

    def __repr__(self) -> str:
        return f"<suite {self.name}, seed {self.seed}: {len(self.spec.merged)} tasks merged>"

    @property
    def root(self) -> Path:
        """The folder of this seed's models."""
        return self.pool / f"seed-{self.seed}"

    def seeds(self, count: int) -> list[int]:
        """The first so many trainings of the pool. Raises SuiteError if there are other numbers."""
        known = self.spec.seeds
        if not 1 <= count <= len(known):
            raise SuiteError(f"the suite {self.name!r} has other numbers of seeds",
                             expected=f"1 to {len(known)}", found=count)  # fmt: skip
        return known[:count]

    def at(self, seed: int, variant: str | None = None) -> Suite:
        """The same suite, of another training of the pool; :meth:`ready` inputs are shared."""
        other = Suite(
            self.name, self.spec, self.pool, self.data, seed, variant, self.device, self.called
        )
        other._inputs = self._inputs
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        said = self.name, self.spec, self.pool, self.data, self.seed, self.variant, self.device
        return Suite, (*said, self.called)

    @cached_property
    def trainer(self) -> Suite:
        """The suite that trains these models: this one, or that which ``models_of`` names."""
        if self.spec.models_of is None:
            return self
        name, spec = _trainer(self.name, self.spec)
        return Suite(name, spec, self.pool, self.data, self.seed, self.variant, self.device)

    @property
    def models(self) -> dict[str, Any]:
        """What the suite, or its variant, calls its "base", "experts" and "heads"."""
        said: dict[str, Any] = {
            key: getattr(self.spec, key) for key in ("base", "experts", "heads")
        }
        if self.variant is not None:
            own = self.spec.variants[self.variant]
            said |= {k: v for k in said if (v := getattr(own, k)) is not None}
        return said

    @property
    def axes(self) -> dict[str, str]:
        """What cells say of these models: {"size": "small", "tuning": "LoRA"}; a variant that says
        nothing of itself is told apart by its name."""
        if self.variant is None:
            return dict(self.spec.axes)
        own = self.spec.variants[self.variant].axes or {"variant": self.variant}
        return {**self.spec.axes, **own}

    @cached_property
    def base(self) -> Path:
        return self.model(self.models["base"])

    @cached_property
    def experts(self) -> dict[str, Path]:
        found = {name: self.model(ref) for name, ref in self.models["experts"].items()}
        if not self.spec.crop_vocabulary:
            return found
        from fusewright.bench.vocabulary import cropped

        folder = self.pool / "cropped"
        return {n: cropped(p, self.base, self.spec.opens, folder) for n, p in found.items()}

    @cached_property
    def extras(self) -> dict[str, Path]:
        """More models by row (joint training); those that the pool has."""
        found = {row: self.root / ref for row, ref in self.spec.extras.items()}
        return {row: path for row, path in found.items() if path.is_dir()}

    def model(self, ref: str) -> Path:
        """Where a model lies that the suite names; fetched if it is on the Hub."""
        if not self.spec.is_trained:
            return _from_hub(ref, self.pool)
        path = self.root / ref
        if not path.exists():
            earlier = self.spec.seeds.index(self.seed)  # --seeds says how many
            raise SuiteError(
                f"a model of the suite {self.name!r} is missing", where=path,
                expected="a model's folder", found="nothing",
                fix=f"fusewright suite build {quote(self.called)} --pool '{self.pool}'"
                    f"{'' if self.variant is None else f' --variant {self.variant}'}"
                    f"{'' if not earlier else f' --seeds {earlier + 1}'}",
            )  # fmt: skip
        return path

    @cached_property
    def heads(self) -> Mapping[str, Head]:
        """The frozen head of each task that has one: (classes, width), or a decoder's tensors."""
        if self.spec.zero_shot is not None:
            from fusewright.bench.zero_shot import text_heads

            return text_heads(self, self.model(self.spec.zero_shot.model))
        from fusewright.bench.stored_heads import heads_of_experts, stored_heads

        if self.spec.own_heads is not None:
            return heads_of_experts(self)
        ref = self.models["heads"]
        return {} if ref is None else stored_heads(self, self.model(ref), ref)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Every task, ready to ask a model."""
        from fusewright.bench.suite_tasks import make_task

        return {name: make_task(self, name) for name in self.spec.tasks}

    def task_spec(self, task: str) -> TaskSpec:
        if task not in self.spec.tasks:
            raise self._unknown("task", task, self.spec.tasks)
        return self.spec.tasks[task]

    def split(self, task: str, part: str = "test") -> Split:
        """A task's ``train``, ``validation`` or ``test`` rows. Raises SuiteError if it is empty."""
        from fusewright.bench import benchmarks
        from fusewright.bench.suite_tasks import open_split

        spec = self.task_spec(task)
        found: Split = (
            benchmarks.open_documents(self, task, part) if spec.kind == benchmarks.KIND
            else open_split(task, spec, part, self.data)
        )  # fmt: skip
        if not len(found):
            raise SuiteError(f"the {part} split of {task!r} is empty", where=self.name,
                             expected="at least one row",
                             found=self.task_spec(task).splits.get(part))  # fmt: skip
        return found

    def asked(self, task: str, condition: str = CLEAN) -> Task:
        """A task, of clean inputs or under one of its ``conditions``."""
        self.task_spec(task)
        clean = self.tasks[task]
        return clean if condition == CLEAN else clean.under(condition)

    def ready(
        self, task: str, part: str = "test", limit: int | None = None, condition: str = CLEAN
    ) -> Split:
        """A split whose rows are decoded, resized or tokenised already, as long as they fit in
        memory; seeds of the pool share them, variants where their base is the same."""
        asked, split = self.asked(task, condition), self.split(task, part)
        return self._inputs.of((self.models["base"], task, part, limit, condition), asked, split,
                               limit)  # fmt: skip

    def unlabelled(
        self, size: int = 32, *, part: str = "validation", seed: int = 0, limit: int | None = None
    ) -> Adaptation:
        """The merged tasks' rows without their labels, to learn from: shuffled batches of each, and
        how the suite's models answer them. Iterating gives batches of all tasks in turn."""
        from fusewright.tasks.adaptation import Adaptation

        asked = {name: self._question(name, part, limit) for name in self.spec.merged}
        return Adaptation(asked, self._opened, size, seed, self.spec.opens.arguments, self.heads)

    def labelled(
        self, size: int = 32, *, part: str = "train", seed: int = 0, limit: int | None = None
    ) -> Adaptation:
        """As :meth:`unlabelled`, with the labels, and of the rows that experts learned from."""
        from fusewright.tasks.adaptation import Adaptation

        asked = {name: self._question(name, part, limit, labels=True) for name in self.spec.merged}
        return Adaptation(asked, self._opened, size, seed, self.spec.opens.arguments, self.heads)

    def _question(
        self, name: str, part: str, limit: int | None, labels: bool = False
    ) -> Question:
        from fusewright.tasks.adaptation import Question

        task = self.tasks[name]

        def epoch(size: int, seed: int) -> Iterator[Batch]:
            rows = self.ready(name, part, limit)
            for batch in task.batches(rows, size, seed=seed, limit=limit):
                if labels:
                    yield {**batch, "labels": task.targets(batch)}
                else:
                    yield {key: value for key, value in batch.items() if key not in task.compared}

        pictures = getattr(task, "pictures", None)
        return Question(name, task.answered, epoch, pictures, task.in_numbers)

    def _opened(self) -> tuple[nn.Module, Mapping[str, str]]:
        from fusewright.bench.exchange import Exchange

        module = self.open(self.base)
        return module, Exchange(module, self.base, self.spec.opens).names

    def open(self, path: str | Path) -> nn.Module:
        """A model as a module in evaluation mode, made by the library that ``opens`` names; an
        adapter is added to its base, and a routed model's layers are put into the base's module.
        Raises WeightsError for what is not there."""
        from fusewright.bench.opening import open_model
        from fusewright.engine.routed_folder import load_routed
        from fusewright.weights.locate import is_routed
        from fusewright.weights.open import found_path

        path = found_path(path)
        if is_routed(path):
            return load_routed(path, self.open(self.base))
        if not (path / "adapter_config.json").is_file():
            return open_model(path, self.spec.opens)
        from fusewright.bench.exchange import Exchange
        from fusewright.engine import merge

        whole = merge({"task_arithmetic": {"scale": 1.0}}, base=self.base, experts=[path])
        empty = Exchange(self.open(self.base), self.base, self.spec.opens)
        return empty.filled(whole.state_dict())

    def evaluate(
        self, model: nn.Module | str | Path, task: str, split: str = "test",
        limit: int | None = None, condition: str = CLEAN,
    ) -> Outcomes:  # fmt: skip
        """What a module, or the model of a folder, does on each item of a task."""
        asked = self.asked(task, condition)
        from fusewright.tasks.evaluate import evaluate

        module = self.open(model) if isinstance(model, str | Path) else model
        ready = self.ready(task, split, limit, condition)
        return evaluate(module, asked, ready, batch_size=BATCH, device=self.device, limit=limit)

    def build(self, progress: bool = True) -> None:
        """Train this seed's models, if they are not there yet. SuiteError if nothing builds it."""
        from fusewright.bench.suite_tasks import build_pool

        build_pool(self.trainer, progress)

    def check(self) -> None:
        """Everything that can be refused before anything runs: models, heads, tasks."""
        _ = self.base, self.experts, self.tasks

    def _unknown(self, what: str, name: str | int, known: Iterable[str | int]) -> SuiteError:
        has = [str(one) for one in known]
        close = nearest(name, has) if isinstance(name, str) else None
        return SuiteError(f"the suite {self.name!r} has no {what} {name!r}",
                          expected=", ".join(has) or f"no {what}",
                          fix=f"did you mean {close!r}?" if close else None)  # fmt: skip


def _trainer(name: str, spec: SuiteSpec) -> tuple[str, SuiteSpec]:
    """The suite that trains a suite's models. Raises SuiteError if that one trains none."""
    if spec.models_of is None:
        return name, spec
    path = find_suite(spec.models_of)
    other = read_suite(path)
    if other.build is None:
        raise SuiteError(f"the suite {name!r} has its models of a suite that trains none",
                         where="models_of", expected="a suite with a build", found=path.stem)
    return path.stem, other


def _default_pool(name: str, spec: SuiteSpec) -> Path:
    """Where a suite's models lie if nobody says: FUSEWRIGHT_POOLS/NAME, or the user's cache."""
    given = os.environ.get("FUSEWRIGHT_POOLS")
    if given:
        return Path(given) / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fusewright" / "pools" / f"{name}-{spec.pool_digest()}"


def _from_hub(ref: str, pool: Path) -> Path:
    """A copy in the pool's folder (by its last name), a local path, or a snapshot of the Hub."""
    for path in (pool / ref.split("@")[0].rsplit("/", 1)[-1], Path(ref)):
        if path.exists():
            return path
    from fusewright.weights.hub import fetch

    return fetch(ref)


class _Inputs:
    """Prepared splits that stay in memory, as long as they fit into CACHED_BYTES."""

    def __init__(self) -> None:
        self._kept: dict[Any, Split] = {}
        self._free = CACHED_BYTES

    def of(self, key: Any, task: Task, split: Split, limit: int | None) -> Split:
        if key not in self._kept:
            prepare = getattr(task, "prepared", None)
            if prepare is None:
                return split
            rows = len(task.ready(split))
            first = sum(_sizes(prepare(split, 1).rows([0])["example"][0]))
            needed = first * (rows if limit is None else min(limit, rows))
            if needed > self._free:
                return split
            self._kept[key], self._free = prepare(split, limit), self._free - needed
        return self._kept[key]


def _sizes(example: Any) -> Iterator[int]:
    """Bytes of the arrays and lists in an example, about."""
    if hasattr(example, "nbytes"):
        yield example.nbytes
    elif isinstance(example, Mapping):
        yield from (size for value in example.values() for size in _sizes(value))
    elif isinstance(example, list | tuple):
        yield from (size for value in example for size in _sizes(value))
    else:
        yield 32

"""From a suite's words to things: tasks by kind, splits, and pools that are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench import benchmarks
from fusewright.bench.suite_file import SuiteError, TaskSpec
from fusewright.errors import nearest
from fusewright.extras import needs

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Split, Task

DIGITS = "digits"
KINDS = {
    DIGITS: ("fusewright.bench.digits.task", "DigitsTask"),
    "image-classification": ("fusewright.tasks.image_classification", "ImageClassification"),
    "text-classification": ("fusewright.tasks.text_classification", "EncoderClassification"),
    "decoder-classification": ("fusewright.tasks.text_classification", "DecoderClassification"),
    "text-to-text-classification": ("fusewright.tasks.verbalisers", "VerbaliserClassification"),
    "generation": ("fusewright.tasks.generation", "Generation"),
    "language-modelling": ("fusewright.tasks.language_modelling", "LanguageModelling"),
    benchmarks.KIND: ("fusewright.tasks.harness", "LmEval"),
    "segmentation": ("fusewright.tasks.dense_prediction", "Segmentation"),
    "depth": ("fusewright.tasks.dense_prediction", "Depth"),
    "normals": ("fusewright.tasks.dense_prediction", "Normals"),
}
"""Where the class of each kind of task lives."""


def make_task(suite: Suite, name: str) -> Task:
    """A task of its kind, given its head, the classes of its data and the suite's ``options``.

    Raises SuiteError for a kind that is not known, or options that its kind does not take.
    """
    spec = suite.spec.tasks[name]
    if spec.kind not in KINDS:
        close = nearest(spec.kind, list(KINDS))
        raise SuiteError(f"the task {name!r} is of no known kind", found=spec.kind,
                         expected=", ".join(KINDS),
                         fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    module, attribute = KINDS[spec.kind]
    cls = getattr(import_module(module), attribute)
    given = taken(spec.options)
    asked = {field.name for field in fields(cls)}
    if "benchmark" in asked:
        own = benchmarks.options()
        given = {option: value for option, value in given.items() if option not in own}
        given["benchmark"] = benchmarks.benchmark(suite, name)
    if "head" in asked and name in suite.heads:
        given["head"] = suite.heads[name]
    if "classes" in asked:
        given["classes"] = classes_of(suite, name)
    if "tokenizer" in asked:
        given["tokenizer"] = needs("transformers", "demo").AutoTokenizer.from_pretrained(suite.base)
    if suite.spec.zero_shot is not None and "projection" in asked:
        from fusewright.bench.zero_shot import reading

        given.pop("templates", None)
        given |= reading(suite.model(suite.spec.zero_shot.model), suite.spec.opens)
    if "preparation" in asked:
        from fusewright.bench.preparing import preparation

        given["preparation"] = preparation(suite, given.get("preparation"))
    task: Task = of_class(cls, name, given)
    return task


def of_class(cls: Any, name: str, given: Mapping[str, Any]) -> Any:
    """A task of a class. Raises SuiteError for options that it does not take."""
    try:
        return cls(name=name, **given)
    except TypeError as error:
        asked = {field.name for field in fields(cls)}
        raise SuiteError(f"the task {name!r} cannot be made", where=f"tasks.{name}.options",
                         expected=", ".join(sorted(asked - {"name"})),
                         found=error) from error  # fmt: skip


def taken(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a suite says, as tasks take it: lists are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()}  # fmt: skip


def classes_of(suite: Suite, name: str) -> tuple[str, ...]:
    """The class names that the suite gives, else those of the test data, else numbers."""
    spec = suite.spec.tasks[name]
    if spec.named is not None:
        return tuple(spec.named)
    named = getattr(suite.split(name, "test"), "classes", None)
    if named is not None:
        return tuple(named)
    from fusewright.bench.stored_heads import classes_in

    said = spec.classes if isinstance(spec.classes, int) else 0
    count = said or (0 if suite.spec.zero_shot else classes_in(suite.heads.get(name)))
    if not count:
        raise SuiteError(f"nothing names the classes of {name!r}",
                         fix=f"tasks: {{{name}: {{classes: [...]}}}}")  # fmt: skip
    return tuple(map(str, range(count)))


def open_split(name: str, spec: TaskSpec, part: str, data: Path | None) -> Split:
    """One part of a task's data. Raises SuiteError if the suite does not have it, DataError if it
    cannot be read."""
    if spec.kind == DIGITS:
        from fusewright.bench.digits.task import DigitsSplit

        return DigitsSplit.of(part)
    said = spec.rows(name, part)
    from fusewright.bench.corpora import is_corpus, open_corpus

    if is_corpus(spec):
        return open_corpus(spec, part, data)
    from fusewright.tasks.data import DataSource
    from fusewright.tasks.data import open_split as open_data

    classes = tuple(spec.classes) if isinstance(spec.classes, list) else None
    source = DataSource.model_validate({
        "folder": spec.data, "hub": spec.hub and _pinned(spec), "config": spec.config,
        "columns": spec.columns, "classes": classes, "shuffle": spec.shuffle,
        "groups": spec.groups,
    })  # fmt: skip
    return open_data(source, said, data)


def _pinned(spec: TaskSpec) -> str:
    return f"{spec.hub}@{spec.revision}" if spec.revision else str(spec.hub)


def build_pool(suite: Suite, progress: bool) -> None:
    """Train the models of one seed, those of the suite's variant, into the pool's folder."""
    if suite.spec.build is None:
        raise SuiteError(f"the suite {suite.name!r} uses public models: there is nothing to build",
                         fix=f"fusewright bench {suite.name} -o results/")  # fmt: skip
    if suite.spec.build.builder == DIGITS:
        from fusewright.bench.digits.pool import build_digits

        build_digits(suite, progress)
        return
    from fusewright.bench.pools import build

    spec = suite.spec.model_copy(update={"experts": suite.models["experts"]})
    build(spec, suite.root, suite.data, suite.seed, progress, suite.device)

"""Tasks of the kind lm-eval in a suite: which benchmark, and which of its documents.

``data`` is a task file below the data folder; without it ``options: {task: NAME}`` (else the
suite's own name of the task) is a benchmark that lm-eval brings. Splits are slices of the documents
that lm-eval scores, ``{validation: "all[:50]", test: "all[50:]"}``. ``options: {chat: true}``
writes prompts in the chat template of the base's tokenizer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fusewright.bench.suite_file import SuiteError
from fusewright.errors import nearest

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite
    from fusewright.tasks.harness_documents import Benchmark
    from fusewright.tasks.rows import DataSplit

KIND, WHOLE = "lm-eval", "all"


def options() -> set[str]:
    """What a suite may say of a benchmark, beside how it is scored."""
    from fusewright.tasks.harness_documents import Benchmark

    return {field.name for field in fields(Benchmark)} - {"file", "root"}


def benchmark(suite: Suite, name: str) -> Benchmark:
    """The benchmark of a task. Raises SuiteError for an option that is not known, and if it needs a
    data folder and there is none."""
    from fusewright.tasks.harness import LmEval
    from fusewright.tasks.harness_documents import Benchmark

    spec, data = suite.task_spec(name), suite.data
    scoring = {field.name for field in fields(LmEval)} - {"name", "benchmark", "tokenizer"}
    known = options() | scoring
    for option in spec.options:
        if option not in known:
            close = nearest(option, sorted(known))
            raise SuiteError(f"tasks of the kind {KIND} have no option {option!r}",
                             where=f"tasks.{name}.options", expected=", ".join(sorted(known)),
                             fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    said: dict[str, Any] = {k: v for k, v in spec.options.items() if k in options()}
    said["chat"] = suite.base if said.pop("chat", False) else None
    if spec.data is None:
        return Benchmark(**{"task": name, **said}, root=data)
    if data is None:
        raise SuiteError(
            f"the task file of {name!r} lies in a data folder, and none was given",
            where=spec.data, fix="--data DIR, or export FUSEWRIGHT_DATA=DIR",
        )  # fmt: skip
    return Benchmark(**said, file=data / spec.data, root=data)


def open_documents(suite: Suite, name: str, part: str) -> DataSplit:
    """One part of a benchmark's documents. Raises SuiteError for a split that is no part of them,
    DataError if it is empty."""
    from fusewright.tasks.data import sliced

    said = suite.task_spec(name).rows(name, part)
    if said.split("[")[0].strip() != WHOLE:
        raise SuiteError(
            f"the {part} split of {name!r} is no part of lm-eval's documents",
            expected=f"{WHOLE}, or a slice such as {WHOLE}[:50]", found=said,
        )  # fmt: skip
    return sliced(benchmark(suite, name).documents(), said)


def digests(suite: Suite) -> list[str]:
    """Of the documents and settings of every benchmark of a suite."""
    tasks = [name for name, spec in suite.spec.tasks.items() if spec.kind == KIND]
    return [benchmark(suite, name).documents().digest() for name in tasks]

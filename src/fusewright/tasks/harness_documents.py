"""Documents of lm-eval's tasks: of benchmarks that it brings, or of a task file of one's own.

A task file is a YAML as lm-eval documents it. Its ``data_files`` may be relative: they are looked
for beside the file, then in the data folder. Functions that it names (``!function``) are run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fusewright.errors import nearest
from fusewright.extras import needs
from fusewright.tasks.errors import DataError
from fusewright.tasks.rows import DataSplit, Labels

EXTRA = "lm-eval"
OWN_FILES = ("data_files", "data_dir")


@dataclass(frozen=True)
class Benchmark:
    """Which of lm-eval's tasks, and how its prompts are made.

    ``task`` is its name there; None takes the one that ``file`` (a YAML) holds. ``root`` is the
    data folder. ``fewshot`` examples precede each question (None: as many as the task says), drawn
    by ``seed`` (lm-eval's own 1234); ``max_new_tokens`` overrules the task's length of answers.
    ``chat``: the folder of a tokenizer in whose chat template prompts are written (None: as plain
    text), with ``system`` said first, and with examples as turns of their own if ``turns``.
    """

    task: str | None = None
    file: Path | None = None
    root: Path | None = None
    fewshot: int | None = None
    seed: int = 1234
    max_new_tokens: int | None = None
    chat: Path | None = None
    system: str | None = None
    turns: bool = True

    def documents(self) -> Documents:
        """The documents that lm-eval would score: the test split, else the validation split.

        They are opened once a process, as long as the task file and its neighbours do not change.
        Raises DataError if there is no such task, or its data cannot be had.
        """
        return _documents(self, _stamps(self.file))

    def __str__(self) -> str:
        return f"lm-eval's {self.task}" if self.file is None else str(self.file)


class Documents(DataSplit):
    """An lm-eval task's documents in their order. A document's prompt is that of lm-eval's own run
    over all documents, whichever part of them is asked for."""

    def __init__(self, benchmark: Benchmark) -> None:
        with quietly():
            self.task = _opened(benchmark)
            self.docs = self.task.eval_docs
        self.name, self.classes = str(benchmark), None
        self._requests: list[list[Any]] = []
        self._chat = _chat(benchmark)
        self._said = {"system": benchmark.system, "turns": benchmark.turns}
        self.task.set_fewshot_seed(benchmark.seed)

    def __len__(self) -> int:
        return len(self.docs)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        """Column "requests": what a model is asked about each document, by lm-eval's instances."""
        for number in range(len(self._requests), max(numbers, default=-1) + 1):
            self._requests.append(self._made(number))  # in order: examples are drawn one by one
        return {"requests": [self._requests[n] for n in numbers]}

    def _made(self, number: int) -> list[Any]:
        task, doc = self.task, self.docs[number]
        chat = {"apply_chat_template": self._chat is not None, "chat_template": self._chat}
        context = task.fewshot_context(
            doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc),
            system_instruction=self._said["system"], fewshot_as_multiturn=self._said["turns"],
            **chat,
        )  # fmt: skip
        said = task.config.task, number, task.config.repeats
        found = task.construct_requests(doc=doc, ctx=context, metadata=said, **chat)
        return sorted(found, key=lambda r: r.idx) if isinstance(found, list) else [found]

    def labels(self) -> Labels:
        raise DataError("documents of lm-eval have no labels here", where=self.name,
                        fix="score them with a task of the kind lm-eval")  # fmt: skip

    def digest(self) -> str:
        """Of all that scores depend on: the task's settings, every document, lm-eval's version."""
        from importlib.metadata import version

        said = dict(self.task.dump_config())
        local = ("metadata", "dataset_kwargs", "dataset_path")  # where things lie
        said = {k: v for k, v in said.items() if k not in local}
        if self._chat is not None:
            said |= {"chat": self._chat.template, **self._said}
        found = sha256(json.dumps([version("lm_eval"), said], default=str).encode())
        for doc in self.docs:
            found.update(json.dumps(doc, default=str).encode())
        return found.hexdigest()[:20]


def _stamps(file: Path | None) -> tuple[Any, ...]:
    """Names, times and sizes of a task file and what lies beside it."""
    if file is None or not file.is_file():
        return ()
    stats = [(path, path.stat()) for path in sorted(file.parent.iterdir()) if path.is_file()]
    return tuple((path.name, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@dataclass(frozen=True)
class _Chat:
    """Writes turns as a tokenizer's chat template does."""

    tokenizer: Any

    @property
    def template(self) -> str:
        return str(self.tokenizer.chat_template)

    def __call__(self, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        found: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return found


def _chat(benchmark: Benchmark) -> _Chat | None:
    if benchmark.chat is None:
        if benchmark.system is not None:
            raise DataError("a system's words need a chat template", where=benchmark,
                            fix="options: {chat: true, system: ...}")  # fmt: skip
        return None
    tokenizer = needs("transformers", EXTRA).AutoTokenizer.from_pretrained(benchmark.chat)
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", where=benchmark.chat,
                        expected="chat_template.jinja, or one in tokenizer_config.json",
                        fix="leave out `chat`, or take an instruct model's")  # fmt: skip
    return _Chat(tokenizer)


@cache
def _documents(benchmark: Benchmark, stamps: tuple[Any, ...]) -> Documents:
    return Documents(benchmark)


def _opened(benchmark: Benchmark) -> Any:
    with TemporaryDirectory() as folder:
        manager, entry = _found(benchmark, Path(folder))
        asked: Any = entry.name
        if benchmark.file is not None:
            # A group of one is lm-eval's way to overrule some of a task's settings.
            own = _local(entry.cfg or {}, benchmark.file.parent, benchmark.root)
            asked = {"group": "fusewright", "task": [{"task": entry.name, **own}]}
        try:
            (task,) = manager.load([asked])["tasks"].values()
        except Exception as error:  # a task's file may run anything
            raise DataError(
                "lm-eval cannot open a task", where=benchmark,
                found=f"{type(error).__name__}: {error}",
                fix="connect to the Hub once, or write a task file whose data_files are local",
            ) from error  # fmt: skip
    return _settled(task, benchmark)


def _found(benchmark: Benchmark, folder: Path) -> tuple[Any, Any]:
    """lm-eval's index and its entry of the task."""
    name = benchmark.task
    manager = _shipped() if benchmark.file is None else _index_of(benchmark.file, folder)
    index = manager.task_index
    entry = next(iter(index.values()), None) if name is None else index.get(name)
    if entry is None:
        close, own = nearest(name or "", list(index)), benchmark.file is not None
        raise DataError(
            "the file holds no such task" if own else f"lm-eval has no task {name!r}",
            where=benchmark, expected=(name or "a task that lm-eval can read") if own else None,
            found=(", ".join(index) or "none") if own else None,
            fix=f"did you mean {close!r}?" if close else None if own else "lm-eval ls tasks",
        )  # fmt: skip
    if entry.kind.name not in ("TASK", "PY_TASK"):
        raise DataError("lm-eval knows this name as a group of tasks", where=benchmark,
                        expected="one task", fix="one task of the suite for each")  # fmt: skip
    return manager, entry


@cache
def _shipped() -> Any:
    """The index of lm-eval's own tasks: it takes seconds to read."""
    return needs("lm_eval.tasks", EXTRA).TaskManager()


def _index_of(file: Path, folder: Path) -> Any:
    """An index of one file. lm-eval reads folders, with all below them: so an empty one is given a
    file that includes it."""
    if not file.is_file():
        raise DataError("there is no such task file", where=file, expected="a YAML of lm-eval",
                        fix="--data DIR with the folder that holds it")  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps({"include": str(file.resolve())}), "utf-8")
    return needs("lm_eval.tasks", EXTRA).TaskManager(include_path=folder, include_defaults=False)


def _local(said: Mapping[str, Any], folder: Path, root: Path | None) -> dict[str, Any]:
    """A task's data settings, with relative paths found beside its file or in the data folder."""

    def placed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: placed(one) for key, one in value.items()}
        if isinstance(value, list):
            return [placed(one) for one in value]
        places = (place / str(value) for place in (folder, root) if place is not None)
        return next((str(path.resolve()) for path in places if path.exists()), value)

    given = said.get("dataset_kwargs") or {}
    return {"dataset_kwargs": {k: placed(v) if k in OWN_FILES else v for k, v in given.items()}}


def _settled(task: Any, benchmark: Benchmark) -> Any:
    """The task, with what the suite says of its prompts."""
    for attribute, what in (("UNSAFE_CODE", "runs code that a model wrote"),
                            ("MULTIMODAL", "asks about pictures or sounds")):  # fmt: skip
        if getattr(task, attribute, False):
            raise DataError(f"a task of lm-eval {what}, which is not done here", where=benchmark)
    own, asked = task.config.num_fewshot, benchmark.fewshot
    if own == 0 and asked:
        raise DataError("lm-eval's task is asked without examples", where=benchmark,
                        expected="fewshot: 0", found=f"fewshot: {asked}")  # fmt: skip
    task.set_config("num_fewshot", own or 0 if asked is None else asked)
    if benchmark.max_new_tokens is not None:
        given = {**(task.config.generation_kwargs or {}), "max_gen_toks": benchmark.max_new_tokens}
        task.set_config("generation_kwargs", given)
    return task


@contextmanager
def quietly() -> Iterator[None]:
    """Without the logs and bars of lm-eval, datasets and transformers."""
    datasets, transformers = needs("datasets", EXTRA), needs("transformers", EXTRA)
    said, bars = transformers.utils.logging, datasets.are_progress_bars_disabled()
    logger, verbosity = logging.getLogger("lm_eval"), said.get_verbosity()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    said.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        said.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()

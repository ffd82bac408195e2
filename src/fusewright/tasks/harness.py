"""LLM benchmarks by lm-eval (the language model evaluation harness), asked of a live module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from fusewright.errors import FusewrightError, nearest
from fusewright.extras import needs
from fusewright.tasks.batching import BatchedTask
from fusewright.tasks.errors import DataError
from fusewright.tasks.harness_documents import EXTRA, Benchmark, quietly
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.task import Batch, Split

if TYPE_CHECKING:
    from torch import Tensor, nn

DOCUMENTS = 64
"""Documents a batch at most: answers that are written take long, and progress is to be seen."""
NO_ANSWER = frozenset({"", "[invalid]"})
"""What lm-eval's filters give for a text without an answer."""


@dataclass(frozen=True)
class LmEval(BatchedTask):
    """A benchmark of lm-eval: its documents, prompts, filters and metrics, one item a document.

    ``metric`` and ``filter`` name which of the task's own count (None: its first). The metric must
    be a mean over documents in [0, 1], larger is better. ``length`` is the window in tokens (None:
    the model's), ``batch_size`` how many requests the model sees at once (8: the logits of a large
    vocabulary are held for each).

    Columns: truncated (1: a prompt was longer than the window, and lost its beginning), and for
    written answers prediction (what the filter left, text) and unparsed (1: nothing that the
    filter could read). Batches: requests (lm-eval's instances by document), items.

    Such a task has outcomes only, no logits and no loss: no output ensembles and no training.
    Raises DataError for a metric or filter that the task lacks or that is no such mean, and where
    the window leaves no room for an answer.
    """

    kind: ClassVar[str] = "lm-eval"
    has_logits: ClassVar[bool] = False

    benchmark: Benchmark = field(kw_only=True)
    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    metric: str | None = field(default=None, kw_only=True)
    filter: str | None = field(default=None, kw_only=True)
    length: int | None = field(default=None, kw_only=True)
    batch_size: int = field(default=8, kw_only=True)

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        if "requests" not in rows:
            raise DataError("these are no documents of lm-eval", where=where,
                            expected="benchmark.documents(), or a part of them",
                            found=", ".join(rows))  # fmt: skip
        return list(rows["requests"])

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        return {"requests": list(examples)}

    def batches(
        self, split: Split, size: int, *, seed: int | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        """At most DOCUMENTS in a batch, whatever ``size`` is."""
        return super().batches(split, min(size, DOCUMENTS), seed=seed, limit=limit)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        self._refuse("logits, which ensembles of outputs and entropies are made from")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self._refuse("a loss to train by")

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        import torch

        task = self.benchmark.documents().task
        chosen = self._chosen(task)
        with quietly(), torch.random.fork_rng():
            torch.manual_seed(self.benchmark.seed)  # for tasks whose answers are drawn
            reader = self._reader(model)
            items = [i for b in batches for i in _items(task, reader, b["requests"], *chosen)]
        scores, cut, texts = zip(*items, strict=True)
        columns: dict[str, Any] = {"truncated": np.array(cut, dtype=np.int64)}
        if None not in texts:
            unparsed = [not text.strip() or text.strip() in NO_ANSWER for text in texts]
            columns |= {"prediction": np.array(texts), "unparsed": np.array(unparsed, np.int64)}
        score = np.array(scores, dtype=np.float64)
        return Outcomes(chosen[0], score, np.ones_like(score), columns)

    def _reader(self, model: Any) -> Any:
        """lm-eval's view of the module; its tokenizer is a copy, because a padding token is set."""
        models = needs("lm_eval.models.huggingface", EXTRA)
        return models.HFLM(
            pretrained=model, tokenizer=deepcopy(self.tokenizer), batch_size=self.batch_size,
            max_length=self.length,
        )  # fmt: skip

    def _chosen(self, task: Any) -> tuple[str, str]:
        """The metric and the filter that count."""
        metric = self._named("metric", self.metric, list(task.aggregation()))
        found = self._named("filter", self.filter, [one.name for one in task._filters])
        how = getattr(task.aggregation()[metric], "__name__", "another")
        if how != "mean" or not task.higher_is_better().get(metric, True):
            raise DataError(
                f"the metric {metric!r} is no mean over documents, larger is better",
                where=f"task {self.name}", found=how,
                expected=f"options: {{metric: ...}} of {', '.join(task.aggregation())}",
            )  # fmt: skip
        return metric, found

    def _named(self, what: str, name: str | None, known: list[str]) -> str:
        if name is None and known:
            return known[0]
        if name in known:
            return str(name)
        close = nearest(str(name), known)
        raise DataError(f"{self.benchmark} has no {what} {name!r}", where=f"task {self.name}",
                        expected=", ".join(known) or f"a {what}",
                        fix=f"did you mean {close!r}?" if close else None)  # fmt: skip

    def _refuse(self, what: str) -> NoReturn:
        raise FusewrightError(
            f"a task of lm-eval has no {what}", where=f"task {self.name}", expected="outcomes only",
            fix="a task of the kind language-modelling or generation",
        )  # fmt: skip


Item = tuple[float, bool, str | None]
"""Score, whether a prompt was cut, and the answer where one was written."""


def _items(
    task: Any, reader: Any, documents: Sequence[Sequence[Any]], metric: str, name: str
) -> Iterator[Item]:
    """Ask all requests of some documents, filter the answers and score them, as lm-eval does."""
    fresh = [[_unasked(request) for request in each] for each in documents]
    requests = [request for each in fresh for request in each]
    cut = {id(request): _is_cut(reader, request) for request in requests}
    for kind in dict.fromkeys(request.request_type for request in requests):
        asked = [r for r in requests if r.request_type == kind for _ in range(r.repeats or 1)]
        for request, answer in zip(asked, _answers(reader, kind, asked), strict=True):
            request.resps.append(answer)
    next(one for one in task._filters if one.name == name).apply(requests)
    for each in fresh:
        left = [request.filtered_resps[name] for request in each]
        score = _number(task.process_results(each[0].doc, left), metric, task)
        writes = all(request.request_type == "generate_until" for request in each)
        yield score, any(cut[id(r)] for r in each), _text(left[0]) if writes else None


def _unasked(request: Any) -> Any:
    """A copy without answers: requests are kept for the models that follow."""
    found = copy(request)
    found.resps, found.filtered_resps = [], {}
    return found


def _answers(reader: Any, kind: str, requests: Sequence[Any]) -> Any:
    try:
        return getattr(reader, kind)(requests, disable_tqdm=True)
    except AssertionError as error:
        raise DataError("lm-eval cannot ask this of the model", where=requests[0].task_name,
                        found=error) from error  # fmt: skip


def _is_cut(reader: Any, request: Any) -> bool:
    """Whether the request is longer than the window, so that lm-eval drops its beginning."""
    if request.request_type == "generate_until":
        room = _room(reader, request)
        return len(reader.tok_encode(request.args[0])) > room
    if request.request_type == "loglikelihood":  # the last token is only predicted
        return len(reader.tok_encode("".join(request.args[:2]))) > reader.max_length + 1
    return False  # loglikelihood_rolling reads all of a text, window by window


def _room(reader: Any, request: Any) -> int:
    """How many tokens a prompt may have before an answer."""
    utils = needs("lm_eval.models.utils", EXTRA)
    if reader.backend != "causal":
        return int(reader.max_length)
    wanted = utils.normalize_gen_kwargs(request.args[1], reader.max_gen_toks)["max_gen_toks"]
    if wanted >= reader.max_length:
        raise DataError(
            "the window has no room for a prompt", where=request.task_name,
            expected=f"answers shorter than {reader.max_length} tokens", found=wanted,
            fix=f"options: {{max_new_tokens: {max(reader.max_length // 4, 1)}}}",
        )  # fmt: skip
    return int(reader.max_length - wanted)


def _number(found: Mapping[str, Any], metric: str, task: Any) -> float:
    value = found.get(metric)
    number = isinstance(value, int | float | np.number | np.bool_)
    if not number or not 0 <= float(value) <= 1:  # type: ignore[arg-type]
        raise DataError(f"the metric {metric!r} gives no score in [0, 1] for a document",
                        where=task.task_name, found=repr(value),
                        expected=f"another of {', '.join(found)}")  # fmt: skip
    return float(value)  # type: ignore[arg-type]


def _text(left: Any) -> str:
    """What a filter left of the answers to one request; the first where it left several."""
    while isinstance(left, list | tuple):
        left = left[0] if left else ""
    return str(left)

"""What a method that learns sees of the data: batches of every task, and how models answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from fusewright.tasks.errors import DataError
from fusewright.tasks.own_answers import check_own_labels, held_labels, own_labels, own_logits
from fusewright.tasks.pictures import Pictures
from fusewright.tasks.placement import placed
from fusewright.tasks.sound import check_answers, nothing, sound
from fusewright.tasks.task import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Logits = Callable[["nn.Module", Any], "Tensor"]
Epoch = Callable[[int, int], Iterable[Any]]
Open = Callable[[], "tuple[nn.Module, Mapping[str, str]]"]


@dataclass(frozen=True)
class Question:
    """One task: ``logits(model, batch)`` are (answers, classes), one for each item or more, and
    ``epoch(size, seed)`` its batches, shuffled by the seed. Few methods need labels; a batch holds
    them as "label" or "labels". ``pictures`` says where a batch holds pictures, for methods that
    change them; ``numbers``, that answers are numbers (answers, channels), not logits; ``sized``,
    that batches have the size that is asked for, not one of their own; ``own``, that the answers
    are the model's own (:func:`~fusewright.tasks.own_answers.own_logits`)."""

    name: str
    logits: Logits
    epoch: Epoch = field(repr=False)
    pictures: Pictures | None = None
    numbers: bool = False
    sized: bool = True
    own: bool = False

    def stream(self, size: int, seed: int) -> Iterator[Any]:
        """Batches without end, each epoch in another order.

        Raises DataError if there is none.
        """
        return chain.from_iterable(self._epochs(size, seed))

    def sound(self) -> Question:
        """The same, whose batches and answers are looked at as they come: see
        :func:`~fusewright.tasks.sound.sound`."""
        name, epoch, logits = self.name, self.epoch, self.logits
        return replace(
            self, epoch=lambda size, seed: sound(name, epoch(size, seed)),
            logits=lambda model, batch: check_answers(name, logits(model, batch)),
        )  # fmt: skip

    def on(self, device: torch.device) -> Question:
        """The same, its batches brought to a device."""
        epoch = self.epoch
        return replace(self, epoch=lambda size, seed: placed(epoch(size, seed), device))

    def labels(self, model: nn.Module, batch: Any) -> Tensor:
        """A batch's labels, one for each of the model's answers. Raises DataError if it has none,
        PlanError where a label's answer cannot be told."""
        held = own_labels(self.name, model, batch) if self.own else held_labels(batch)
        if held is None:
            raise DataError("the objective needs labels, and a batch has none",
                            where=f"task {self.name}", expected='a mapping with "labels"',
                            found=type(batch).__name__,
                            fix="an objective without labels: entropy, self_label")  # fmt: skip
        return held

    def check_labels(self, model: nn.Module, batch: Any) -> None:
        """Raises PlanError where labels are not what the model's own answers are compared with."""
        if self.own:
            check_own_labels(self.name, model, batch)

    def _epochs(self, size: int, seed: int) -> Iterator[Iterator[Any]]:
        for number in count():
            batches = iter(self.epoch(size, seed + number))
            first = next(batches, None)
            if first is None:
                raise nothing(self.name)
            yield chain([first], batches)


@dataclass(frozen=True)
class Adaptation:
    """The questions of all experts' tasks, by the experts' names; iterating gives batches of all
    tasks in turn, "task" saying whose.

    ``open`` makes the module that is asked, with {its tensor: the checkpoint's} where names
    differ, with these ``arguments``; without it the base's own config does. ``heads`` are those
    that the questions are answered through.
    """

    questions: Mapping[str, Question]
    open: Open | None = field(default=None, repr=False)
    size: int = 32
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    heads: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Batch]:
        streams = {name: iter(q.epoch(self.size, self.seed)) for name, q in self.questions.items()}
        while streams:
            for name in list(streams):
                batch = next(streams[name], None)
                if batch is None:
                    del streams[name]
                else:
                    yield {"task": name, **batch}


def adaptation(
    data: Adaptation | Mapping[str, Iterable[Any]], heads: Mapping[str, Any] | None = None,
    pictures: Pictures | None = None,
) -> Adaptation:
    """What a caller gives as ``data`` and ``heads``, as one value.

    ``data``: batches by expert, each a list or a loader that can be gone over again. A batch is
    what the model is called with: keywords, a tuple of arguments, or one tensor; labels among the
    keywords are not shown to it, but to an encoder-decoder's decoder, which otherwise has nothing
    to go on from. ``heads``: by expert, a function (model, batch) -> logits, a frozen linear head
    (classes, width) over :func:`~fusewright.tasks.heads.image_features`, or None for the logits
    that the model returns (:func:`~fusewright.tasks.own_answers.own_logits`: of a causal language
    model those of the next tokens); without heads it returns those of every task.
    ``pictures``: where batches hold pictures, for methods that change them.

    Raises DataError for heads of tasks without data, and of some tasks only: features would be
    taken for logits; for a head that is none of these, or another than a suite's data bring; and
    for data that are no mapping, or batches that are an iterator or no batches.
    """
    if isinstance(data, Adaptation):
        others = [name for name, head in (heads or {}).items() if head is not data.heads.get(name)]
        if others:
            raise DataError("the data bring their own heads, and others are given",
                            expected="the suite's own heads, or none", found=", ".join(others),
                            fix="leave heads out, or give batches of your own")  # fmt: skip
        return data
    for what, given in (("data", data), ("heads", heads)):
        if given is not None and not isinstance(given, Mapping):
            raise DataError(f"{what} are not given by task", found=type(given).__name__,
                            expected=f"{what}={{expert: ...}}"
                            + (", or suite.unlabelled()" if what == "data" else ""))  # fmt: skip
    heads = heads or {}
    unknown = [name for name in heads if name not in data]
    if unknown:
        raise DataError("heads are given for tasks without data", expected=", ".join(data),
                        found=", ".join(unknown), fix="the same names in both")  # fmt: skip
    missing = [name for name in data if name not in heads] if heads else []
    if missing:
        raise DataError("heads are given for some tasks and not for others",
                        where=", ".join(f"task {name}" for name in missing),
                        expected=", ".join(data), found=", ".join(heads),
                        fix=f"heads={{..., {missing[0]!r}: its head}}, or None where the model's "
                            "own answers are the task's logits")  # fmt: skip
    return Adaptation({
        name: _question(name, batches, heads.get(name), pictures) for name, batches in data.items()
    })  # fmt: skip


def _question(
    name: str, batches: Iterable[Any], head: Any, pictures: Pictures | None
) -> Question:
    goes_over = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, str) or not goes_over:
        raise DataError("these are no batches", where=f"task {name}", found=repr(batches),
                        expected="a list of batches, or a DataLoader")  # fmt: skip
    if isinstance(batches, Iterator):  # it would be refused where it ends, perhaps after hours
        raise nothing(name)
    logits = _checked(name, _answer(name, head))
    return Question(name, logits, lambda size, seed: _drawn(batches, seed), pictures, sized=False,
                    own=head is None)  # fmt: skip


def _drawn(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """An epoch of a caller's batches. What they draw of torch's own generator, as a DataLoader does
    that shuffles, follows from the seed: a fit that goes on after a kill must see the same."""
    import torch

    state = torch.Generator().manual_seed(seed % 2**64).get_state()

    def drawn(take: Callable[[], Any]) -> Any:
        nonlocal state
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            found = take()
            state = torch.get_rng_state()
        return found

    each, end = drawn(lambda: iter(batches)), object()
    while (batch := drawn(lambda: next(each, end))) is not end:
        yield batch


def _answer(task: str, head: Any) -> Logits:
    from torch import Tensor, nn

    if head is None:
        return partial(own_logits, task)
    if isinstance(head, Tensor):
        return _through(task, head)
    if isinstance(head, nn.Module) or not callable(head):
        raise DataError(
            "a head is not understood", where=f"task {task}", found=type(head).__name__,
            expected="function(model, batch) -> logits, a tensor (classes, width), or None",
            fix=f"heads={{{task!r}: lambda model, batch: head(model(batch))}}"
                if callable(head) else f"heads={{{task!r}: torch.as_tensor(head)}}",
        )  # fmt: skip
    return head


def _checked(task: str, logits: Logits) -> Logits:
    def answer(model: nn.Module, batch: Any) -> Tensor:
        from torch import Tensor

        found = logits(model, batch)
        if not isinstance(found, Tensor) or found.dim() < 2:
            raise DataError(
                "the model does not answer with logits", where=f"task {task}",
                expected="a tensor (items, classes)",
                found=tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__,
                fix=f"heads={{{task!r}: a tensor (classes, width), or function(model, batch)}}",
            )  # fmt: skip
        return found

    return answer


def _through(task: str, head: Tensor) -> Logits:
    from torch import Tensor

    from fusewright.tasks.heads import image_features, linear

    def logits(model: nn.Module, batch: Any) -> Tensor:
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
        if not isinstance(pixels, Tensor):
            raise DataError(
                "a matrix is a head of pictures' features, and a batch holds no pictures",
                where=f"task {task}", expected='a tensor, or a mapping with "pixel_values"',
                found=", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__,
                fix=f"heads={{{task!r}: lambda model, batch: features(model, batch) @ head.T}}",
            )  # fmt: skip
        return linear(image_features(model, pixels), head)

    return logits

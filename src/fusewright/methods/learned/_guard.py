"""Whether a merge still answers as the experts do, measured without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning
from fusewright.methods.learned.processes import Processes
from fusewright.modules.functional import with_weights
from fusewright.modules.vectors import TaskVectors
from fusewright.tasks.sound import rows_of

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question


class Agreement:
    """The share of items on which a model predicts what each task's own expert predicts.

    Experts are good at their own tasks, so it follows accuracy where entropy need not: a model that
    is confidently wrong agrees with nobody. Each expert is asked once, about the first ``rows``
    items of its task in an order of their own.

    Warns where an expert says one class of everything: entropy has then nothing to tell.
    """

    def __init__(
        self, model: nn.Module, vectors: TaskVectors, questions: Mapping[str, Question],
        size: int, rows: int, seed: int, processes: Processes | None = None,
    ) -> None:  # fmt: skip
        self.questions, self.processes = questions, processes or Processes()
        self.asked = {
            task: answered(model, vectors.expert(task), questions[task], size, rows, seed)
            for task in self.processes.mine(questions)
        }
        warn_of_one_class(self.asked, "the experts answer")

    def score(self, model: nn.Module) -> float:
        """The mean share over the tasks, in [0, 1]."""
        found = self.measured(model)
        return sum(of["agreement"] for of in found.values()) / len(found)

    def measured(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """By task, shares in [0, 1]: "agreement"; "most_predicted", of the class that the model
        names most often; "expert_most_predicted", the same of the task's own expert. "inputs": how
        many were looked at."""
        with torch.no_grad():
            found = {task: self._measured(model, task) for task in self.asked}
        return self.processes.gathered(found, self.questions)

    def _measured(self, model: nn.Module, task: str) -> dict[str, float]:
        logits, asked = self.questions[task].logits, self.asked[task]
        said = torch.cat([logits(model, batch).argmax(-1).reshape(-1) for batch, _ in asked])
        expert = torch.cat([answers.reshape(-1) for _, answers in asked])
        return {
            "agreement": float((said == expert).double().mean()),
            "most_predicted": _most(said), "expert_most_predicted": _most(expert),
            "inputs": looked_at(asked),
        }  # fmt: skip


def answered(
    model: nn.Module, expert: Mapping[str, Tensor], question: Question, size: int, rows: int,
    seed: int,
) -> list[tuple[Any, Tensor]]:  # fmt: skip
    """The first ``rows`` items of a task, in batches, and the classes that its expert names."""
    with with_weights(model, expert), torch.no_grad():
        return [(batch, question.logits(model, batch).argmax(-1))
                for batch in first_batches(question, size, rows, seed)]  # fmt: skip


def first_batches(question: Question, size: int, rows: int, seed: int) -> Iterator[Any]:
    """As many batches of a task as hold ``rows`` items, the last one whole; of batches that were
    given, each once at most."""
    asked = question.stream if question.sized else question.epoch
    return holding(question, asked(size, seed), rows, size)


def holding(
    question: Question, batches: Iterable[Any], rows: int, size: int
) -> Iterator[Any]:
    """The first of a task's batches until they hold ``rows`` items. One counts as ``size`` where it
    was asked for with that size, so that the last of an epoch counts as others do, or does not tell
    how many items it has."""
    seen = 0
    for batch in batches:
        yield batch
        seen += size if question.sized else rows_of(batch) or size
        if seen >= rows:
            return


def looked_at(asked: Sequence[tuple[Any, Tensor]]) -> int:
    """How many items batches hold: of those that do not tell, how many answers."""
    return sum(rows_of(batch) or answers.numel() for batch, answers in asked)


def warn_of_one_class(found: Mapping[str, Sequence[tuple[Any, Tensor]]], who: str) -> None:
    """Warn of tasks of whose batches all answers are one class."""
    each = {task: torch.cat([a.reshape(-1) for _, a in asked]) for task, asked in found.items()}
    alike = [task for task, said in each.items() if len(said) > 1 and _most(said) == 1.0]
    if alike:
        rows = dict.fromkeys(str(looked_at(found[task])) for task in alike)
        warn(f"{who} all inputs of {', '.join(alike)} with one class (of the first "
             f"{', '.join(rows)}): little can be learned from inputs that are all alike",
             FusewrightWarning, stacklevel=2)  # fmt: skip


def collapsed(measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The tasks of which a model names one class far too often: more than half way from the
    expert's most frequent share to all."""
    return [
        task for task, of in measured.items()
        if of["most_predicted"] > (1 + of["expert_most_predicted"]) / 2
    ]  # fmt: skip


def _most(said: Tensor) -> float:
    return float(said.unique(return_counts=True)[1].max()) / len(said)

"""A correction of a model's features, one for each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules.architecture import describe_module
from fusewright.modules.features import entry_of, readers
from fusewright.modules.layer import Layer, Saved
from fusewright.modules.mixture import Text, text_model
from fusewright.modules.told import not_told, place_of

SURGERY = "surgery"
"""The name under which a model holds its :class:`Surgery`."""


class Surgery(Layer):
    """z' = z - U_t ReLU(D_t z) of what the model's head sees, once the task t is told.

    ``down`` (tasks, rank, width) is drawn from N(0, 1/width) by ``seed``, ``up`` (tasks, width,
    rank) begins as zero; in float32. The head is ``head``, a module whose input is corrected; for
    "", a model without a head inside, it is the last hidden state and the pooled output of the
    module that is given the user's input. A child of the model under :data:`SURGERY`, which gives
    it ``tasks`` and ``set_task``.
    """

    kind: ClassVar[str] = "surgery"

    def __init__(
        self, tasks: Sequence[str], width: int, rank: int, head: str, seed: int = 0
    ) -> None:
        super().__init__()
        self.tasks, self.width, self.rank, self.head = tuple(tasks), width, rank, head
        draw, size = torch.Generator().manual_seed(seed), (len(tasks), rank, width)
        self.down = nn.Parameter(torch.randn(size, generator=draw) / width**0.5)
        self.up = nn.Parameter(torch.zeros(len(tasks), width, rank))
        self.task: int | None = None
        self._listens = False

    def forward(self, features: Tensor, task: int) -> Tensor:
        """Features (…, width) corrected for a task's number."""
        seen = features.to(self.down.dtype)
        change = (seen @ self.down[task].T).relu() @ self.up[task].T
        return features - change.to(features.dtype)

    def listen(self, model: nn.Module) -> None:
        """Correct the model's features from now on."""
        if self._listens:
            return
        self._listens = True
        model.tasks, model.set_task = self.tasks, self.set_task  # type: ignore[assignment]
        if self.head:
            head = model.get_submodule(self.head)
            head.register_forward_pre_hook(self._before)
        else:
            model.get_submodule(entry_of(model)).register_forward_hook(self._after)

    def set_task(self, task: str) -> None:
        """From now on inputs are that task's. Raises PlanError for a task that is not known."""
        self.task = place_of(task, self.tasks)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._corrected(args[0]), *args[1:])

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._corrected(output)
        for name in _held(output):
            output[name] = self._corrected(output[name])
        return output

    def _corrected(self, features: Tensor) -> Tensor:
        if self.task is None:
            raise not_told(self.tasks)
        if features.dim() == 4:  # maps: (samples, width, height, width)
            return self(features.movedim(1, -1), self.task).movedim(-1, 1)
        found: Tensor = self(features, self.task)
        return found

    @property
    def active(self) -> int:
        return 2 * self.width * self.rank

    def described(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "width": self.width, "rank": self.rank, "head": self.head}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        said = saved.said
        return cls(said["tasks"], said["width"], said["rank"], said["head"])


def head_of(model: nn.Module) -> str:
    """The module that makes the model's answer of features; "" if it has none."""
    heads = describe_module(model).heads
    return heads[-1] if heads else ""


@contextmanager
def seen_by(model: nn.Module, head: str) -> Iterator[list[Tensor]]:
    """Inside, what the head sees is collected: rows (n, width) for each call, of text those that
    are no padding; of a model without a head, what a head over pooled features would see."""
    found: list[Tensor] = []
    text = Text()  # the one that was read last: of an encoder-decoder what the decoder is shown

    def before(module: nn.Module, args: Any) -> None:
        seen = args[0]
        if text.mask is not None and seen.shape[:-1] == text.mask.shape:
            seen = seen[text.mask != 0]
        found.append(seen.flatten(0, -2).float())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        names = _held(output) if not isinstance(output, Tensor) else ()
        seen = output[names[-1]] if names else output
        seen = seen.flatten(2).mean(dim=2) if seen.dim() == 4 else seen
        found.append((seen[:, 0] if seen.dim() == 3 else seen).float())

    part = model.get_submodule(head or entry_of(model))
    hooks = [part.register_forward_pre_hook(before) if head else part.register_forward_hook(after)]
    hooks += [model.get_submodule(path).register_forward_pre_hook(text.note, with_kwargs=True)
              for path in readers(model) if text_model(model, path) == path]  # fmt: skip
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _held(output: Any) -> list[str]:
    """The features in an answer, the pooled ones last. Raises PlanError if there are none."""
    names = [n for n in ("last_hidden_state", "pooler_output")
             if isinstance(getattr(output, n, None), Tensor)]  # fmt: skip
    if not names:
        raise PlanError("the model's answer has no features to correct",
                        expected="last_hidden_state, pooler_output or a tensor",
                        found=type(output).__name__)  # fmt: skip
    return names

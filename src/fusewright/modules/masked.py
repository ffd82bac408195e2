"""One vector that serves several tasks, each through a mask of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.modules.layer import Layer, Saved
from fusewright.modules.tensors import named_tensors, same_tensor, wide_dtype
from fusewright.modules.told import not_told, place_of

MASKS = "masks"
"""The name under which a model holds its :class:`TaskMasks`."""
_BITS = 8


class TaskMasks(Layer):
    """θ_t = θ_0 + s_t M_t ⊙ τ of the tensors ``names``, in place of θ_0 once the task is told.

    ``vector`` (n,) is τ of all of them, one behind the other; ``masks`` (tasks, bytes) uint8 are
    the bits of M_t, every tensor's from a byte of its own; ``scales`` (tasks,) float32 are s_t.
    ``kept`` (tasks, k) are changes of the tensors ``statistics`` that no mask may touch. A child of
    the model under :data:`MASKS`; :meth:`listen` gives the model ``tasks``, their names, and
    ``set_task``. State dicts hold θ_0 whatever the task.
    """

    kind: ClassVar[str] = "masks"

    vector: Tensor
    masks: Tensor
    scales: Tensor
    kept: Tensor

    def __init__(
        self, tasks: Sequence[str], names: Sequence[str], statistics: Sequence[str],
        tensors: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self.tasks, self.names, self.statistics = tuple(tasks), tuple(names), tuple(statistics)
        self.task: str | None = None
        self._told: str | None = None
        for name in ("vector", "masks", "scales", "kept"):
            self.register_buffer(name, tensors[name])
        self._of: list[nn.Module] = []  # in a list: a model is no child of its child
        self._base = _Base()

    def listen(self, model: nn.Module) -> None:
        """Give the model its task's weights when it is told the task."""
        if self._of:
            return
        self._of = [model]
        model.tasks, model.set_task = self.tasks, self.set_task  # type: ignore[assignment]
        model.register_state_dict_post_hook(self._base)
        model.register_load_state_dict_pre_hook(self._before_loading)
        model.register_load_state_dict_post_hook(self._after_loading)
        for part in (model, *(child for child in model.children() if child is not self)):
            part.register_forward_pre_hook(self._refuse)

    def set_task(self, task: str) -> None:
        """From now on the model is that task's. Raises PlanError for a task that is not known."""
        place = place_of(task, self.tasks)
        own, base = dict(named_tensors(self._of[0])), self._base.tensors
        if not base:
            base |= {n: own[n].detach().clone() for n in (*self.names, *self.statistics)}
        for name, values in self._weights(place, base):
            own[name].data.copy_(values)
        self.task = task

    def _before_loading(self, model: nn.Module, *told: Any) -> None:
        """State dicts hold θ_0, and may hold a part of it: all of it is in its place again."""
        own = dict(named_tensors(model))
        for name, values in self._base.tensors.items():
            own[name].data.copy_(values)
        self._base.tensors.clear()
        self._told, self.task = self.task, None  # who loads what does not fit has to tell it again

    def _after_loading(self, model: nn.Module, keys: Any) -> None:
        if self._told is not None:
            self.set_task(self._told)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """θ_0 goes where the model goes, and becomes what it becomes."""
        base = self._base.tensors
        base |= {name: fn(tensor) for name, tensor in base.items()}
        return super()._apply(fn, recurse)

    def weights(self, task: str) -> dict[str, Tensor]:
        """θ_t of the masked tensors and the statistics, in the model's dtypes, under every name
        that the model has for them."""
        model = self._of[0]
        found = dict(self._weights(place_of(task, self.tasks), model.state_dict()))
        for names in same_tensor(model):
            if stored := next((name for name in names if name in found), None):
                found |= dict.fromkeys(names, found[stored])
        return found

    def _weights(self, place: int, base: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        at = byte = 0
        for name in self.names:
            start, size = base[name], base[name].numel()
            stop = byte + -(-size // _BITS)
            mask = unpacked(self.masks[place, byte:stop], size)
            wide = wide_dtype(start)
            change = self.vector[at : at + size].to(wide) * mask * self.scales[place].to(wide)
            yield name, (start.to(wide) + change.view(start.shape)).to(start.dtype)
            at, byte = at + size, stop
        at = 0
        for name in self.statistics:
            start = base[name]
            change = self.kept[place, at : at + start.numel()].view(start.shape)
            yield name, (start + change).to(start.dtype)
            at += start.numel()

    def _refuse(self, module: nn.Module, args: Any) -> None:
        if self.task is None:
            raise not_told(self.tasks)

    @property
    def active(self) -> int:
        """None: the task's weights replace the base's."""
        return 0

    @property
    def precise(self) -> tuple[str, ...]:
        return ("scales",)

    def described(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "names": self.names, "statistics": self.statistics}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        said = saved.said
        return cls(said["tasks"], said["names"], said["statistics"], saved.tensors)

    def extra_repr(self) -> str:
        return f"tasks={len(self.tasks)}, elements={len(self.vector)}"


class _Base:
    """θ_0, kept while the model has a task's weights; a hook that puts it into state dicts."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __call__(
        self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        for names in same_tensor(model) if self.tensors else ():
            held = [self.tensors[name] for name in names if name in self.tensors]
            state |= {prefix + name: held[0] for name in names if held and prefix + name in state}


def packed(mask: Tensor) -> Tensor:
    """(…, n) bool -> (…, ⌈n / 8⌉) uint8; the first element is the lowest bit."""
    bits = nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % _BITS))
    places = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    return (bits.unflatten(-1, (-1, _BITS)) << places).sum(dim=-1, dtype=torch.uint8)


def unpacked(masks: Tensor, size: int) -> Tensor:
    """(…, ⌈n / 8⌉) uint8 -> (…, n) bool, of that size."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=masks.device)
    return ((masks[..., None] >> places) & 1).flatten(-2)[..., :size].bool()

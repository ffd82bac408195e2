"""What a routed method puts into a model, and how it comes back from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules.looks import Looks
from fusewright.modules.tensors import beside

if TYPE_CHECKING:
    from fusewright.modules.mixture import Routing


class Layer(nn.Module, ABC):
    """A child of a model that a merge put there: it can be described, saved and made again.

    A class that names its ``kind`` is known from then on. Raises PlanError if another class has
    that name already; the same one may be written again, as in notebooks.
    """

    kind: ClassVar[str]
    """What saved models call it: a name that no other class has."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            other = _KINDS.setdefault(cls.kind, cls)
            if _place(other) != _place(cls):
                raise PlanError(f"two classes of layers have the kind {cls.kind!r}",
                                found=f"{_place(other)} and {_place(cls)}",
                                fix="give one of them another `kind`")  # fmt: skip
            _KINDS[cls.kind] = cls

    @property
    @abstractmethod
    def active(self) -> int:
        """Numbers that one input's answer depends on, beside the base's."""

    @property
    def added(self) -> int:
        """Floating-point numbers that it stores, beside the base's."""
        return sum(t.numel() for t in self.state_dict().values() if t.is_floating_point())

    @property
    def trained(self) -> int:
        """Numbers that its method learned: its parameters. What was not learned is a buffer."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def precise(self) -> tuple[str, ...]:
        """Those of its tensors that keep their dtype, whatever the model is stored in: what was
        learned."""
        return tuple(name for name, _ in self.named_parameters())

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make it again; plain JSON."""

    @classmethod
    @abstractmethod
    def restored(cls, saved: Saved) -> Self:
        """Of that description. Raises KeyError or AttributeError where something is missing."""

    def listen(self, model: nn.Module) -> None:
        """Hear of what the model is called with, once all layers are in their places."""

    def remade(self, model: nn.Module) -> tuple[str, ...]:
        """The model's tensors that this layer makes anew, so that they need not be stored."""
        return ()


_KINDS: dict[str, type[Layer]] = {}


def layer_kinds() -> dict[str, type[Layer]]:
    """The classes of layers that this process has met, by kind."""
    return dict(sorted(_KINDS.items()))


def restorable(layer: Layer) -> bool:
    """Whether its kind is its own: a subclass without one would come back as what it derives
    from."""
    known = _KINDS.get(getattr(type(layer), "kind", ""))
    return known is not None and _place(known) == _place(type(layer))


def _place(cls: type[Layer]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Replacement(Layer):
    """A layer in the place of ``base``, the layer as it was.

    What else is asked of it is the base's; of the base's tensors only what they look like
    (:class:`~fusewright.modules.looks.Looks`), since who multiplies with them by himself would
    never ask the experts.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer as it was: models look at its weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("base"), name)
        return found.as_subclass(Looks) if isinstance(found, Tensor) else found

    @property
    def added(self) -> int:
        own = self.base.state_dict().values()
        return super().added - sum(t.numel() for t in own if t.is_floating_point())

    @property
    def trained(self) -> int:
        return super().trained - sum(parameter.numel() for parameter in self.base.parameters())

    @property
    def precise(self) -> tuple[str, ...]:
        return tuple(name for name in super().precise if not name.startswith("base."))

    def plain(self) -> dict[str, Tensor]:
        """The base's own tensors, by their names in it, with which it alone answers as this layer
        does. Raises PlanError where there are none."""
        raise PlanError("a layer has no plain form", where=type(self).__name__,
                        expected="mixtures, as of wemoe")  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """What was saved of a layer at a path of ``model``: its description, and its tensors by their
    names inside it. ``routing`` holds the model's mixtures, if it has any."""

    model: nn.Module
    at: str
    said: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    routing: Routing | None = None

    @property
    def base(self) -> nn.Module:
        """The layer in whose place it goes."""
        return self.model.get_submodule(self.at)

    @property
    def mixtures(self) -> list[Any]:
        """Those that layers share. Raises KeyError if the model has none."""
        if self.routing is None:
            raise KeyError("routing")
        return self.routing.mixtures

    def inside(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a name."""
        return {n.removeprefix(f"{prefix}."): t for n, t in self.tensors.items()
                if n.startswith(f"{prefix}.")}  # fmt: skip


def put_in(
    model: nn.Module, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Put layers at their paths and other values into tensors, in place; a path that is new becomes
    a child. Layers that listen to others do so from then on."""
    own = model.state_dict()
    for path, layer in layers.items():
        if isinstance(layer, Replacement):  # it may be in its place already
            own |= {f"{path}.{name}": tensor for name, tensor in layer.base.state_dict().items()}
    with torch.no_grad():
        for name, tensor in (tensors or {}).items():
            own[name].copy_(tensor)
    place(model, {path: beside(model, layer) for path, layer in layers.items()})
    listen(model, layers)


def place(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Put layers at their paths, silent as yet: those inside others after them."""
    for path in sorted(layers):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layers[path])
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # which no layer but torch's own fast path can take


def listen(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Have all layers hear of what the model is called with."""
    for layer in layers.values():
        layer.listen(model)

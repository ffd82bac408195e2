"""Weights that follow a preference over tasks: one w for each module, a merge for each preference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError, nearest
from fusewright.modules.layer import Layer, Saved
from fusewright.modules.tensors import named_tensors, tied_names, wide_dtype

PREFERENCES = "preferences"
"""The name under which a model holds its :class:`Preferences`."""


Preference = Mapping[str, float] | Sequence[float] | Tensor
"""r: a number for each expert, by its name or in the experts' order."""


def on_simplex(preference: Preference, experts: Sequence[str]) -> Tensor:
    """r (experts,), float32, divided by its sum.

    Raises PlanError unless there is one number for each expert, none is negative or not finite,
    and one is positive.
    """
    if isinstance(preference, Mapping):
        preference = _ordered(preference, experts)
    wrong = None
    try:
        r = torch.as_tensor(preference, dtype=torch.float64).reshape(-1)
    except (TypeError, ValueError):
        raise _no_preference(preference, experts) from None
    if len(r) != len(experts):
        wrong = f"{len(r)} numbers"
    elif not bool(r.isfinite().all()) or bool((r < 0).any()) or not float(r.sum()) > 0:
        wrong = str(r.tolist())
    if wrong is not None:
        raise _no_preference(wrong, experts)
    return (r / r.sum()).float()


def _no_preference(found: object, experts: Sequence[str]) -> PlanError:
    example = [1.0] + [0.0] * (len(experts) - 1)
    return PlanError("a preference says how much each task counts", found=found,
                     expected=f"{len(experts)} numbers, at least 0, for {', '.join(experts)}",
                     fix=f"preference: {example}")  # fmt: skip


def _ordered(preference: Mapping[str, float], experts: Sequence[str]) -> list[float]:
    """By expert, in their order. Raises PlanError unless exactly they are named."""
    unknown = [str(name) for name in preference if name not in experts]
    missing = [name for name in experts if name not in preference]
    if unknown or missing:
        what = "names what is no expert" if unknown else "leaves experts out"
        close = nearest(unknown[0], missing) if unknown else None
        raise PlanError(f"a preference {what}", where=", ".join(unknown or missing),
                        expected=", ".join(experts), found=", ".join(map(str, preference)),
                        fix=f"did you mean {close!r}?" if close else
                            f"preference: {dict.fromkeys(experts, 1.0)}")  # fmt: skip
    return [preference[name] for name in experts]


class PreferenceRouters(nn.Module):
    """w_M = g_M(r) (experts,) for each of ``modules``, with g_M of one of two depths:

        1: W r + b        2: W_2 ReLU(W_1 r + b_1) + b_2, W_1 (2 experts, experts)

    4T² + 3T numbers a module at depth 2, T² + T at depth 1. Weights are drawn from N(0, 0.01²) by
    ``seed``; hidden biases are 0, the last is ``start``. In float32. With so few hidden units all
    can be 0 in a part of the simplex, where w then no longer follows r: a smaller rate, or depth 1.
    """

    def __init__(
        self, modules: int, experts: int, depth: int, start: float = 0.3, seed: int = 0
    ) -> None:
        super().__init__()
        self.experts, self.depth = experts, depth
        draw = torch.Generator().manual_seed(seed)

        def drawn(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(0.01 * torch.randn(modules, rows, columns, generator=draw))

        width = experts if depth == 1 else 2 * experts
        self.inner = drawn(width, experts) if depth == 2 else None
        self.inner_bias = nn.Parameter(torch.zeros(modules, width)) if depth == 2 else None
        self.weight = drawn(experts, width)
        self.bias = nn.Parameter(torch.full((modules, experts), start))

    def forward(self, module: int, preference: Tensor) -> Tensor:
        """(experts,) -> (experts,) of one module."""
        seen = preference.to(self.weight)
        if self.inner is not None and self.inner_bias is not None:
            seen = (self.inner[module] @ seen + self.inner_bias[module]).relu()
        return self.weight[module] @ seen + self.bias[module]


class _Held(nn.Module):
    """θ_0 and τ (experts, …) of one tensor."""

    base: Tensor
    deltas: Tensor

    def __init__(self, base: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.register_buffer("deltas", deltas)


class Preferences(Layer):
    """θ_M(r) = θ_0 + Σ_t g_M(r)_t τ_t for the selected tensors of a model, which it is a child of.

    ``tensors`` {name: (module's number, θ_0, τ (experts, …))}. The model's own tensors of these
    names are the merge of the preference that was set last, so that it runs as fast as the base;
    they are made anew when the preference is set, when tensors are loaded, and before a forward
    where r, a router or a stored tensor changed in between. Sums are in float32 or better.
    """

    kind: ClassVar[str] = "preferences"

    preference: Tensor

    def __init__(
        self, experts: Sequence[str], routers: PreferenceRouters,
        tensors: Mapping[str, tuple[int, Tensor, Tensor]], preference: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts, self.routers = tuple(experts), routers
        self.names = tuple(tensors)
        self.places = tuple(place for place, _, _ in tensors.values())
        self.held = nn.ModuleList(_Held(base, deltas) for _, base, deltas in tensors.values())
        self.register_buffer("preference", preference)
        self._model: tuple[nn.Module, ...] = ()
        self._made: object = None
        self.register_load_state_dict_post_hook(_loaded)

    def set_preference(self, preference: Preference) -> None:
        """Merge the model for r (experts,) or by expert, which is divided by its sum. Raises
        PlanError for what is no preference."""
        r = on_simplex(preference, self.experts).to(self.preference)
        with torch.inference_mode(False), torch.no_grad():
            self.preference.copy_(r)
        self.refresh()

    def forward(self, inputs: Tensor) -> Tensor:
        """What it got: the last child of an ``nn.Sequential`` is called."""
        return inputs

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The selected tensors at the present preference, in θ_0's dtype."""
        cache: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, place, held in zip(self.names, self.places, self.held, strict=True):
            assert isinstance(held, _Held)
            if place not in cache:
                cache[place] = self.routers(place, self.preference)
            wide = wide_dtype(held.base)
            total = held.base.to(wide)
            for weight, delta in zip(cache[place].to(wide), held.deltas, strict=True):
                total = total + weight * delta.to(wide)
            found[name] = total.to(held.base.dtype)
        return found

    def refresh(self, *call: Any) -> None:
        """Merge anew if something changed; called before each forward of the model."""
        if not self._model or self._made == self._state():
            return
        own = dict(named_tensors(self._model[0]))
        with torch.inference_mode(False):
            for name, tensor in self.merged().items():
                own[name].data = tensor
        self._made = self._state()

    def _state(self) -> object:
        """Differs whenever a number that the merge depends on was written to."""
        tensors = (*self.parameters(), *self.buffers())
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    def listen(self, model: nn.Module) -> None:
        """Merge into that model from now on, and give it ``set_preference``."""
        if self._model:
            return
        self._model = (model,)
        model.register_forward_pre_hook(self.refresh)
        model.set_preference = self.set_preference  # type: ignore[assignment]
        self.refresh()

    def remade(self, model: nn.Module) -> tuple[str, ...]:
        """The selected tensors, under all their names."""
        also = [name for names in tied_names(model) if set(names) & set(self.names)
                for name in names]  # fmt: skip
        return tuple(dict.fromkeys((*self.names, *also)))

    @property
    def active(self) -> int:
        """Numbers of the merged tensors: all that an input's answer depends on."""
        return sum(held.base.numel() for held in self.held if isinstance(held, _Held))

    @property
    def precise(self) -> tuple[str, ...]:
        return (*super().precise, "preference")

    def described(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts), "names": list(self.names),
            "places": list(self.places), "depth": self.routers.depth,
        }  # fmt: skip

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        said, tensors, experts = saved.said, saved.tensors, saved.said["experts"]
        routers = PreferenceRouters(max(said["places"]) + 1, len(experts), said["depth"])
        held = {
            name: (place, tensors[f"held.{at}.base"], tensors[f"held.{at}.deltas"])
            for at, (name, place) in enumerate(zip(said["names"], said["places"], strict=True))
        }
        return cls(experts, routers, held, tensors["preference"])


def _loaded(preferences: nn.Module, keys: object) -> None:
    assert isinstance(preferences, Preferences)
    preferences.refresh()

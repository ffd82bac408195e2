"""Merges in memory, and other scales of a merge that was made already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.sweep.costs import measured
from fusewright.bench.sweep.space import current, linear, with_values
from fusewright.methods.contract import Program, Routed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusewright.methods.contract import Method
    from fusewright.tasks.adaptation import Adaptation

State = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Made:
    """A merged state dict and what it cost: "seconds", "peak_memory", "bytes_read", "trained", and
    a routed model's sizes; ``routed``: the module itself, where its layers are not the base's."""

    state: State
    costs: dict[str, float]
    routed: nn.Module | None = None


@dataclass
class Merges:
    """Merges of some experts of one base. Of a linear family, θ = θ0 + λ·v, the last v is kept:
    another λ then reads nothing and merges nothing."""

    base: Path
    experts: Mapping[str, Path]
    threads: int | None = None
    data: Callable[[str], Adaptation] | None = None
    """What methods that learn are given, by what their card asks for."""
    optional: tuple[str, ...] = ()
    device: str = "cpu"
    """Where models are run that a method learns with; merges are computed on the CPU."""
    _kept: tuple[Method, float, Made] | None = field(default=None, repr=False)
    _base: State | None = field(default=None, repr=False)

    def make(self, method: Method) -> Made:
        """The merge, made anew or re-scaled; the same bytes as on disk where it is made anew."""
        if isinstance(method, Program | Routed):
            return self._merged(method, None)
        name = linear(method)
        scale = 0.0 if name is None else current(method)[name]
        if name is None or scale == 0.0:
            return self._merged(method, None)
        unit = with_values(method, {name: 1.0})
        if self._kept is None or self._kept[0] != unit:
            self._kept = unit, scale, self._merged(method, self._arithmetic())
        _, at, made = self._kept
        return Made(self._moved(made.state, scale / at), made.costs)

    def _merged(self, method: Method, dtype: str | None) -> Made:
        from fusewright.engine import merge

        unused = method.card.base == "unused" and not self.optional
        needs_base = {} if unused else {"base": self.base}
        options: dict[str, Any] = {} if self.threads is None else {"threads": self.threads}
        if isinstance(method, Program | Routed):
            options["data"] = None if self.data is None else self.data(method.needs)
            options["device"] = self.device
        else:
            _warm(method, len(self.experts))
        with measured() as cost:
            merged = merge(
                method, experts=dict(self.experts), dtype=dtype, optional=self.optional,
                **needs_base, **options,
            )  # fmt: skip
        module = merged.module() if isinstance(method, Routed) else None
        read = {k: float(v) for k, v in merged.report.items() if k == "bytes_read"}
        costs = cost.plain() | read | _sizes(method, merged.report)
        return Made(merged.state_dict(), costs, module)

    def _start(self) -> State:
        if self._base is None:
            from fusewright.engine.state import read_state

            self._base = read_state(self.base)
        return self._base

    def _arithmetic(self) -> str:
        import torch

        wide = any(t.dtype == torch.float64 for t in self._start().values())
        return "float64" if wide else "float32"

    def _moved(self, end: State, times: float) -> State:
        """θ0 + times·(θ - θ0), rounded once to the base's dtypes."""
        start, moved = self._start(), {}
        for name, tensor in end.items():
            if name in start and tensor.is_floating_point():
                if times != 1.0:
                    origin = start[name].to(tensor.dtype)
                    tensor = origin.add(tensor - origin, alpha=times)
                tensor = tensor.to(start[name].dtype)
            moved[name] = tensor
        return moved


def _sizes(method: Method, report: Mapping[str, Any]) -> dict[str, float]:
    """How many numbers were "trained" (absent where a fit does not say it), and of a routed model
    those "stored", those that one input's answer depends on ("active"), and its "bytes"."""
    if isinstance(method, Routed):
        said = report["parameters"]
        return {name: float(said[name]) for name in ("trained", "stored", "active", "bytes")}
    if not isinstance(method, Program):
        return {"trained": 0.0}
    fitted = report.get("fitted") or {}
    return {"trained": float(fitted["trained"])} if "trained" in fitted else {}


def _warm(method: Method, experts: int) -> None:
    """Merge toys first: what is imported and compiled once is no cost of this merge."""
    import torch

    from fusewright.engine import merge
    from fusewright.errors import FusewrightError

    draw = torch.Generator().manual_seed(0)
    # Longer than a canonical block, and with a matrix and a vector as models have them.
    toys: list[State] = [
        {"layers.0.weight": torch.randn(300, 300, generator=draw), "norm.weight": torch.ones(8)}
        for _ in range(experts + 1)
    ]
    base = {} if method.card.base == "unused" else {"base": toys[0]}
    with suppress(FusewrightError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(method, experts={str(i): toy for i, toy in enumerate(toys[1:])}, **base)

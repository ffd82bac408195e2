"""Coefficients that are learned: one for each expert and group of tensors, and masks over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fusewright.errors import RecipeError
from fusewright.modules.masks import Masks
from fusewright.modules.parametrised import Coefficients


class LinearCoefficients(Coefficients):
    """c_t of an expert t in a group of tensors: ``values`` (groups, experts), float32.

    ``group`` says of a tensor's name which group it is in: one for all tensors is task-wise, each
    its own is layer-wise as AdaMerging (2310.02575) means it.
    """

    def __init__(
        self, names: Sequence[str], experts: Sequence[str], group: Callable[[str], str],
        start: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts = tuple(experts)
        self.groups = tuple(dict.fromkeys(group(name) for name in names))
        rows = {name: row for row, name in enumerate(self.groups)}
        self._row = {name: rows[group(name)] for name in names}
        self.values = nn.Parameter(torch.full((len(self.groups), len(experts)), start))

    def weights(self, name: str) -> Tensor:
        return self.values[self._row[name]]

    def restart(self, value: float) -> None:
        """The same number everywhere."""
        with torch.no_grad():
            self.values.fill_(value)

    def clamp(self, low: float, high: float) -> None:
        """Project onto [low, high]: unlike a clamp inside the merge, it lets no gradient die."""
        with torch.no_grad():
            self.values.clamp_(low, high)

    def written(self, stored: Callable[[str], str]) -> dict[str, list[object]]:
        """The ``weight`` of a recipe's merger: by expert, a filter for every tensor.

        ``stored`` is what checkpoints call a tensor. Filters are found anywhere in a name, so
        longer ones come first: a name is then met by itself before any part of it.
        """
        table = {stored(name): self.values[row].tolist() for name, row in self._row.items()}
        return {expert: _filters(table, at) for at, expert in enumerate(self.experts)}


class MaskedCoefficients(Coefficients):
    """Linear coefficients under masks: those of a ``draw`` or, where it is None, the final ones,
    which are the expected masks or (``answer`` "drawn") one more draw."""

    FINAL: ClassVar[int] = -1
    """The number of the draw that is the final mask."""

    def __init__(
        self, linear: LinearCoefficients, masks: Masks,
        answer: Literal["expected", "drawn"],
    ) -> None:  # fmt: skip
        super().__init__()
        self.linear, self.masks, self.answer = linear, masks, answer
        self.draw: int | None = None
        self._fixed: dict[str, Tensor] = {}

    def weights(self, name: str) -> Tensor:
        return self.linear.weights(name)

    def mask(self, name: str) -> Tensor:
        if self.draw is not None:
            return self.masks.drawn(name, self.draw)
        return self._fixed[name] if name in self._fixed else self._final(name)

    def fix(self, names: Sequence[str]) -> None:
        """From now on the masks are the final ones, held in memory; they are learned no more."""
        self.masks.requires_grad_(False)
        self.draw, self._fixed = None, {name: self._final(name) for name in names}

    def _final(self, name: str) -> Tensor:
        if self.answer == "expected":
            return self.masks.expected(name)
        return self.masks.drawn(name, self.FINAL).detach()


def check_bounds(low: float | None, high: float | None) -> None:
    """Raises RecipeError for bounds that no number is within."""
    if low is not None and high is not None and not low <= high:
        raise RecipeError("no coefficient lies within the bounds", where="low, high",
                          expected="low ≤ high, or null for none", found=f"{low}, {high}")


def _filters(table: Mapping[str, Sequence[float]], expert: int) -> list[object]:
    longest = sorted(table, key=len, reverse=True)
    return [*({"filter": name, "value": table[name][expert]} for name in longest), 0.0]

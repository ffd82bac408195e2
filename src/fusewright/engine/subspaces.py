"""In which singular directions of the base's matrices the task vectors lie: SMILE's premise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.engine._models import Matched
from fusewright.engine._pairs import Source
from fusewright.engine.progress import Listener, Meter
from fusewright.errors import PlanError, WeightsError
from fusewright.layout import TensorLayout
from fusewright.weights import LowRank, Weights
from fusewright.weights.lora_math import load

ZONES = ("leading", "lesser", "null", "across")
"""Where a part of a task vector lies. With h the fewest directions that hold half of Σσ and r the
rank of W_0 = U S Vᵀ: leading is U_hᵀ Δ V_h; lesser the directions h to r on both sides; null the
rest of what no leading direction touches; across what joins a leading direction to another."""

_COPIES = 6  # the matrix, its factors, Δ and its projections, all float64


@dataclass(frozen=True, eq=False)
class Shares:
    """Energies ‖Δ‖² of experts in the zones, (experts, 4), and what random matrices of the same
    norms would have there: ‖Δ‖² times the zone's part of the matrix."""

    energies: NDArray[np.float64]
    random: NDArray[np.float64]

    @classmethod
    def total(cls, parts: Iterable[Shares]) -> Shares:
        """Over several matrices."""
        energies, random = zip(*((part.energies, part.random) for part in parts), strict=True)
        return cls(np.sum(energies, axis=0), np.sum(random, axis=0))

    def of(self, expert: int | None = None) -> dict[str, float] | None:
        """Shares of an expert's energy (of all experts' together, if None) by zone, and by
        "zone, random" what chance would give; None where there is no change."""
        pick = slice(None) if expert is None else slice(expert, expert + 1)
        found, random = self.energies[pick].sum(axis=0), self.random[pick].sum(axis=0)
        whole = float(found.sum())
        if not whole:
            return None
        shares = dict(zip(ZONES, (found / whole).tolist(), strict=True))
        return shares | {f"{zone}, random": float(value / random.sum())
                         for zone, value in zip(ZONES, random, strict=True)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MatrixShares:
    """One matrix (of a tensor that packs several, its number ``part``): its shape, the directions
    that hold ``half`` of Σσ, its ``rank``, and the experts' shares."""

    tensor: str
    part: int
    role: str
    layer: str
    shape: tuple[int, int]
    half: int
    rank: int
    shares: Shares


@dataclass(frozen=True, eq=False)
class Subspaces:
    """The shares of task vectors' energy in singular directions of the base (*SMILE*, 2408.10174),
    matrix by matrix, in the order of the layers."""

    base: str
    experts: tuple[str, ...]
    matrices: tuple[MatrixShares, ...]

    def by(self, of: Callable[[MatrixShares], str]) -> dict[str, Shares]:
        """Summed over the matrices for which ``of`` says the same."""
        groups: dict[str, list[Shares]] = {}
        for one in self.matrices:
            groups.setdefault(of(one), []).append(one.shares)
        return {name: Shares.total(parts) for name, parts in groups.items()}

    def roles(self) -> dict[str, Shares]:
        return self.by(lambda one: one.role)

    def layers(self) -> dict[str, Shares]:
        return self.by(lambda one: one.layer)

    def whole(self) -> Shares:
        """Over the model. Raises ValueError where it has no matrix."""
        return Shares.total(one.shares for one in self.matrices)

    def numbers(self, shares: Shares) -> dict[str, Any]:
        """By expert, and "all" of them together."""
        each = {name: shares.of(t) for t, name in enumerate(self.experts)}
        return {"experts": each, "all": shares.of()}

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base, "experts": list(self.experts),
            "model": self.numbers(self.whole()) if self.matrices else None,
            "roles": {name: self.numbers(one) for name, one in self.roles().items()},
            "layers": {name: self.numbers(one) for name, one in self.layers().items()},
            "matrices": [
                {"tensor": one.tensor, "part": one.part, "role": one.role, "layer": one.layer,
                 "shape": list(one.shape), "half": one.half, "rank": one.rank,
                 **self.numbers(one.shares)}
                for one in self.matrices
            ],
        }  # fmt: skip


def measure(
    base: str, matched: Matched, names: Sequence[str], layer_of: Callable[[TensorLayout], str], *,
    threads: int, memory: int, progress: Listener | None = None,
) -> Subspaces:  # fmt: skip
    """Every matrix that acts as a linear map, in the order of ``names``; one tensor of the base and
    one expert's are in memory at a time.

    Raises PlanError if ``memory`` (bytes) does not hold the largest tensor, WeightsError where a
    number is not finite.
    """
    known = {source.name: source for source in matched.sources()}
    sources = [known[n] for n in names if known[n].is_float and known[n].numel
               and matched.layout[n].matrix]  # fmt: skip
    _check(sources, memory)
    meter = Meter(sum(source.numel * source.width for source in sources), progress, False)
    found: list[MatrixShares] = []
    with _threads(threads):
        for source in sources:
            place = matched.layout[source.name]
            found += _of_tensor(source, matched, place, layer_of(place))
            meter("subspace", source.name, source.numel * source.width)
    return Subspaces(base, tuple(matched.experts), tuple(found))


def _check(sources: Sequence[Source], memory: int) -> None:
    largest = max(sources, key=lambda source: source.numel, default=None)
    need = 0 if largest is None else 8 * _COPIES * largest.numel
    if largest is not None and memory < need:
        raise PlanError(
            "the memory budget does not hold the decomposition of the largest matrix",
            where=largest.name, expected=f"at least {need} bytes", found=memory,
            fix=f"--memory {-(-need >> 20)}MiB",
        )  # fmt: skip


def _of_tensor(
    source: Source, matched: Matched, place: TensorLayout, layer: str
) -> Iterator[MatrixShares]:
    theta = _wide(matched.base, source.own)
    bases = [Basis.of(matrix) for matrix in matrices(theta, place)]
    pairs = zip(matched.experts.values(), source.experts, strict=True)
    each = [_energies(weights, own, theta, bases, place) for weights, own in pairs]
    for part, basis in enumerate(bases):
        energies = np.stack([one[part] for one in each])
        random = energies.sum(axis=1, keepdims=True) * basis.chance()
        yield MatrixShares(source.name, part, str(place.role), layer, basis.shape, basis.half,
                           basis.rank, Shares(energies, random))  # fmt: skip


def _energies(
    weights: Weights, own: str | None, theta: Tensor, bases: Sequence[Basis], place: TensorLayout
) -> list[NDArray[np.float64]]:
    known = 0.0 if own is None else weights.delta(own)
    if own is None or known == 0.0:
        return [np.zeros(len(ZONES)) for _ in bases]
    if isinstance(known, LowRank):
        delta = known.scale * (known.up.double() @ known.down.double()).view(theta.shape)
    else:
        delta = _wide(weights, own) - theta
    parts = zip(bases, matrices(delta, place), strict=True)
    return [basis.energies(matrix) for basis, matrix in parts]


def _wide(weights: Weights, name: str) -> Tensor:
    found = load(weights, name).double()
    if not bool(found.isfinite().all()):
        raise WeightsError("singular directions need finite numbers", expected="no NaN, no ±Inf",
                           where=f"{weights.label}: {name}",
                           found=f"{int((~found.isfinite()).sum())} others")  # fmt: skip
    return found


def matrices(tensor: Tensor, place: TensorLayout) -> list[Tensor]:
    """The linear maps in a tensor: packed ones apart, convolutions as (out, -1)."""
    if place.experts_first and tensor.dim() == 3:
        return list(tensor)
    if place.packed and tensor.dim() == 2:
        return list(tensor.split(list(place.packed), dim=place.packed_axis))
    return [tensor.reshape(tensor.shape[0], -1)]


@dataclass(frozen=True, eq=False)
class Basis:
    """The singular directions of a matrix (rows, columns), float64: ``left`` (rows, rank) and
    ``right`` (columns, rank), of which the first ``half`` hold half of Σσ. σ counts if it is above
    max(rows, columns)·ε·σ_1 with float32's ε."""

    left: Tensor
    right: Tensor
    half: int

    @classmethod
    def of(cls, matrix: Tensor) -> Basis:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        least = max(matrix.shape) * torch.finfo(torch.float32).eps * float(values[0])
        rank = int((values > least).sum())
        sums = values[:rank].cumsum(0)
        half = int((sums < 0.5 * sums[-1]).sum()) + 1 if rank else 0
        return cls(u[:, :rank], vt[:rank].T, half)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def chance(self) -> NDArray[np.float64]:
        """Each zone's part of a random matrix's energy: the product of its dimensions over all."""
        (m, n), h, r = self.shape, self.half, self.rank
        beyond, lesser = (m - h) * (n - h), (r - h) ** 2
        parts = np.array([h * h, lesser, beyond - lesser, h * (m + n - 2 * h)], dtype=np.float64)
        found: NDArray[np.float64] = parts / (m * n)
        return found

    def energies(self, delta: Tensor) -> NDArray[np.float64]:
        """‖Δ‖² by zone; they sum to the whole."""
        h, turned = self.half, self.left.T @ delta
        inside = turned @ self.right
        leading, lesser = _squared(inside[:h, :h]), _squared(inside[h:, h:])
        rows, columns = _squared(turned[:h]), _squared(delta @ self.right[:, :h])
        across = rows + columns - 2 * leading
        null = _squared(delta) - leading - across - lesser
        found = np.maximum([leading, lesser, null, across], 0.0)
        found[self.chance() == 0] = 0.0  # of a zone without room there are rounding errors only
        return found


def _squared(x: Tensor) -> float:
    return float(x.square().sum())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

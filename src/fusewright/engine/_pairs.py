"""Products of task vectors, streamed: all that norms, cosines and sign conflicts need.

With θ0 the base and τ_t = θ_t - θ0, one pass collects the Gram matrix of (θ0, τ_1, …, τ_n), which
coordinates changed, and where signs disagree. Differences are taken in float64, and sums are one
float64 number a canonical block (:mod:`fusewright.methods.partials`), so the result depends on
neither threads nor memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, groupby, islice
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.engine.progress import Listener, Meter
from fusewright.errors import PlanError
from fusewright.methods.partials import BLOCK, Partial, block_sums
from fusewright.weights.spec import LowRank, TensorInfo, Weights

_BLOCKS = 4     # canonical blocks a chunk, if memory allows
_WINDOW = 64    # chunks in flight or waiting: bounds what is queued, not the result


@dataclass(frozen=True)
class Source:
    """One tensor of the base, and its name in every expert (None: not comparable there).

    ``width`` is how many bytes one element takes in all of them together.
    """

    name: str
    own: str
    experts: tuple[str | None, ...]
    numel: int
    width: int
    is_float: bool


def make_source(
    name: str, base: TensorInfo, experts: Sequence[Weights], own: tuple[str | None, ...]
) -> Source:
    """The source of a tensor of the base that the experts hold under their ``own`` names."""
    held = [weights[key] for weights, key in zip(experts, own, strict=True) if key is not None]
    width = base.dtype.itemsize + sum(info.dtype.itemsize for info in held)
    return Source(name, base.name, own, base.numel, width, base.dtype.is_float)


@dataclass(frozen=True)
class Span:
    """Elements [start, stop) of a source; ``start`` is a multiple of the canonical block."""

    source: Source
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in all models together."""
        return (self.stop - self.start) * self.source.width


@dataclass(frozen=True, eq=False)
class Pairs:
    """What was found over some tensors. Where an expert cannot be compared its τ counts as 0.

    ``elements`` counts the coordinates compared with each expert; ``gram`` is (1 + n, 1 + n), base
    first; ``base_squares`` the base's ‖·‖² over the tensors that
    each expert shares with it; ``changed`` counts coordinates that differ from the base; ``bad``
    counts NaN and ±Inf of each model, base first, which are left out of the sums; ``conflicts`` of
    the ``shared`` coordinates (changed by two experts or more) have both signs.
    """

    elements: NDArray[np.int64]
    gram: NDArray[np.float64]
    base_squares: NDArray[np.float64]
    changed: NDArray[np.int64]
    bad: NDArray[np.int64]
    shared: int
    conflicts: int

    @classmethod
    def total(cls, parts: Sequence[Pairs], experts: int) -> Pairs:
        """Over several tensors; sums are exact (one rounding), so order does not matter."""
        n = experts
        flat = [np.concatenate([p.gram.ravel(), p.base_squares]) for p in parts]
        sums = np.array([math.fsum(column) for column in zip(*flat, strict=True)])
        sums = sums if parts else np.zeros((n + 1) ** 2 + n)
        return cls(
            sum((p.elements for p in parts), np.zeros(n, np.int64)),
            sums[: (n + 1) ** 2].reshape(n + 1, n + 1),
            sums[(n + 1) ** 2 :],
            sum((p.changed for p in parts), np.zeros(n, np.int64)),
            sum((p.bad for p in parts), np.zeros(n + 1, np.int64)),
            sum(p.shared for p in parts),
            sum(p.conflicts for p in parts),
        )

    def norm(self, t: int) -> float:
        """‖τ_t‖."""
        return math.sqrt(self.gram[t + 1, t + 1])

    def relative(self, t: int) -> float | None:
        """‖τ_t‖ / ‖θ0‖; None if the base is zero or nothing could be compared."""
        return _ratio(self.norm(t), math.sqrt(self.base_squares[t]))

    def changed_fraction(self, t: int) -> float | None:
        """The fraction of coordinates in which an expert differs from the base."""
        return _ratio(float(self.changed[t]), float(self.elements[t]))

    def cosine(self, i: int, j: int) -> float | None:
        """cos(τ_i, τ_j); None if one of them is zero."""
        g = self.gram
        return _ratio(g[i + 1, j + 1], math.sqrt(g[i + 1, i + 1]) * math.sqrt(g[j + 1, j + 1]))

    def cosine_to_base(self, t: int) -> float | None:
        """cos(θ_t, θ0), from ⟨θ_t, θ0⟩ = ‖θ0‖² + ⟨θ0, τ_t⟩."""
        base, cross = self.base_squares[t], self.gram[0, t + 1]
        length = math.sqrt(max(base + 2 * cross + self.gram[t + 1, t + 1], 0.0))
        return _ratio(base + cross, math.sqrt(base) * length)

    @property
    def conflict_rate(self) -> float | None:
        """Of the coordinates that two experts or more change, the fraction with both signs."""
        return _ratio(self.conflicts, self.shared)


def _ratio(over: float, under: float) -> float | None:
    return float(over / under) if under else None


def compare(
    base: Weights,
    experts: Sequence[Weights],
    spans: Sequence[Span],
    *,
    threads: int = 2,
    progress: Listener | None = None,
) -> dict[str, Pairs]:
    """Read the spans (those of one tensor in a row) and compare them; by tensor name."""
    meter = Meter(sum(span.nbytes for span in spans), progress, resumed=False)
    found: dict[str, Pairs] = {}

    def measured() -> Iterator[tuple[Span, Partial]]:
        queue = iter(spans)
        with _workers(threads) as pool:
            while window := list(islice(queue, _WINDOW)):
                parts = pool.map(lambda span: _measure(base, experts, span), window)
                for span, part in zip(window, parts, strict=True):
                    meter("compare", span.source.name, span.nbytes)
                    yield span, part

    for source, group in groupby(measured(), key=lambda pair: pair[0].source):
        pairs = list(group)
        seen = sum(span.stop - span.start for span, _ in pairs)
        found[source.name] = _pairs(source, seen, reduce(add, (part for _, part in pairs)))
    return found


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch adds none of its own."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _measure(base: Weights, experts: Sequence[Weights], span: Span) -> Partial:
    theta = _load(base, span.source.own, span.start, span.stop)
    taus = {
        t: tau
        for t, (weights, own) in enumerate(zip(experts, span.source.experts, strict=True))
        if own is not None and (tau := _tau(weights, own, theta, span)) is not None
    }
    n, is_float = len(experts), span.source.is_float
    bad = torch.zeros(n + 1, dtype=torch.int64)
    gram = _gram(theta, taus, n, is_float)
    # Squares of what is not finite are not either: cheaper to see there than in every number.
    if not bool(gram.isfinite().all()):
        theta, taus, bad = _without_nonfinite(theta, taus, n)
        gram = _gram(theta, taus, n, is_float)
    return Partial(sums={"gram": gram}, counts={"bad": bad, **_signs(theta, taus, n, is_float)})


def _gram(theta: Tensor, taus: Mapping[int, Tensor], experts: int, is_float: bool) -> Tensor:
    """Block sums of all products of (θ0, τ_1, …); zeros for integers, which have no norm."""
    rows = {0: theta, **{t + 1: tau for t, tau in taus.items()}} if is_float else {}
    blocks = -(-theta.numel() // BLOCK)
    gram = torch.zeros(experts + 1, experts + 1, blocks, dtype=torch.float64)
    for i, x in rows.items():
        for j, y in rows.items():
            if i <= j:
                gram[i, j] = gram[j, i] = block_sums(x * y)
    return gram


def _without_nonfinite(
    theta: Tensor, taus: Mapping[int, Tensor], experts: int
) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """Zeros for NaN and ±Inf, and their number in each model."""
    good = theta.isfinite()
    bad = torch.zeros(experts + 1, dtype=torch.int64)
    bad[0] = (~good).sum()
    usable = {t: tau.isfinite() for t, tau in taus.items()}
    for t, mask in usable.items():
        # Where the base is NaN so is the difference: that is the base's fault alone.
        bad[t + 1] = (good & ~mask).sum()
    return theta.where(good, 0.0), {t: x.where(usable[t], 0.0) for t, x in taus.items()}, bad


def _signs(
    theta: Tensor, taus: Mapping[int, Tensor], experts: int, is_float: bool
) -> dict[str, Tensor]:
    """How many coordinates each expert changes, several change, and several change both ways."""
    changed = torch.zeros(experts, dtype=torch.int64)
    many = torch.zeros(theta.numel(), dtype=torch.int16)
    up, down = torch.zeros(2, theta.numel(), dtype=torch.bool)
    for t, tau in taus.items():
        plus, minus = tau > 0, tau < 0
        moved = plus | minus
        changed[t] = torch.count_nonzero(moved)
        many += moved
        up |= plus
        down |= minus
    none = torch.zeros((), dtype=torch.int64)
    return {
        "changed": changed,
        "shared": torch.count_nonzero(many > 1) if is_float else none,
        "conflicts": torch.count_nonzero(up & down) if is_float else none,
    }


def _pairs(source: Source, seen: int, part: Partial) -> Pairs:
    gram = part["gram"]
    comparable = np.array([own is not None for own in source.experts], dtype=np.int64)
    return Pairs(
        seen * comparable, gram, gram[0, 0] * comparable, part["changed"], part["bad"],
        int(part["shared"]), int(part["conflicts"]),
    )  # fmt: skip


def _load(weights: Weights, name: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) in float64."""
    out = torch.empty(stop - start, dtype=weights[name].dtype.torch)
    weights.read(name, start, stop, out.view(torch.uint8).numpy().data)
    return out.to(torch.float64)


def _tau(weights: Weights, own: str, theta: Tensor, span: Span) -> Tensor | None:
    """The task vector's part; None where it is known to be zero without reading."""
    known = weights.delta(own)
    if known == 0.0:
        return None
    if isinstance(known, LowRank):
        return _from_factors(known, span)
    return _load(weights, own, span.start, span.stop) - theta


def _from_factors(low: LowRank, span: Span) -> Tensor:
    columns = low.down.shape[1]
    first, last = span.start // columns, -(-span.stop // columns)
    rows = low.up[first:last].double() @ low.down.double()
    offset = first * columns
    return low.scale * rows.reshape(-1)[span.start - offset : span.stop - offset]


def all_spans(sources: Sequence[Source], experts: int, threads: int, memory: int) -> list[Span]:
    """Every element, in chunks of as many canonical blocks (at most four) as the budget allows.

    Raises PlanError if ``memory`` (bytes) does not hold one block for each thread.
    """
    # A coordinate of a model: raw (at most 8 bytes), float64, and one temporary of each; then
    # products, their halving tree and counters.
    need = threads * BLOCK * (32 * (experts + 1) + 40)
    if memory < need:
        raise PlanError(
            "the memory budget holds no block for each thread", where=f"{threads} threads",
            expected=f"at least {need} bytes", found=memory, fix=f"--memory {-(-need >> 20)}MiB",
        )  # fmt: skip
    step = BLOCK * min(_BLOCKS, memory // need)
    return [
        Span(source, start, min(start + step, source.numel))
        for source in sources
        for start in range(0, source.numel, step)
    ]


def sampled_spans(sources: Sequence[Source], nbytes: int) -> list[Span]:
    """Canonical blocks at even distances over the whole model, at most ``nbytes`` of all models
    together (but at least one block); all of them if they are no more than that."""
    elements = nbytes // max((source.width for source in sources), default=1)
    ends = list(accumulate(-(-source.numel // BLOCK) for source in sources))
    total = ends[-1] if ends else 0
    few = sum(source.numel for source in sources) <= elements
    wanted = total if few else min(total, max(elements // BLOCK, 1))
    spans = []
    for pick in (i * total // wanted for i in range(wanted)):
        at = bisect_right(ends, pick)
        start = (pick - (ends[at - 1] if at else 0)) * BLOCK
        spans.append(Span(sources[at], start, min(start + BLOCK, sources[at].numel)))
    return spans

"""The volume that a set of outcomes dominates, exactly, of two or three tasks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from fusewright.errors import PlanError

Point = tuple[float, ...]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume of {y : reference ≤ y ≤ p for a p of ``points``}: larger is better in every one of
    the two or three coordinates; points that do not exceed ``reference`` in all add nothing
    (*Multiobjective evolutionary algorithms*, Zitzler and Thiele 1999).

    Sweeps: O(n log n) in two dimensions, O(n²) in three.

    Raises PlanError for another number of coordinates, or one that is not finite.
    """
    size = len(reference)
    if size not in (2, 3) or any(len(point) != size for point in points):
        raise PlanError("an exact hypervolume is of two or three coordinates",
                        found=sorted({size, *map(len, points)}),
                        fix="pairs of tasks")  # fmt: skip
    if any(not abs(x) < float("inf") for point in (*points, reference) for x in point):
        raise PlanError("a point is not finite", expected="numbers", found="nan or infinity")
    above = [tuple(x - low for x, low in zip(point, reference, strict=True)) for point in points]
    inside = [point for point in above if min(point) > 0]
    return _area(inside) if size == 2 else _volume(inside)


def nondominated(points: Sequence[Sequence[float]]) -> list[int]:
    """The numbers of the points that no other one is at least as good as in all coordinates and
    better in one; larger is better."""
    return [
        at for at, one in enumerate(points)
        if not any(_better(other, one) for other in points)
    ]  # fmt: skip


def _better(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def _area(points: Sequence[Point]) -> float:
    """From the largest x down, each point adds what is above the highest y so far."""
    total, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        total += x * max(0.0, y - height)
        height = max(height, y)
    return total


def _volume(points: Sequence[Point]) -> float:
    """From the largest z down, the staircase of (x, y) grows; each level is as deep as it stays."""
    total, area, stairs = 0.0, 0.0, _Stairs()
    ordered = sorted(points, key=lambda point: -point[2])
    for at, (x, y, z) in enumerate(ordered):
        area += stairs.add(x, y)
        following = ordered[at + 1][2] if at + 1 < len(ordered) else 0.0
        total += area * (z - following)
    return total


class _Stairs:
    """Non-dominated (x, y): x ascends, y descends."""

    def __init__(self) -> None:
        self.xs: list[float] = []
        self.ys: list[float] = []

    def add(self, x: float, y: float) -> float:
        """The area that a point adds."""
        end = bisect_left(self.xs, x)
        if end < len(self.xs) and self.ys[end] >= y:
            return 0.0
        if end < len(self.xs) and self.xs[end] == x:
            end += 1
        start = end
        while start > 0 and self.ys[start - 1] <= y:
            start -= 1
        gained, left = 0.0, self.xs[start - 1] if start else 0.0
        for right, height in zip(self.xs[start:end], self.ys[start:end], strict=True):
            gained += (right - left) * (y - height)
            left = right
        below = self.ys[end] if end < len(self.ys) else 0.0
        gained += (x - left) * (y - below)
        self.xs[start:end], self.ys[start:end] = [x], [y]
        return gained

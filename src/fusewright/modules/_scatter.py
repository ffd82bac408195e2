"""The Numba loop of :mod:`.scatter`."""

from __future__ import annotations

from typing import Any

from numba import njit, uint64


@njit(nogil=True, cache=True)
def add_rows(
    out: Any, base: Any, weights: Any, values: Any, gaps: Any, starts: Any, columns: Any,
    start: int, first: int, stop: int,
) -> None:  # fmt: skip
    """Rows ``first`` to ``stop`` of ``out``, which begins with row ``start`` of the matrix. A row
    stays in the nearest cache, and so do its values while all samples use them. Places are
    unsigned: of others Numba asks at each whether it counts from the end."""
    samples, experts = weights.shape
    for row in range(first, stop):
        origin = base[row]
        for sample in range(samples):
            line = out[sample, row]
            for i in range(len(line)):
                line[i] = origin[i]
            for expert in range(experts):
                weight = weights[sample, expert]
                begin = uint64(starts[expert, start + row])
                end = uint64(starts[expert, start + row + 1])
                if begin < end:
                    place = uint64(columns[expert, start + row])
                    line[place] += weight * values[begin]
                    for at in range(begin + uint64(1), end):
                        place += uint64(gaps[at])
                        line[place] += weight * values[at]

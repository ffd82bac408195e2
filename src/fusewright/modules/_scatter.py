"""The Numba loop of :mod:`.scatter`."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True, cache=True)
def add_rows(
    out: Any, base: Any, weights: Any, values: Any, gaps: Any, starts: Any, columns: Any,
    start: int, first: int, stop: int,
) -> None:  # fmt: skip
    """Rows ``first`` to ``stop`` of ``out``, which begins with row ``start`` of the matrix. A row
    stays in the nearest cache, and so do its values while all samples use them."""
    samples, experts = weights.shape
    inputs = base.shape[1]
    for row in range(first, stop):
        for sample in range(samples):
            for i in range(inputs):
                out[sample, row, i] = base[row, i]
            for expert in range(experts):
                weight, place = weights[sample, expert], columns[expert, start + row]
                begin, end = starts[expert, start + row], starts[expert, start + row + 1]
                for at in range(begin, end):
                    if at > begin:
                        place += gaps[at]
                    out[sample, row, place] += weight * values[at]

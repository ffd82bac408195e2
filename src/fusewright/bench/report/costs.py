"""What rows cost: names, units and order of the columns, the same in every format."""

from __future__ import annotations

from collections.abc import Sequence

from fusewright.bench.report.summary import Line

COSTS = {
    "seconds": "seconds to make", "peak_memory": "peak memory, MB", "bytes_read": "read, MB",
    "trained": "trained", "stored": "stored, M", "active": "active, M", "bytes": "size, MB",
    "extra_parameters": "extra parameters, M", "slowdown": "inference time, times the base's",
}  # fmt: skip
"""What each cost is called."""
UNITS = {"peak_memory": 1e6, "bytes_read": 1e6, "extra_parameters": 1e6, "stored": 1e6,
         "active": 1e6, "bytes": 1e6}  # fmt: skip
"""What one of the column's unit is; 1 where absent."""
EXPLAINED = (
    "trained: numbers that a method learned; stored: floating-point numbers of the model; active: "
    "those of them that one input's answer depends on; size: bytes of what is stored"
)
DASH = "\u2013"


def known_costs(lines: Sequence[Line]) -> list[str]:
    """The costs that some line has, in the order of columns."""
    return [name for name in COSTS if any(name in line.costs for line in lines)]


def cost(name: str, value: float | None) -> str:
    """A cost in the unit of its column; a dash where it was not measured."""
    if value is None:
        return DASH
    value /= UNITS.get(name, 1)
    return f"{value:,.0f}" if name == "trained" or value >= 1000 else f"{value:.3g}"

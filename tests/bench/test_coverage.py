"""The reported interval of a difference holds the truth as often as it says (a small version of
benchmarks/interval_coverage.py, with fewer simulations and resamples)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")


def _benchmark() -> Any:
    import sys

    path = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
SMALL = [case for case in benchmark.CASES if sum(case.items) <= 300]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_intervals_hold_the_truth_about_95_percent_of_the_time(case: Any) -> None:
    found = benchmark.coverage(case, simulations=250, resamples=150)
    # 250 simulations at 0.95: a standard error of 1.4 points
    assert all(0.91 <= share <= 0.99 for share in found.values()), found

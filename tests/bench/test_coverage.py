"""The reported interval of a difference holds the truth as often as it says (a small version of
benchmarks/coverage.py, with fewer simulations and resamples)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")


def _benchmark() -> Any:
    import sys

    path = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
SMALL = [case for case in benchmark.CASES if sum(case.items) <= 1000]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_intervals_hold_the_truth_about_95_percent_of_the_time(case: Any) -> None:
    share, _ = benchmark.coverage(case, simulations=400, resamples=200)
    # 400 simulations at 0.95: a standard error of 1.1 points
    assert 0.92 <= share <= 0.98

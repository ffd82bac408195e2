"""The defaults are the papers', and part of what recipes mean: nobody changes one unnoticed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fusewright.methods.registry import registry

ELECT = {"weight": 1.0, "normalize": True, "scale": 1.0, "scope": "model", "zero_sign": "majority"}
SUM = {"weight": 1.0, "scale": 1.0, "normalize": False}
DROP = {"density": 0.1, "rescale": "inverse", "seed": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "agree": {k: v for k, v in ELECT.items() if k != "normalize"},
    "average": {},
    "dare_linear": DROP | SUM,
    "dare_ties": DROP | ELECT,
    "drop": DROP,
    "elect": ELECT,
    "iso_c": {"scale": 1.0, "where": "matrices", "otherwise": "mean", "split": False},
    "linear": {"weight": 1.0, "normalize": True},
    "lines": {"alpha": None, "beta": 0.5},
    "mean": SUM | {"normalize": True},
    "metagpt": {},
    "model_stock": {"clamp": True},
    "passthrough": {"scale": 1.0},
    "slerp": {"t": 0.5},
    "sum": SUM,
    "task_arithmetic": SUM | {"scale": 0.3},
    "ties": ELECT | {"density": 0.2},
    "trim": {"density": 0.2, "scope": "model"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    given = inspect.signature(registry()[name]).parameters
    assert {key: field.default for key, field in given.items()} == DEFAULTS[name]


PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "dare_linear": {
        "fusionbench": {"density": 0.5, "scale": 0.3},
        "mergekit": {"density": 1.0, "rescale": "l1"},
    },
    "dare_ties": {
        "fusionbench": {"density": 0.5, "normalize": False, "scale": 0.5},
        "mergekit": {"density": 1.0, "rescale": "l1", "normalize": False, "scope": "tensor",
                     "zero_sign": "positive"},
    },
    "iso_c": {"fusionbench": {"where": "all_2d"}},
    "model_stock": {"fusionbench": {"clamp": False}, "mergekit": {"clamp": False}},
    "task_arithmetic": {"fusionbench": {"scale": 0.3}, "mergekit": {"scale": 1.0}},
    "ties": {
        "fusionbench": {"normalize": False, "scale": 0.3},
        "mergekit": {"density": 1.0, "scope": "tensor", "zero_sign": "positive"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_profiles(name: str) -> None:
    """What other tools do by default, as golden values of theirs have shown."""
    found = {key: dict(said) for key, said in registry()[name].profiles.items()}
    assert found == PROFILES.get(name, {})

"""Our answers against those of other projects' own code: see make_golden.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import Method
from fusewright.methods.registry import method_class

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def model(values: dict[str, list[float]]) -> dict[str, Tensor]:
    return {n: torch.tensor(values[n]).reshape(s) for n, s in GOLDEN["shapes"].items()}


BASE = model(GOLDEN["base"])
EXPERTS = {key: model(values) for key, values in GOLDEN["experts"].items()}


def experts_of(row: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    if row["method"] == "slerp":
        return {"a": EXPERTS["a"]}
    if "two experts" in row["source"]:
        return {k: EXPERTS[k] for k in ("a", "b")}
    return EXPERTS


def our_method(row: dict[str, Any]) -> Method:
    params = dict(row["params"])
    return method_class(row["method"]).profile(params.pop("profile", "paper"), **params)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in weights.values()])


def ours(row: dict[str, Any]) -> dict[str, Tensor]:
    method, experts = our_method(row), experts_of(row)
    if "model" in row["out"]:  # over the whole model, which at the tensor door is one tensor
        merged = method(flat(BASE), [flat(e) for e in experts.values()], keys=tuple(experts))
        return {"model": merged}
    return {
        name: method(
            base, [e[name] for e in experts.values()], keys=tuple(experts), name=name,
            layout=TensorLayout(name, matrix=base.dim() >= 2),
        )
        for name, base in BASE.items()
    }  # fmt: skip


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: row["source"])
def test_agrees_with_the_upstream_code(row: dict[str, Any]) -> None:
    for name, merged in ours(row).items():
        expected = torch.tensor(row["out"][name])
        torch.testing.assert_close(merged.reshape(-1), expected, rtol=2e-5, atol=2e-5)


def test_rows_of_one_method_differ() -> None:
    outs = [(row["method"], json.dumps(row["out"])) for row in GOLDEN["rows"]
            if "slerp" not in row["source"]]  # fmt: skip
    assert len(set(outs)) == len(outs), "a variant that changes nothing tests nothing"

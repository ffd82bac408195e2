"""``fusewright merge`` writes the plain model of one preference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusewright.engine.state import read_state
from tiny_suite import built, write_suite

for needed in ("sklearn", "transformers", "pyarrow"):
    pytest.importorskip(needed)


def test_a_recipe_names_the_preference(run: Any, tmp_path: Path) -> None:
    suite = built(tmp_path)
    first, second = suite.spec.merged[:2]
    experts = {name: str(suite.experts[name]) for name in (first, second)}
    said = {
        "fusewright": 1, "base": str(suite.base), "experts": experts,
        "method": {"pwe_moe": {"steps": 2, "batch": 8, "preference": {first: 1, second: 3}}},
        "data": {"suite": str(write_suite(tmp_path)), "pool": str(suite.pool), "limit": 32,
                 "split": "train"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(said))
    found = run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    fitted = json.loads((tmp_path / "out" / "fusewright.json").read_text())["fitted"]
    assert fitted["preference"] == [0.25, 0.75] and len(fitted["losses"]) == 2
    one, base = read_state(tmp_path / "out"), read_state(suite.base)
    assert one.keys() == base.keys() and not (tmp_path / "out" / "routed.json").exists()
    labelled = suite.labelled(8, limit=16).questions[first]
    batch = next(labelled.stream(8, 0))
    assert labelled.labels(suite.open(suite.base), batch).shape == (8,)
    assert not {"label", "labels"} & set(next(suite.unlabelled().questions[first].stream(8, 0)))

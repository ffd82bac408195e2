"""Task vectors by layer: how far experts went, and how much they agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fusewright.bench.sweep.identity import digest, files_digest
from fusewright.bench.sweep.store import remembered

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite
    from fusewright.engine._pairs import Pairs

FILE = "layers.json"
Rows = list[dict[str, Any]]


def layers(suite: Suite, folder: Path) -> Rows:
    """A row for each layer, in order, of the merged experts' task vectors: "norm" and "relative
    norm" (to the base's) are means over experts; "cosine" is the mean over pairs, "highest cosine"
    that of the pair most alike; "sign conflicts" the share of coordinates, of those that two
    experts or more change, on which signs disagree. None where a number does not apply.

    Every model is read once; the rows are kept in ``folder`` for as long as the models are the
    same.
    """
    paths = {name: suite.experts[name] for name in suite.spec.merged}
    key = digest([files_digest(suite.base), *map(files_digest, paths.values()), list(paths)])
    found: Rows = remembered(folder / FILE, key, lambda: _measured(suite.base, paths))
    return found


def _measured(base: Path, experts: Mapping[str, Path]) -> Rows:
    from fusewright.engine.inspect import inspect_models

    found = inspect_models(list(experts.values()), base=base).comparison
    assert found is not None
    return [_row(name, pairs, len(experts)) for name, pairs in found.layers.items()]


def _row(name: str, pairs: Pairs, experts: int) -> dict[str, Any]:
    relative = [pairs.relative(t) for t in range(experts)]
    cosines = [c for i, j in combinations(range(experts), 2)
               if (c := pairs.cosine(i, j)) is not None]  # fmt: skip
    known = [value for value in relative if value is not None]
    return {
        "layer": name,
        "norm": fmean(pairs.norm(t) for t in range(experts)),
        "relative norm": fmean(known) if known else None,
        "cosine": fmean(cosines) if cosines else None,
        "highest cosine": max(cosines, default=None),
        "sign conflicts": pairs.conflict_rate,
    }

"""Plans for people: what every parameter means, and bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fusewright.engine.jobs import Action
from fusewright.methods.pipeline import resolved

if TYPE_CHECKING:
    from fusewright.engine.planner import Plan


def parameter_table(plan: Plan) -> list[dict[str, str]]:
    """What every parameter means for these models, a row each."""
    rows = []
    layouts = [job.layout for job in plan.jobs.values() if job.action is Action.MERGE]
    for stage in plan.method.chain:
        values = [vars(resolved(stage, layout, plan.keys)) for layout in layouts[:10_000]]
        for name in type(stage).model_fields:
            seen = dict.fromkeys(json.dumps(v[name], default=str) for v in values)
            means = _meaning(list(seen), plan.keys)
            rows.append({"stage": stage.name, "parameter": name, "means": means})
    return rows


def _meaning(values: list[str], keys: tuple[str, ...]) -> str:
    if not values:
        return "nothing: no tensor is merged"
    if len(values) != 1:
        numbers = [json.loads(v) for v in values]
        if all(isinstance(n, int | float) for n in numbers):
            return f"{min(numbers):g} to {max(numbers):g}, by tensor"
        return f"{len(values)} values, by tensor"
    value = json.loads(values[0])
    if isinstance(value, list) and len(value) == len(keys):
        same = len({json.dumps(v) for v in value}) == 1
        return f"{value[0]}" if same else ", ".join(
            f"{k} {v}" for k, v in zip(keys, value, strict=True))  # fmt: skip
    return str(value)


def human(size: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1000
    raise AssertionError



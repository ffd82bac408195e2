"""How long a merge will take: one unit of each kind is rehearsed, nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusewright.engine import bandwidth
from fusewright.engine.inputs import Inputs
from fusewright.engine.jobs import Job
from fusewright.engine.planner import Plan
from fusewright.engine.schedule import Schedule
from fusewright.engine.work import Worker
from fusewright.methods.contract import Unit

PATIENCE = 1.0
"""Seconds after which no further kind is rehearsed: a plan should be there at once."""


class _Nowhere:
    """A sink that forgets."""

    def write(self, *_: Any) -> None: ...

    def commit(self, *_: Any) -> None: ...

    def finished(self, threads: int = 1) -> dict[str, Any]:
        return {}

    def note(self, *_: Any) -> None: ...

    def noted(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Estimate:
    """Seconds of reading and computing by all threads, and of writing where OUT is known; None
    where one unit is too large to be rehearsed at once."""

    working: float | None
    writing: float | None

    def to_json(self) -> dict[str, int]:
        """Whole seconds, of what is known."""
        found = {"seconds_of_work": self.working, "seconds_of_writing": self.writing}
        return {name: max(round(s), 1) for name, s in found.items() if s is not None}


def estimate(plan: Plan, inputs: Inputs, out: Path | None = None) -> Estimate:
    """What the plan's work should take on this machine, now; ``out`` decides where writing is
    tried (64 MB, removed again)."""
    written = plan.costs["bytes_written"]
    speed = bandwidth.write_speed(_existing(out), plan.options.durable) if out else None
    return Estimate(_working(plan, inputs), written / speed if speed else None)


def _working(plan: Plan, inputs: Inputs) -> float | None:
    kinds: dict[tuple[Any, ...], list[Job]] = {}
    for job in plan.jobs.values():
        kinds.setdefault((job.action, job.unit, job.kernel), []).append(job)
    began, total, known = time.perf_counter(), 0.0, 0
    for jobs in sorted(kinds.values(), key=_elements, reverse=True):
        largest = max(jobs, key=lambda job: job.spans[0][1] if job.spans else 0)
        if not largest.spans or _is_slow(largest):
            continue
        if time.perf_counter() - began < PATIENCE:
            seconds = _rehearsed(plan, inputs, largest) / largest.spans[0][1]
            total += seconds * _elements(jobs)
            known += _elements(jobs)
    everything = _elements(list(plan.jobs.values()))
    if known < everything / 2:
        return None
    return total * everything / known / plan.options.workers


def _elements(jobs: list[Job]) -> int:
    return sum(job.info.numel for job in jobs)


def _is_slow(job: Job) -> bool:
    """Whether a unit is a matrix so large that to decompose it takes longer than a plan may."""
    return job.unit is Unit.TENSOR and job.spans[0][1] > 2**20


def _rehearsed(plan: Plan, inputs: Inputs, job: Job) -> float:
    """Seconds of the first unit of a tensor by one thread, in every round, the second time: the
    first warms caches and loads kernels."""
    short = replace(job, spans=job.spans[:1], kept=False)
    one = replace(plan, jobs={job.info.name: short}, options=replace(plan.options, threads=1))
    for _ in range(2):
        began = time.perf_counter()
        with torch.inference_mode():
            Schedule(one, Worker(one, inputs, _Nowhere())).run()
    return time.perf_counter() - began


def _existing(out: Path) -> Path:
    """The nearest folder above OUT that exists."""
    return next(p for p in Path(out).absolute().parents if p.is_dir())

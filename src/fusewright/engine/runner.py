"""Carries out a plan: stage, pass over the inputs, publish."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fusewright import __version__
from fusewright.engine import bandwidth
from fusewright.engine.artefacts import add_artefacts
from fusewright.engine.inputs import Inputs
from fusewright.engine.origin import Origin
from fusewright.engine.planner import Plan
from fusewright.engine.progress import Listener, Meter
from fusewright.engine.schedule import Schedule
from fusewright.engine.work import Unit, Worker
from fusewright.weights.digest import block_digests
from fusewright.weights.journal import Record
from fusewright.weights.locate import MODEL_STEMS
from fusewright.weights.shards import plan_shards
from fusewright.weights.sink import MemorySink, Sink
from fusewright.weights.staging import Staging

MANIFEST_VERSION = 1


def run_to_memory(
    plan: Plan, inputs: Inputs, listener: Listener | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The merged tensors by name (aliases of tied tensors share storage), and the report."""
    sink = MemorySink(plan.outputs())
    report = _passes(plan, inputs, sink, listener, resumed=False)
    tensors = {}
    for name, (info, data) in sink.tensors().items():
        flat = torch.frombuffer(data, dtype=info.dtype.torch) if data else torch.empty(
            0, dtype=info.dtype.torch)  # fmt: skip
        tensors[name] = flat.reshape(info.shape)
    tensors |= {alias: tensors[name] for alias, name in inputs.alignment.aliases.items()}
    return tensors, report


def run_to_folder(
    plan: Plan,
    inputs: Inputs,
    out: Path,
    listener: Listener | None = None,
    started: float | None = None,
    fitted: Origin | None = None,
) -> dict[str, Any]:
    """Write the merged model to ``out``, complete or not at all; returns the report, whose seconds
    count from ``started`` (time.perf_counter(); by default now) to the rename. ``fitted`` is what
    the plan was made by."""
    started = time.perf_counter() if started is None else started
    stem = getattr(inputs.reference, "stem", MODEL_STEMS[0])
    shards = plan_shards(plan.outputs(), plan.options.shard_size, {"format": "pt"}, stem)
    with Staging.open(
        out, bound_digest(plan, inputs), shards, overwrite=plan.options.overwrite,
        inputs=inputs.paths(), durable=plan.options.durable,
    ) as staging:  # fmt: skip
        report = _passes(plan, inputs, staging, listener, staging.resumed)
        inputs.check_unchanged()
        report["notes"] += add_artefacts(staging, plan, inputs, fitted)
        staging.publish(manifest(plan, inputs, report, fitted))
    report["seconds"] = time.perf_counter() - started
    _compare_with_bandwidth(report, inputs, Path(out), plan.options.durable)
    return report


def bound_digest(plan: Plan, inputs: Inputs) -> str:
    """The plan's digest, bound to the bytes of models in memory too: no file's time vouches for
    them when a run resumes."""
    digest = sha256(plan.digest.encode())
    for weights in inputs.all().values():
        if weights.identities():
            continue
        for name, info in weights.items():
            raw = bytearray(info.nbytes)
            weights.read(name, 0, info.numel, memoryview(raw))
            digest.update(name.encode() + block_digests(memoryview(raw), info.dtype.itemsize))
    return digest.hexdigest()


def _passes(
    plan: Plan, inputs: Inputs, sink: Sink, listener: Listener | None, resumed: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    workers = plan.options.workers
    worker = Worker(plan, inputs, sink)
    finished = _finished(plan, sink, workers) if resumed else {}
    for task, record in finished.items():
        worker.read.add(task, record.extra["inputs"])
    total = plan.costs["bytes_written"] * plan.costs["passes"]
    schedule = Schedule(plan, worker, frozenset(finished), Meter(total, listener, resumed))
    with _one_thread_each():
        schedule.run()
    return {
        "seconds": time.perf_counter() - started,
        "bytes_read": worker.bytes_read,
        "bytes_written": worker.bytes_written,
        "resumed_tasks": len(finished),
        "tasks": sum(len(job.spans) for job in plan.jobs.values()),
        "threads": workers,
        "kernel": plan.kernel.name if plan.kernel else None,
        "disagreeing_buffers": sorted(worker.disagreements),
        "solved": _solved(schedule),
        "inputs": worker.read.summary(),
        "notes": list(plan.notes),
    }


def _finished(plan: Plan, sink: Sink, threads: int) -> dict[str, Record]:
    """What an earlier run finished, as far as it had cut its tensors as this plan does (another
    memory budget or number of threads cuts longer or shorter units)."""
    tasks = {Unit(j, *span).task for j in plan.jobs.values() for span in j.spans}
    return {task: record for task, record in sink.finished(threads).items() if task in tasks}


def _solved(schedule: Schedule) -> dict[str, Any]:
    """Statistics over the model, by stage and round (those of tensors stay in the journal)."""
    chain = schedule.plan.method.chain
    return {f"{chain[i].name}.{name}": v for (i, name), v in schedule.model_solved.items()}


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers are the parallelism; inside a unit torch uses one thread, whatever their number,
    so that results do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def manifest(
    plan: Plan, inputs: Inputs, report: Mapping[str, Any], fitted: Origin | None = None
) -> dict[str, Any]:
    """What fusewright.json says: enough to repeat the merge and to check the result."""
    return {
        **({} if fitted is None else {"fitted": fitted.to_json()}),
        "schema": MANIFEST_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "recipe": plan.recipe.plain(),
        "plan": plan.to_json(),
        "inputs": {
            label: {
                "label": weights.label,
                "files": [{"path": str(i.path), "bytes": i.size} for i in weights.identities()],
                **report["inputs"].get(label, {}),
            }
            for label, weights in inputs.all().items()
        },
        "report": {k: report[k] for k in ("solved", "disagreeing_buffers", "notes")},
    }


def _versions() -> dict[str, str]:
    found = {"fusewright": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "machine": f"{platform.system()} {platform.machine()}"}


def _compare_with_bandwidth(
    report: dict[str, Any], inputs: Inputs, out: Path, durable: bool
) -> None:
    """Add what share of plain reading and writing speed the run reached, where it moved enough
    bytes for the question to mean something."""
    if report["bytes_read"] + report["bytes_written"] < 2 * bandwidth.PROBE:
        return
    files = [i.path for w in inputs.all().values() for i in w.identities()]
    read, write = bandwidth.read_speed(files), bandwidth.write_speed(out.parent, durable)
    if read and write:
        floor = report["bytes_read"] / read / report["threads"] + report["bytes_written"] / write
        report["bandwidth"] = {"read": read, "write": write,
                               "share": min(floor / report["seconds"], 1.0)}  # fmt: skip

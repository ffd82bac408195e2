"""Content digests of what a run read of each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusewright.engine.inputs import Inputs
from fusewright.engine.planner import Plan
from fusewright.weights import Weights
from fusewright.weights.digest import (
    BLOCK,
    READ,
    block_digests,
    content_digest,
    tensor_digest,
)


class ReadDigests:
    """Digests over tensors' names, dtypes, shapes and bytes, whatever the files they lie in.

    Leaves are kept only until their tensor is complete: those of a whole large model, for every
    expert, would be a good part of the memory budget.
    """

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self._plan, self._inputs = plan, inputs
        self._open: dict[str, dict[int, Mapping[str, str]]] = {}
        self._models: dict[str, dict[str, str]] = {}

    def add(self, task: str, leaves: Mapping[str, str]) -> None:
        """A finished unit's leaves (hex) by model; to be called by one thread at a time."""
        name, start, _ = task.rsplit(":", 2)
        parts = self._open.setdefault(name, {})
        parts[int(start)] = leaves
        if len(parts) == len(self._plan.jobs[name].spans):
            for label in self._open.pop(name)[int(start)]:
                self._close(name, label, parts)

    def _close(self, name: str, label: str, parts: Mapping[int, Mapping[str, str]]) -> None:
        info = self._inputs.info(_key(label), name)
        if info is not None:
            joined = b"".join(bytes.fromhex(parts[start][label]) for start in sorted(parts))
            self._models.setdefault(label, {})[name] = tensor_digest(joined, info)

    def summary(self) -> dict[str, Any]:
        """For each model: what it is called, how many tensors were read, and their digest."""
        return {
            label: {"label": self._inputs.weights(_key(label)).label, "tensors": len(digests),
                    "content": content_digest(digests)}
            for label, digests in sorted(self._models.items())
        }  # fmt: skip


def content_of(weights: Weights) -> dict[str, Any]:
    """What :meth:`ReadDigests.summary` says of a model that is read as a whole, for this alone."""
    digests = {name: _digest(weights, name) for name in weights}
    return {"label": weights.label, "tensors": len(digests), "content": content_digest(digests)}


def _digest(weights: Weights, name: str) -> str:
    info, leaves = weights[name], []
    for start in range(0, info.numel, READ * BLOCK):
        stop = min(start + READ * BLOCK, info.numel)
        part = memoryview(bytearray((stop - start) * info.dtype.itemsize))
        weights.read(name, start, stop, part)
        leaves.append(block_digests(part, info.dtype.itemsize))
    return tensor_digest(b"".join(leaves), info)


def _key(label: str) -> str | None:
    return None if label == "base" else label.removeprefix("expert ")

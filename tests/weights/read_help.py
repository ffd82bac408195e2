"""What the readers' tests share: reading a tensor whole, or a range of it."""

from __future__ import annotations

import re

import torch

from fusewright.weights import Weights


def fetch(weights: Weights, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Elements [start, stop) as a 1-d tensor of the storage dtype."""
    info = weights[name]
    stop = info.numel if stop is None else stop
    out = bytearray((stop - start) * info.dtype.itemsize)
    weights.read(name, start, stop, memoryview(out))
    if not out:
        return torch.empty(0, dtype=info.dtype.torch)
    return torch.frombuffer(out, dtype=torch.uint8).view(info.dtype.torch)


def whole(weights: Weights, name: str) -> torch.Tensor:
    return fetch(weights, name).view(weights[name].shape)


def said(error: BaseException) -> str:
    """An error's text without the temporary folder, whose name repeats the test's."""
    return re.sub(r"[^\s']*/pytest-\d+/[^/\s':]+", "TMP", str(error))

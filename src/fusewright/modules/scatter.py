"""Sparse changes added to rows of a base by a compiled loop, where Numba is installed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from os import getpid
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where each row of each expert begins: ``starts`` (experts, outputs + 1) int64, the number of
    its first value, and ``columns`` (experts, outputs) int64, where that value lies in the row."""

    starts: Tensor
    columns: Tensor


def compiled(*tensors: Tensor) -> bool:
    """Whether there is a loop for them: on the CPU, in float32, and with Numba."""
    alike = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return alike and installed()


@cache
def installed() -> bool:
    """Whether Numba is there; looked for once."""
    return find_spec("numba") is not None


def add_rows(
    out: Tensor, base: Tensor, weights: Tensor, values: Tensor, gaps: Tensor, rows: Rows,
    start: int,
) -> None:  # fmt: skip
    """out_b = W_0 + Σ_t w_bt Δ_t, rows from ``start`` on: ``out`` (samples, rows, inputs) of
    ``base`` (rows, inputs), ``weights`` (samples, experts), all contiguous, and Δ as
    :class:`.SparseStack` has it. Sums are in the order of the experts, on as many threads as torch
    has."""
    from fusewright.modules._scatter import add_rows as loop

    count, threads = out.shape[1], torch.get_num_threads()
    held = [t.detach().numpy() for t in (out, base, weights, values, gaps, *rows)]
    cuts = [count * i // threads for i in range(threads + 1)]
    spans = [(a, b) for a, b in pairwise(cuts) if a < b]
    if len(spans) == 1:
        loop(*held, start, 0, count)
    else:
        list(_pool(threads, getpid()).map(lambda span: loop(*held, start, *span), spans))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A process's own: threads do not outlive a fork."""
    return ThreadPoolExecutor(threads, "fusewright-scatter")

"""How to run: everything that does not change what a merge means."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from fusewright.errors import RecipeError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SMALLEST_MEMORY = 32 * 2**20


def parse_size(text: str | int) -> int:
    """Bytes of "1GiB" (2**30), "5GB" (5·10**9), "64M" (10**6), or a plain number."""
    found = _SIZE.fullmatch(str(text))
    if not found:
        raise RecipeError(
            "a size is not understood", found=repr(text), expected="a number and KB, MB, GB, MiB …"
        )
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


@dataclass(frozen=True)
class Options:
    """Engine options. ``memory`` bounds the engine's own tensors, beyond the interpreter with
    torch (1 GiB: small beside any model that needs streaming, large enough for one matrix of most).
    ``device`` computes merges, and runs the models that a method learns with; what comes out is on
    the CPU. ``threads`` None means all cores that this process may use."""

    threads: int | None = None
    memory: int = 2**30
    device: str = "cpu"
    overwrite: bool = False
    shard_size: int = 5 * 10**9
    untie: bool = False
    allow_nonfinite: bool = False
    allow_overflow: bool = False
    copy_code: bool = False
    durable: bool = True
    kernels: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise RecipeError("threads must be at least 1", found=self.threads)
        if self.memory < SMALLEST_MEMORY:
            raise RecipeError(
                "the memory budget is too small", expected="at least 32MiB", found=self.memory
            )
        if self.shard_size < 1:
            raise RecipeError("the shard size must be positive", found=self.shard_size)

    @property
    def workers(self) -> int:
        if self.threads:
            return self.threads
        usable = getattr(os, "sched_getaffinity", None)
        return len(usable(0)) if usable else os.cpu_count() or 1

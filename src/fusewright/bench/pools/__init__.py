"""Builders of pools: a base, its experts and their frozen heads, trained on the user's machine.

A suite that names no public checkpoints names a builder (``build: {builder: vision}``) and its
recipe. What is built are ordinary model folders; each part appears complete or not at all, so that
a build that was killed goes on where it was.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.errors import nearest

if TYPE_CHECKING:
    from fusewright.bench.suite_file import SuiteSpec

BUILDERS = {
    "vision": ("fusewright.bench.pools.vision", "build_vision"),
    "text": ("fusewright.bench.pools.text", "build_text"),
    "language": ("fusewright.bench.pools.language", "build_language"),
}
"""Where each builder lives: called with (spec, out, data, seed, progress, device)."""


def build(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Build the pool of one seed into the folder ``out``; what it has already is kept.

    ``data`` is the folder of data sets (FUSEWRIGHT_DATA, else the Hub); ``device`` is where models
    are trained.
    Raises SuiteError for a builder or recipe that is not known, OutputError if ``out`` holds
    another recipe's models or is being built, DataError if data are missing.
    """
    from fusewright.bench.suite_file import SuiteError

    name = spec.build.builder if spec.build is not None else None
    if name not in BUILDERS:
        close = nearest(str(name), list(BUILDERS))
        raise SuiteError("there is no such builder of pools", where="build.builder", found=name,
                         expected=", ".join(BUILDERS),
                         fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    module, function = BUILDERS[name]
    builder: Any = getattr(import_module(module), function)
    builder(spec, Path(out), data, seed, progress, device)

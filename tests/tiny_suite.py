"""A suite whose models train in a second: the digits', narrow and hardly trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fusewright.bench.suite import Suite, suite
from fusewright.bench.suite_file import find_suite

PARAMETERS = {"width": 16, "layers": 1, "batch": 16, "base_steps": 20, "expert_steps": 8,
              "multitask_steps": 4}  # fmt: skip
TASKS = ("digit", "parity", "inverted")


def write_suite(folder: Path, **changes: Any) -> Path:
    """A suite of two merged tasks and an unseen one; ``changes`` replace whole keys."""
    fields = yaml.safe_load(find_suite("digits").read_text("utf-8"))
    fields["tasks"] = {name: fields["tasks"][name] for name in TASKS}
    fields["experts"] = {name: name for name in TASKS[:2]}
    fields["build"] = {"builder": "digits", "parameters": PARAMETERS}
    fields["seeds"] = [0, 1]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False), "utf-8")
    return path


def built(folder: Path, **changes: Any) -> Suite:
    found = suite(write_suite(folder, **changes), pool=folder / "pool")
    found.build(progress=False)
    return found

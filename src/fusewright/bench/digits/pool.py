"""The digits' pool: trained in seconds, kept under what it depends on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fusewright.bench.digits import store
from fusewright.bench.digits.train import Training
from fusewright.bench.progress import Stages

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite


def build_digits(suite: Suite, progress: bool) -> None:
    """Train the base, heads, experts and joint training of one seed; ``seed-N`` then points to
    them. What an older release of fusewright or torch had trained stays beside it, unused."""
    assert suite.spec.build is not None
    training = Training(**suite.spec.build.parameters)
    missing = not store.is_trained(suite.pool, training, suite.seed)
    title = f"seed {suite.seed}"
    with Stages(progress).stage(title, missing * len(store.names())) as step:
        found = store.trained(suite.pool, training, suite.seed, step)
    target = os.path.relpath(found.root, suite.pool)
    if suite.root.is_symlink() and os.readlink(suite.root) == target:
        return
    beside = suite.root.with_name(f"{suite.root.name}.link-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(suite.root)

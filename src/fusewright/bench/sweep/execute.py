"""Groups on one process or several; each cell is on disk before the next begins."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING

from fusewright.bench.sweep.cells import Asked, Group, Pool
from fusewright.bench.sweep.store import Store
from fusewright.bench.sweep.worker import Worker
from fusewright.errors import FusewrightError

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite

MADE = ("merge", "tuned", "transductive", "joint")
"""What may fail while the rest of a sweep goes on."""

Failed = dict[str, str]
"""What went wrong, by row."""


def execute(
    store: Store, suites: Sequence[Suite], work: Sequence[Group], asked: Asked, jobs: int,
    step: Callable[[str], None],
) -> Failed:  # fmt: skip
    """Make the cells of all groups; what a method refuses is told, and the others go on.

    Raises FusewrightError if a worker process dies: its finished cells are kept; and before it
    begins, for a method that other processes cannot import.
    """
    if jobs <= 1 or len(work) <= 1:
        hands = _Hands(store, suites, asked, None)
        failed: Failed = {}
        for group in work:
            failed |= hands.make(group, step)
        return failed
    return _in_processes(store, suites, work, asked, jobs, step)


class _Hands:
    """The workers of one process, by training of the pool."""

    def __init__(
        self, store: Store, suites: Sequence[Suite], asked: Asked, threads: int | None
    ) -> None:
        self._suites = {(s.seed, s.variant): s for s in suites}
        self._store, self._asked, self._threads = store, asked, threads
        self._worker: Worker | None = None

    def make(self, group: Group, step: Callable[[str], None] = lambda row: None) -> Failed:
        pool: Pool = group[0].pool
        suite = self._suites[pool.seed, pool.variant]
        if self._worker is None or self._worker.suite is not suite:
            self._worker = Worker(suite, self._store, self._asked, self._threads)
        try:
            self._worker.make(group, step)
        except FusewrightError as error:
            if group[0].how not in MADE:  # a reference: nothing can be compared
                raise
            # Jobs are made in order: the first that is not there is the one that failed.
            failed = next(job for job in group if not self._store.is_finished(job.key))
            return {failed.row: str(error)}
        return {}


_hands: _Hands | None = None


def _begin(store: Store, suites: Sequence[Suite], asked: Asked, threads: int) -> None:
    global _hands
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    inputs = suites[0]._inputs
    for suite in suites:
        suite._inputs = inputs
    _hands = _Hands(store, suites, asked, threads)


def _end_with_parent() -> None:
    """A sweep that was killed must not leave workers that go on measuring."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(group: Group) -> Failed:
    assert _hands is not None
    return _hands.make(group)


def _check_importable(work: Sequence[Group]) -> None:
    """Workers import the methods' modules, and there is none of what was typed into a notebook."""
    if os.path.isfile(getattr(sys.modules["__main__"], "__file__", "")):
        return
    methods = [job.what for group in work for job in group]
    stages = [stage for method in methods for stage in getattr(method, "chain", (method,))]
    typed = {type(stage).__name__ for stage in stages if type(stage).__module__ == "__main__"}
    if typed:
        raise FusewrightError(
            "a method that was defined in a notebook is not known to other processes",
            where=", ".join(sorted(typed)), expected="a method that can be imported",
            found="the module __main__, which has no file",
            fix="jobs=1, or define the method in a file and import it",
        )  # fmt: skip


def _in_processes(
    store: Store, suites: Sequence[Suite], work: Sequence[Group], asked: Asked, jobs: int,
    step: Callable[[str], None],
) -> Failed:  # fmt: skip
    _check_importable(work)
    failed: Failed = {}
    threads = max((os.cpu_count() or 1) // jobs, 1)
    given = store, list(suites), asked, threads
    # Not fork: torch's threads do not survive it.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, given) as executor:
        waiting = {executor.submit(_make, group): group for group in work}
        try:
            for future in as_completed(waiting):
                failed |= future.result()
                for job in waiting[future]:
                    step(job.row)
        except BrokenProcessPool as error:
            raise FusewrightError(
                "a worker of the sweep was killed", where=store.folder,
                expected="enough memory for each of the workers", found=error,
                fix="run the same command again (finished cells are kept), with fewer --jobs",
            ) from error
        except BaseException:  # a refusal or an interruption: what nobody began is not begun
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return failed

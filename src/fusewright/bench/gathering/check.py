"""Whether a data folder holds exactly the rows that a manifest publishes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusewright.bench.gathering.manifest import (
    SPLITS,
    DataSet,
    RowList,
    manifest_files,
    manifest_of,
)
from fusewright.bench.progress import Stages
from fusewright.bench.suite_file import SuiteSpec
from fusewright.errors import FusewrightError
from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import ParquetSplit

SAME = "the published rows"


@dataclass(frozen=True)
class Gathered:
    """What became of one data set: ``found`` of its ``rows`` are there, after ``read`` pictures
    were looked at (none: they were there before), or the ``problem``."""

    name: str
    rows: int
    found: int
    read: int = 0
    problem: FusewrightError | None = None

    @property
    def said(self) -> str:
        """In a few words."""
        if self.problem is not None:
            return self.problem.problem
        return "gathered" if self.read else SAME


def check(spec: SuiteSpec, data: Path, progress: bool = False) -> list[Gathered]:
    """Whether a data folder holds exactly the published rows of a suite, for every data set.

    Raises SuiteError if no rows are published.
    """
    wanted, found = manifest_of(spec), []
    with Stages(progress).stage("check", len(wanted)) as step:
        for one in wanted.values():
            found.append(compared(one, data))
            step(one.name)
    return found


def matches(spec: SuiteSpec, data: Path | None) -> str | None:
    """For reports: whether a data folder holds the published rows, in a few words; None where no
    rows are published or the data come from the Hub."""
    if spec.rows is None or data is None:
        return None
    other = [one.name for one in check(spec, data) if one.problem is not None]
    return f"not {SAME}: {', '.join(other)}" if other else SAME


def compared_files(spec: SuiteSpec, data: Path | None) -> list[Path]:
    """What the answer of :func:`matches` depends on; none where that is None. Some may not be
    there."""
    if spec.rows is None or data is None:
        return []
    names = sorted({task.data for task in spec.tasks.values() if task.data})
    parts = [_file(data, name, split) for name in names for split in SPLITS]
    return [*manifest_files(spec.rows), *parts]


def compared(one: DataSet, data: Path) -> Gathered:
    """Whether a data set's folder holds its rows, all of them and in order."""
    same, problem = 0, None
    for split in SPLITS:
        try:
            same += _checked(one, split, _file(data, one.name, split))
        except FusewrightError as error:
            problem = problem or error
    return Gathered(one.name, len(one), same, problem=problem)


def _file(data: Path, name: str, split: str) -> Path:
    return data / name / f"{split}.parquet"


def _checked(one: DataSet, split: str, path: Path) -> int:
    wanted, there = one.splits[split], RowList.of(ParquetSplit(path))
    both = min(len(wanted), len(there))
    pictures = wanted.hashes[:both] == there.hashes[:both]
    labels = wanted.labels[:both] == there.labels[:both]
    if both == len(wanted) == len(there) and np.all(pictures & labels):
        return both
    raise DataError(
        f"these are not {SAME}", where=path, expected=f"{len(wanted)} rows, in order",
        found=f"{len(there)} rows; {np.count_nonzero(~pictures)} of the first {both} are other "
              f"pictures, {np.count_nonzero(pictures & ~labels)} have another label",
        fix="fusewright suite gather SUITE -o OTHER",
    )  # fmt: skip

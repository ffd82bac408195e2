"""A suite's data folder from public copies: the published rows, in their order, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from fusewright.bench.gathering.check import Gathered, compared
from fusewright.bench.gathering.manifest import DataSet, manifest_of
from fusewright.bench.gathering.picks import Picks
from fusewright.bench.gathering.pictures import Labelled, Reader
from fusewright.bench.gathering.writing import write
from fusewright.bench.progress import Stages
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.errors import FusewrightError
from fusewright.tasks.data import DataSource, open_split
from fusewright.tasks.errors import DataError

Place = Path | str
"""A folder or file, or the id of a data set on the Hub."""


def gather(
    spec: SuiteSpec, sources: Sequence[str], out: Path, progress: bool = False
) -> list[Gathered]:
    """Write OUT/NAME/{train,test}.parquet for every data set of a suite.

    ``sources`` are folders that hold one for each data set, by its name ("mnist" or
    "vision/mnist"), or say which: "mnist=FOLDER", "mnist=org/name@revision" of the Hub. A data set
    in none of them is fetched from the Hub, where the manifest names one. What is there already is
    kept. A data set that is refused leaves nothing behind, and the others go on.

    Raises SuiteError if no rows are published or a source is not understood.
    """
    wanted = manifest_of(spec)
    given = [_given(source, wanted) for source in sources]
    return [_gathered(one, _places(one, given), out, progress) for one in wanted.values()]


def _gathered(one: DataSet, places: Sequence[Place], out: Path, progress: bool) -> Gathered:
    folder = out / one.name
    if folder.exists():
        there = compared(one, out)
        if there.problem is None:
            return there
        why = _in_the_way(folder, there.problem)
        return Gathered(one.name, len(one), there.found, problem=why)
    picks, reader = Picks(one), Reader(one.classes)
    try:
        _pick(picks, chain.from_iterable(_labelled(one, reader, p) for p in places), progress)
        picks.refuse_gaps(places, reader)
        write(one, picks.pictures, folder)
    except FusewrightError as error:
        return Gathered(one.name, len(one), picks.found, picks.read, error)
    return Gathered(one.name, len(one), len(one), picks.read)


def _pick(picks: Picks, found: Iterator[Labelled], progress: bool) -> None:
    """Pictures are looked at until no row is missing."""
    with Stages(progress).stage(picks.one.short, len(picks.missing)) as step:
        while picks.missing and (labelled := next(found, None)) is not None:
            if picks.look_at(*labelled):
                step(f"of {picks.read} pictures")


def _labelled(one: DataSet, reader: Reader, place: Place) -> Iterator[Labelled]:
    if isinstance(place, Path):
        yield from reader.folder(place)
        return
    for split in one.origin.hub_splits:
        try:
            whole = open_split(DataSource(hub=place), split)
        except DataError as error:
            raise DataError(error.problem, where=error.where, found=error.found,
                            fix=one.fix) from error  # fmt: skip
        yield from reader.split(whole)


def _given(source: str, wanted: Mapping[str, DataSet]) -> tuple[str, Place]:
    """The data set that a source is of ("" for a folder of several), and where it is."""
    name, equals, where = source.partition("=")
    if not equals or Path(source).exists():
        name, where = "", source
    elif not any(name in (one.name, one.short) for one in wanted.values()):
        raise SuiteError("a source is of no data set of the suite", found=source,
                         expected=", ".join(one.short for one in wanted.values()))  # fmt: skip
    if Path(where).exists():
        return name, Path(where)
    if name and where.count("/") == 1:
        return name, where
    raise SuiteError("a source is not there", where=where,
                     expected="FOLDER, NAME=FOLDER, or NAME=org/name of the Hub")  # fmt: skip


def _places(one: DataSet, given: Sequence[tuple[str, Place]]) -> list[Place]:
    """Where to look for a data set; its place on the Hub if nobody says another."""
    found: list[Place] = []
    for name, where in given:
        if name in (one.name, one.short):
            found.append(where)
        elif not name and isinstance(where, Path):
            inside = (where / one.name, where / one.short)
            found += [path for path in inside if path.exists()][:1]
    hub = one.origin.hub
    return found or ([hub] if hub is not None else [])


def _in_the_way(folder: Path, why: FusewrightError) -> DataError:
    return DataError(
        "other data are in the way", where=folder, expected="the published rows, or no folder",
        found=why.found, fix=f"choose another -o, or remove '{folder}'",
    )  # fmt: skip

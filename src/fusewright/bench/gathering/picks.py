"""The published rows of a data set, as they are found among pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusewright.bench.gathering.manifest import DataSet, fingerprint
from fusewright.bench.gathering.pictures import Reader, prepared
from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Picks:
    """``pictures`` that were found, by hash; ``read`` counts all that were looked at.

    Copies of a picture may have several labels: one of them has to be the published one.
    """

    def __init__(self, one: DataSet) -> None:
        self.one, self.read = one, 0
        self.pictures: dict[int, Image] = {}
        self.missing = set(_rows(one))
        self._wanted = {hashed for hashed, _ in self.missing}
        self._other: dict[int, int] = {}

    def look_at(self, picture: Image, label: int) -> bool:
        """Keep a picture if it is one of the rows; whether it was missing so far."""
        self.read += 1
        picture = prepared(picture, self.one.origin.prepare)
        row = fingerprint(picture), label
        if row in self.missing:
            self.missing.remove(row)
            self.pictures[row[0]] = picture
            return True
        if row[0] in self._wanted and row[0] not in self.pictures:
            self._other[row[0]] = label
        return False

    @property
    def found(self) -> int:
        """How many rows have their picture and its label."""
        return sum(row not in self.missing for row in _rows(self.one))

    def refuse_gaps(self, places: Sequence[Path | str], reader: Reader) -> None:
        """Raises DataError if a row is missing, or its picture has other labels in every copy."""
        if not self.missing:
            return
        passed = ((reader.odd, "files cannot be decoded"), (reader.unnamed, "are in no class"))
        about = [f"{self.read} pictures in {', '.join(map(str, places)) or 'no source'}",
                 *self._relabelled(), *(f"{n} {what}" for n, what in passed if n)]  # fmt: skip
        source = self.one.origin.source
        raise DataError(
            f"{len(self.one) - self.found} of {len(self.one)} rows were not found",
            where=self.one.name, found="; ".join(about),
            expected="; ".join(f"{', '.join(files)} of {url}" for url, files in source.items()),
            fix=self.one.fix,
        )  # fmt: skip

    def _relabelled(self) -> list[str]:
        rows = sorted((label, hashed) for hashed, label in self.missing if hashed in self._other)
        if not rows:
            return []
        label, hashed = rows[0]
        here, there = self._class(self._other[hashed]), self._class(label)
        return [f"{len(rows)} of them have another label, such as {here} instead of {there}"]

    def _class(self, label: int) -> str:
        known = 0 <= label < len(self.one.classes)
        return repr(self.one.classes[label]) if known else f"class {label}"


def _rows(one: DataSet) -> list[tuple[int, int]]:
    return [row for split in one.splits.values()
            for row in zip(split.hashes.tolist(), split.labels.tolist(), strict=True)]  # fmt: skip

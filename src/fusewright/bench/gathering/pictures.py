"""Labelled pictures of public data sets, in the forms in which they are found."""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusewright.bench.gathering.manifest import Preparation, pictures_of
from fusewright.extras import needs
from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import ParquetSplit, decoded
from fusewright.tasks.rows import DataSplit

if TYPE_CHECKING:
    from PIL.Image import Image

Labelled = tuple["Image", int]
DRAWING = 28
"""Edge of pictures in files of bare bytes (Quick, Draw!)."""
IMAGES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp")


@dataclass
class Reader:
    """Reads labelled pictures, and counts what it passes over: files that cannot be decoded
    (``odd``), and those that no folder or name puts into a class (``unnamed``)."""

    classes: Sequence[str]
    odd: int = 0
    unnamed: int = 0
    _numbers: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = {name.casefold(): number for number, name in enumerate(self.classes)}

    def folder(self, root: Path) -> Iterator[Labelled]:
        """All pictures below a folder, or of a file: parquet files (``image``, ``label``), idx
        files of images with those of their labels beside them, arrays (.npy, .bin) named as their
        class, images in folders named by class or class number, and zip files of these.

        Raises DataError if a parquet or idx file is damaged or has no labels.
        """
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            inside = PurePosixPath(path.relative_to(root) if path != root else path.name)
            yield from self._file(path, inside)

    def split(self, split: DataSplit) -> Iterator[Labelled]:
        """All pictures of a split. Labels follow the names of classes where they are the same."""
        theirs = [self._numbers.get(name.casefold()) for name in split.classes or ()]
        same = len(theirs) == len(self.classes) and None not in theirs
        for label, picture in zip(split.labels().tolist(), pictures_of(split), strict=True):
            known = theirs[label] if same and 0 <= label < len(theirs) else None
            yield picture, label if known is None else known

    def _file(self, path: Path, inside: PurePosixPath) -> Iterable[Labelled]:
        kind, name = path.suffix.lower(), path.name.lower()
        if not path.is_file():
            return ()
        if kind == ".parquet":
            return self.split(ParquetSplit(path))
        if "idx3" in name:
            return _idx(path)
        if kind in (".npy", ".bin"):
            return self._drawings(path)
        if kind == ".zip":
            return self._zip(path, inside)
        if kind in IMAGES:
            return self._image(path.read_bytes, inside)
        return ()

    def _zip(self, path: Path, inside: PurePosixPath) -> Iterator[Labelled]:
        try:
            with zipfile.ZipFile(path) as packed:
                for name in sorted(packed.namelist()):
                    if PurePosixPath(name).suffix.lower() in IMAGES:
                        yield from self._image(partial(packed.read, name), inside.parent / name)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError("a zip file cannot be read", where=path, found=error) from error

    def _image(self, read: Callable[[], bytes], inside: PurePosixPath) -> Iterator[Labelled]:
        label = self._label(inside.parts[:-1])
        if label is None:
            self.unnamed += 1
            return
        try:
            yield decoded(repaired(read()), str(inside)), label
        except DataError:
            self.odd += 1

    def _drawings(self, path: Path) -> Iterator[Labelled]:
        name = path.stem.casefold().rstrip("0123456789")  # trains1000
        label = self._numbers.get(name, self._numbers.get(name.removesuffix("s")))
        values = _bytes(path)
        if label is None or values is None:
            self.unnamed += 1
            return
        image = needs("PIL.Image", "tasks")
        for row in values.reshape(-1, DRAWING, DRAWING):
            yield image.fromarray(row), label

    def _label(self, folders: Sequence[str]) -> int | None:
        """The class of the nearest folder that names one, by its name or number."""
        for folder in reversed(folders):
            number = self._numbers.get(folder.casefold())
            if number is None and folder.isdecimal() and int(folder) < len(self.classes):
                number = int(folder)
            if number is not None:
                return number
        return None


def _bytes(path: Path) -> NDArray[np.uint8] | None:
    """Drawings of a file, one after the other; None if it holds something else."""
    try:
        values = np.load(path) if path.suffix == ".npy" else np.fromfile(path, np.uint8)
    except (OSError, ValueError):
        return None
    fits = values.dtype == np.uint8 and values.size and values.size % DRAWING**2 == 0
    return values if fits else None


def _idx(path: Path) -> Iterator[Labelled]:
    """Grey pictures of an idx file (LeCun's), with the labels of the file beside it."""
    image = needs("PIL.Image", "tasks")
    name = path.name.replace("idx3", "idx1").replace("images", "labels").removesuffix(".gz")
    beside = path.with_name("y" + name[1:] if name.startswith("X_") else name)
    packed = beside.with_name(beside.name + ".gz")
    values, labels = _array(path, 3), _array(packed if packed.exists() else beside, 1)
    if len(values) != len(labels):
        raise DataError("pictures and labels are not of one number", where=path,
                        expected=f"{len(values)} labels", found=len(labels))  # fmt: skip
    for picture, label in zip(values, labels, strict=True):
        yield image.fromarray(picture), int(label)


def _array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it begins with {raw[:4].hex()}")
        shape = np.frombuffer(raw, ">u4", dimensions, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise DataError("an idx file cannot be read", where=path, found=error,
                        expected=f"uint8 values in {dimensions} dimensions") from error  # fmt: skip


_PPM = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")


def repaired(data: bytes) -> bytes:
    """A PPM file whose line feeds became CR LF on the way, as it was: of exactly the length that
    its header says. Anything else is left alone."""
    mended = data.replace(b"\r\n", b"\n")
    header = _PPM.match(mended)
    if header is None:
        return data
    whole = header.end() + 3 * int(header[1]) * int(header[2])
    return mended if len(mended) == whole else data


def prepared(picture: Image, how: Preparation | None) -> Image:
    """A picture as the rows have it: grey (L) if its channels are equal, RGB else; resized and
    inverted as ``how`` says unless it has that size already."""
    picture = picture.convert("L" if picture.mode in ("1", "L", "I;16", "LA") else "RGB")
    if how is not None and picture.size != (how.size, how.size):
        filters: Any = needs("PIL.Image", "tasks").Resampling
        picture = picture.resize((how.size, how.size), getattr(filters, how.resample.upper()))
        picture = needs("PIL.ImageOps", "tasks").invert(picture) if how.invert else picture
    if picture.mode == "RGB":
        red, green, blue = picture.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            return red
    return picture

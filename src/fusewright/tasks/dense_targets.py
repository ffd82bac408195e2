"""Ground truth of every pixel, from pictures or arrays: class ids, depths, normals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import decoded

Array = NDArray[Any]


def class_map(value: Any, classes: int, ignored: int, where: str) -> NDArray[np.int32]:
    """Class ids (h, w) from a picture of them (grey, palette) or an array.

    Raises DataError for other shapes, for values that are no whole numbers, and for ids that are
    neither below ``classes`` nor ``ignored``.
    """
    found = _array(value, where)
    if found.ndim != 2 or found.dtype.kind not in "iub":
        raise DataError(
            "the target is no map of classes", where=where, expected="(h, w) of whole numbers",
            found=f"{found.shape} of {found.dtype}",
        )  # fmt: skip
    ids = found.astype(np.int32)
    odd = ids[(ids != ignored) & ((ids < 0) | (ids >= classes))]
    if odd.size:
        raise DataError(
            "a pixel is of no known class", where=where,
            expected=f"0 to {classes - 1}, or {ignored} (ignored)", found=int(odd[0]),
            fix="options: {ignored: N}, or the right number of classes",
        )  # fmt: skip
    return ids


def depth_map(value: Any, scale: float, where: str) -> NDArray[np.float32]:
    """Depths (h, w), stored values times ``scale``; 0 where there is none (stored as 0, negative
    or not finite). Raises DataError for other shapes."""
    found = _array(value, where)
    if found.ndim == 3 and 1 in (found.shape[0], found.shape[-1]):
        found = found[0] if found.shape[0] == 1 else found[..., 0]
    if found.ndim != 2:
        raise DataError(
            "the target is no map of depths", where=where, expected="(h, w)", found=found.shape
        )
    known = np.isfinite(found) & (found > 0)
    return np.where(known, found * scale, 0).astype(np.float32)


def normal_map(value: Any, where: str) -> NDArray[np.float32]:
    """Normals (3, h, w), the zero vector where there is none.

    Arrays are (3, h, w) or (h, w, 3). In a picture of 8 bits v stands for v / 127.5 - 1; black
    pixels and those of medium grey (all channels 127, or all 128) have no normal.
    Raises DataError for other shapes.
    """
    found = _array(value, where)
    if found.ndim != 3 or 3 not in (found.shape[0], found.shape[-1]):
        raise DataError(
            "the target is no map of normals", where=where, expected="(3, h, w) or (h, w, 3)",
            found=found.shape,
        )  # fmt: skip
    found = found if found.shape[0] == 3 else np.moveaxis(found, -1, 0)
    known = np.isfinite(found).all(axis=0)
    if found.dtype == np.uint8:
        known &= ~np.isin(found, (0, 127, 128)).all(axis=0) | (np.ptp(found, axis=0) > 1)
        found = found / 127.5 - 1
    return np.where(known, found, 0).astype(np.float32)


def _array(value: Any, where: str) -> Array:
    if isinstance(value, Mapping):
        value = value.get("bytes")
    picture = decoded(value, where) if isinstance(value, bytes) else value
    try:
        found = np.asarray(picture)
    except ValueError as error:
        raise _no_map(where, "rows of different lengths") from error
    if found.dtype.kind not in "biuf":
        raise _no_map(where, type(value).__name__)
    return found


def _no_map(where: str, found: object) -> DataError:
    return DataError(
        "the target is neither a picture nor an array", where=where,
        expected="a PNG or TIFF file's bytes, or nested lists of numbers", found=found,
    )  # fmt: skip

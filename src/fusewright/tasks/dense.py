"""Metrics of dense prediction on NYUv2: segmentation, depth, surface normals.

Pure functions of one batch of predictions; pixels without ground truth do not count. What several
batches give is put together from sums (segmentation) or from values of pixels (normals' median).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -1
"""The label of pixels whose class is unknown, in NYUv2."""

ANGLES = (11.25, 22.5, 30.0)
"""Degrees; the share of pixels within each is customary."""


def confusion(predicted: Tensor, labels: Tensor, classes: int, ignored: int = IGNORED) -> Tensor:
    """Pixels by (true class, predicted class): (classes, classes) int64.

    ``predicted`` and ``labels`` are class numbers of the same shape (items, h, w). Matrices of
    batches add.

    Raises DataError for shapes that differ, or a class outside the known ones.
    """
    import torch

    _same(predicted, labels)
    real = labels != ignored
    true, said = labels[real].long(), predicted[real].long()
    seen = torch.cat([true, said])
    if len(seen) and not 0 <= seen.min() <= seen.max() < classes:
        raise DataError(
            "a pixel is of no known class", expected=f"0 to {classes - 1}, or {ignored} (unknown)",
            found=f"{int(seen.min())} to {int(seen.max())}",
        )  # fmt: skip
    return (true * classes + said).bincount(minlength=classes * classes).view(classes, classes)


def segmentation(confused: Tensor) -> dict[str, float]:
    """"mean_iou" and "pixel_accuracy" in [0, 1] from a confusion matrix (of the whole split).

    IoU of a class = hits / (true + predicted - hits), averaged over classes that occur in truth or
    prediction.

    Raises DataError if no pixel counts.
    """
    counts = confused.double()
    _some(counts.sum())
    return {
        "mean_iou": float(mean_iou(*overlaps(counts))),
        "pixel_accuracy": float(counts.diag().sum() / counts.sum()),
    }


def overlaps(confused: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in the intersection and in the union of truth and prediction, of each class:
    (classes,) twice. Those of several confusion matrices add."""
    hits = confused.diag()
    return hits, confused.sum(0) + confused.sum(1) - hits


def mean_iou(intersection: Tensor, union: Tensor) -> Tensor:
    """The mean of intersection / union over classes that occur; NaN if none does."""
    occurs = union > 0
    return (intersection[occurs].double() / union[occurs].double()).mean()


def depth_errors(predicted: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """|p - d| (in the data's unit) and |p - d| / d of each pixel whose depth d is above 0.

    Shapes (items, 1, h, w) or (items, h, w) -> two vectors (pixels,). Raises DataError for shapes
    that differ.
    """
    _same(predicted, depth)
    real = depth > 0
    error = (predicted[real] - depth[real]).abs()
    return error, error / depth[real]


def depth(errors: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """"absolute_error" and "relative_error", means over all pixels of all batches.

    Raises DataError if no pixel counts.
    """
    import torch

    absolute, relative = (torch.cat(parts).double() for parts in zip(*errors, strict=True))
    _some(absolute.numel())
    return {
        "absolute_error": float(absolute.mean()),
        "relative_error": float(relative.mean()),
    }


def normal_angles(predicted: Tensor, normals: Tensor) -> Tensor:
    """Degrees between predicted and true normals (items, 3, h, w), of each pixel that has one.

    Lengths do not matter; a true normal of (0, 0, 0) means that there is none. -> (pixels,).
    Raises DataError for shapes that differ.
    """
    import torch
    import torch.nn.functional as F

    _same(predicted, normals)
    real = (normals != 0).any(dim=1)
    cosine = (F.normalize(predicted, dim=1) * F.normalize(normals, dim=1)).sum(dim=1)[real]
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


def normals(angles: Iterable[Tensor]) -> dict[str, float]:
    """"mean_angle" and "median_angle" in degrees, "within_11.25", "within_22.5", "within_30" in
    [0, 1], over all pixels of all batches.

    Raises DataError if no pixel counts.
    """
    import torch

    joined = torch.cat(list(angles)).double()
    _some(joined.numel())
    shares = {f"within_{a:g}": float((joined < a).double().mean()) for a in ANGLES}
    # Of two values in the middle torch's median is the smaller; here it is their mean.
    median = joined.sort().values[[(len(joined) - 1) // 2, len(joined) // 2]].mean()
    return {"mean_angle": float(joined.mean()), "median_angle": float(median)} | shares


def _same(predicted: Tensor, truth: Tensor) -> None:
    if predicted.shape != truth.shape:
        raise DataError(
            "prediction and truth have different shapes", expected=tuple(truth.shape),
            found=tuple(predicted.shape),
        )  # fmt: skip


def _some(pixels: float | Tensor) -> None:
    if not pixels:
        raise DataError("no pixel has ground truth", expected="at least one")

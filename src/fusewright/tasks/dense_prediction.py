"""An answer for every pixel: its class, its depth, its surface normal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fusewright.errors import RecipeError
from fusewright.extras import needs
from fusewright.tasks import dense
from fusewright.tasks.batching import BatchedTask, check_classes, column
from fusewright.tasks.corruptions import CORRUPTIONS, Corruption
from fusewright.tasks.dense_maps import Head, maps
from fusewright.tasks.dense_targets import Array, class_map, depth_map, normal_map
from fusewright.tasks.errors import DataError
from fusewright.tasks.images import ImagePreparation
from fusewright.tasks.outcomes import Column, Outcomes
from fusewright.tasks.task import Batch, Split
from fusewright.tasks.units import unit_of

if TYPE_CHECKING:
    from torch import Tensor, nn

WITHIN_DEPTH = 1.25
"""The customary bound of max(p / d, d / p): δ1 of Eigen et al. (2014, arXiv:1406.2283)."""


@dataclass(frozen=True)
class DensePrediction(BatchedTask):
    """A dense model's answer against the "target" of each "image", pixel by pixel.

    ``head`` is a frozen decoder, see :func:`~fusewright.tasks.dense_maps.maps`; without it the
    model's own is asked. Pictures are resized to the square of ``preparation``, or to ``shape``
    (height, width); targets keep their size. Answers are resized to it, each picture's by itself:
    bilinear, ``align_corners=False``. ``corruption`` disturbs pictures, never targets.

    An item's score is a mean over its pixels with ground truth, and its weight their number, so
    that ``Outcomes.value`` is the mean over all pixels of the split. :func:`corpus` gives the other
    metrics of the split from the outcomes' columns, which are means of items too.

    Batches: pixel_values (n, channels, height, width) float32; labels (n, …, h, w), padded at the
    right and below with pixels without truth; sizes (n, 2) of the targets; items (n,).

    Raises DataError if ``preparation`` cuts pictures: what is cut off has no answer. RecipeError
    for a metric that its kind does not have.
    """

    conditions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    METRICS: ClassVar[tuple[str, ...]]
    CHANNELS: ClassVar[int] = 1
    in_numbers: ClassVar[bool] = True

    head: Head | None = field(default=None, kw_only=True, repr=False, compare=False)
    preparation: ImagePreparation = field(default_factory=ImagePreparation, kw_only=True)
    corruption: Corruption | None = field(default=None, kw_only=True)
    shape: tuple[int, int] | None = field(default=None, kw_only=True)
    metric: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.metric not in self.METRICS:
            raise RecipeError(f"no metric {self.metric!r}", where=f"task {self.name}",
                              expected=", ".join(self.METRICS))  # fmt: skip
        if self.preparation.fit != "stretch":
            raise DataError("pictures are cut, so that pixels of the target have no answer",
                            where=f"task {self.name}", expected='fit="stretch"',
                            found=f"fit={self.preparation.fit!r}",
                            fix="options: {preparation: {size: N, fit: stretch}}")  # fmt: skip

    @property
    def channels(self) -> int:
        """How many numbers the model says of each pixel."""
        return self.CHANNELS

    @property
    def void(self) -> float:
        """What targets are padded with: no ground truth."""
        return 0.0

    @abstractmethod
    def truth(self, value: Any, where: str) -> Array:
        """A row's target as (…, h, w). Raises DataError if it is none."""

    @abstractmethod
    def losses(self, said: Tensor, truth: Tensor) -> Tensor:
        """The training loss of each pixel with ground truth: (pixels,). ``said`` (channels, h, w)
        is of the size of ``truth`` (…, h, w)."""

    @abstractmethod
    def measured(self, said: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """An item's columns: means over its pixels with ground truth, or counts; no NaN."""

    def under(self, condition: str) -> Self:
        return replace(self, corruption=Corruption.sized(condition, self.preparation.size))

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        pictures, targets = (column(rows, role, where, numbers) for role in ("image", "target"))
        found = []
        for picture, target, number in zip(pictures, targets, numbers, strict=True):
            seen = picture if self.corruption is None else self.corruption(picture, number)
            found.append((self._pixels(seen), self.truth(target, f"{where}, row {number}")))
        return found

    def _pixels(self, picture: Any) -> Any:
        if self.shape is None:
            return self.preparation.pixels(picture)
        height, width = self.shape
        filters = needs("PIL.Image", "tasks").Resampling
        how = getattr(filters, self.preparation.resample.upper())
        mode = "RGB" if self.preparation.channels == 3 else "L"
        values = np.asarray(picture.convert(mode).resize((width, height), how))
        return np.ascontiguousarray(values.reshape(height, width, -1).transpose(2, 0, 1))

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        import torch

        pixels, truths = zip(*examples, strict=True)
        sizes = np.array([truth.shape[-2:] for truth in truths])
        shape = (len(truths), *truths[0].shape[:-2], *sizes.max(axis=0))
        padded = np.full(shape, self.void, dtype=truths[0].dtype)
        for place, truth, (height, width) in zip(padded, truths, sizes, strict=True):
            place[..., :height, :width] = truth
        return {
            "pixel_values": self.preparation.values(pixels),
            "labels": torch.from_numpy(padded), "sizes": torch.from_numpy(sizes),
        }  # fmt: skip

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of each place, at its own resolution: (n, h, w, channels).

        Raises DataError if it has other channels than the task.
        """
        found = maps(model, batch["pixel_values"], self.head)
        if found.shape[1] != self.channels:
            raise DataError("the model's answer has other channels", where=f"task {self.name}",
                            expected=self.channels, found=found.shape[1],
                            fix="a model or head that was made for this task")  # fmt: skip
        return found.movedim(1, -1)

    def answers(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Each item's answer (channels, h, w) at its target's size, and its target (…, h, w)."""
        import torch.nn.functional as F

        found = self.logits(model, batch).movedim(-1, 1)
        found = found if found.dtype.itemsize > 4 else found.float()
        for at, (height, width) in enumerate(batch["sizes"].tolist()):  # one by one, to save memory
            said = F.interpolate(
                found[at : at + 1], (height, width), mode="bilinear", align_corners=False
            )
            yield said[0], batch["labels"][at, ..., :height, :width]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch's pixels with ground truth; 0 if there is none."""
        import torch

        losses = torch.cat([self.losses(*one) for one in self.answers(model, batch)])
        return losses.sum() / max(1, len(losses))

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        seen = [self.measured(*one) for batch in batches for one in self.answers(model, batch)]
        columns = {name: _column([each[name] for each in seen]) for name in seen[0]}
        weight = columns["pixels"].astype(np.float64)
        if not weight.any():
            raise DataError("no pixel has ground truth", where=f"task {self.name}",
                            expected="at least one")  # fmt: skip
        score = columns[self.metric].astype(np.float64)
        score = score if unit_of(self.metric).bounded else -score
        return Outcomes(self.metric, score, weight, columns)


@dataclass(frozen=True)
class Segmentation(DensePrediction):
    """The class of each pixel; trained by cross-entropy, scored by pixel accuracy.

    Targets hold class ids; ``ignored`` marks pixels without (255, as PNG files have it; -1 in the
    NYUv2 arrays of multi-task learning). Columns: pixels, pixel_accuracy, iou (of the item, over
    classes that occur), loss and entropy (nats), and pixels in the "intersection K" and "union K"
    of class K. Batches: labels int32.
    """

    kind: ClassVar[str] = "segmentation"
    METRICS = ("pixel_accuracy",)
    in_numbers = False

    classes: tuple[str, ...] = field(kw_only=True)
    ignored: int = field(default=255, kw_only=True)
    metric: str = field(default="pixel_accuracy", kw_only=True)

    @property
    def channels(self) -> int:
        return len(self.classes)

    @property
    def void(self) -> float:
        return self.ignored

    def check(self, split: Split) -> None:
        check_classes(split, self.classes)

    def truth(self, value: Any, where: str) -> Array:
        return class_map(value, len(self.classes), self.ignored, where)

    def losses(self, said: Tensor, truth: Tensor) -> Tensor:
        import torch.nn.functional as F

        real = truth != self.ignored
        return F.cross_entropy(said[:, real].T, truth[real].long(), reduction="none")

    def measured(self, said: Tensor, truth: Tensor) -> dict[str, Tensor]:
        confused = dense.confusion(said.argmax(0), truth, len(self.classes), self.ignored)
        hits, union = dense.overlaps(confused)
        from fusewright.modules.answers import entropies

        logs = said[:, truth != self.ignored].log_softmax(0)
        return {
            "pixels": confused.sum(), "pixel_accuracy": _ratio(hits.sum(), confused.sum()),
            "iou": dense.mean_iou(hits, union).nan_to_num(0.0),
            "loss": _mean(self.losses(said, truth)),
            "entropy": _mean(entropies(logs, dim=0)),
            **{f"intersection {k}": n for k, n in enumerate(hits)},
            **{f"union {k}": n for k, n in enumerate(union)},
        }  # fmt: skip


@dataclass(frozen=True)
class Depth(DensePrediction):
    """The depth of each pixel; trained by its absolute error (L1).

    Stored values times ``scale`` are depths (0.001 makes metres of millimetres); 0, negative and
    infinite ones do not count. ``metric``: "absolute_error" |p - d| (in the unit of depths),
    "relative_error" |p - d| / d, or "within_1.25", the share with max(p / d, d / p) < 1.25. All
    are columns, with pixels and loss. Batches: labels float32.
    """

    kind: ClassVar[str] = "depth"
    METRICS = ("absolute_error", "relative_error", "within_1.25")

    scale: float = field(default=1.0, kw_only=True)
    metric: str = field(default="absolute_error", kw_only=True)

    def truth(self, value: Any, where: str) -> Array:
        return depth_map(value, self.scale, where)

    def losses(self, said: Tensor, truth: Tensor) -> Tensor:
        return dense.depth_errors(said[0], truth)[0]

    def measured(self, said: Tensor, truth: Tensor) -> dict[str, Tensor]:
        absolute, relative = dense.depth_errors(said[0].double(), truth.double())
        real = truth > 0
        p, d = said[0][real].double(), truth[real].double()
        near = (p < WITHIN_DEPTH * d) & (d < WITHIN_DEPTH * p)
        error = _mean(absolute)
        return {"pixels": real.sum(), "absolute_error": error, "relative_error": _mean(relative),
                "within_1.25": _mean(near.double()), "loss": error}  # fmt: skip


@dataclass(frozen=True)
class Normals(DensePrediction):
    """The surface normal of each pixel; trained by 1 - cosine, whatever the length.

    ``metric``: "within_11.25", "within_22.5", "within_30" (the share of angles below so many
    degrees), or "mean_angle". All are columns, with median_angle (of the item), pixels and loss.
    The median over a split is that of :func:`dense.normals` of :meth:`angles`. Batches: labels
    (n, 3, h, w) float32.
    """

    kind: ClassVar[str] = "normals"
    METRICS = (*(f"within_{a:g}" for a in dense.ANGLES), "mean_angle")
    CHANNELS = 3

    metric: str = field(default="within_11.25", kw_only=True)

    def truth(self, value: Any, where: str) -> Array:
        return normal_map(value, where)

    def losses(self, said: Tensor, truth: Tensor) -> Tensor:
        import torch.nn.functional as F

        cosine = F.cosine_similarity(said, truth.to(said.dtype), dim=0)
        return 1 - cosine[(truth != 0).any(0)]

    def measured(self, said: Tensor, truth: Tensor) -> dict[str, Tensor]:
        angles = _angles(said, truth)
        known = dense.normals([angles]) if len(angles) else dict.fromkeys(
            [*self.METRICS, "median_angle"], 0.0)  # fmt: skip
        loss = _mean(self.losses(said, truth))
        return {"pixels": (truth != 0).any(0).sum(), "loss": loss} | {
            name: loss.new_tensor(value).double() for name, value in known.items()
        }

    def angles(self, model: nn.Module, batches: Iterator[Batch]) -> Iterator[Tensor]:
        """Degrees between answer and truth, of each item's pixels that have one."""
        for batch in batches:
            for said, truth in self.answers(model, batch):
                yield _angles(said, truth)


def corpus(outcomes: Outcomes) -> dict[str, float]:
    """The metrics over all pixels of a split, from what is known of its items.

    Of segmentation "mean_iou" (from summed intersections and unions) and "pixel_accuracy"; of
    depth and normals their errors and shares within bounds (no median: it is no mean of items').

    Raises ValueError if the outcomes are of another kind of task.
    """
    import torch

    columns = {name: np.asarray(c, np.float64) for name, c in outcomes.columns.items()}
    if "pixels" not in columns:
        raise ValueError("outcomes of dense prediction have a column 'pixels'")
    kept = [n for n in columns if n.startswith(("pixel_", "absolute_", "relative_", "within_"))]
    found = {n: float(np.average(columns[n], weights=outcomes.weight))
             for n in [*kept, *({"mean_angle"} & columns.keys())]}  # fmt: skip
    hits, union = (
        torch.tensor([columns[n].sum() for n in columns if n.startswith(kind)])
        for kind in ("intersection ", "union ")
    )
    return found | ({"mean_iou": float(dense.mean_iou(hits, union))} if len(hits) else {})


def _angles(said: Tensor, truth: Tensor) -> Tensor:
    return dense.normal_angles(said[None].double(), truth[None].double())


def _mean(values: Tensor) -> Tensor:
    return values.double().sum() / max(1, len(values))


def _ratio(count: Tensor, total: Tensor) -> Tensor:
    return count.double() / total.clamp(min=1)


def _column(values: Sequence[Tensor]) -> Column:
    import torch

    return torch.stack(list(values)).cpu().numpy()

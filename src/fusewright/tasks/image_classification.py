"""Which class a picture belongs to: any vision backbone with a frozen linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fusewright.tasks.batching import column
from fusewright.tasks.classification import Classification
from fusewright.tasks.corruptions import CORRUPTIONS, Corruption
from fusewright.tasks.errors import DataError
from fusewright.tasks.heads import image_features, linear
from fusewright.tasks.images import ImagePreparation
from fusewright.tasks.pictures import Pictures
from fusewright.tasks.task import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ImageClassification(Classification):
    """A backbone's features against a frozen head: logits = scale · f(x) headᵀ.

    ``head`` (classes, width) is trained, made of class prototypes, or CLIP's of
    :func:`~fusewright.tasks.heads.clip_head`, which wants ``normalise`` (features of length 1) and
    ``scale`` (exp of CLIP's logit scale, 100 in the published models). ``projection`` (width,
    features) is for a CLIP tower without its own. Which features: see
    :func:`~fusewright.tasks.heads.image_features`. ``corruption`` disturbs every picture before it
    is prepared.

    Batches: pixel_values (n, channels, size, size) float32, labels (n,), items (n,).
    Raises DataError if the head has not one row for each class.
    """

    kind: ClassVar[str] = "image-classification"
    conditions: ClassVar[tuple[str, ...]] = CORRUPTIONS

    head: Tensor = field(kw_only=True, repr=False, compare=False)
    preparation: ImagePreparation = field(default_factory=ImagePreparation, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    normalise: bool = field(default=False, kw_only=True)
    projection: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)
    corruption: Corruption | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_head(self.head, self.classes, self.name)

    @property
    def pictures(self) -> Pictures:
        """What a batch's pixel_values are made of."""
        return Pictures("pixel_values", self.preparation.mean, self.preparation.std)

    def under(self, condition: str) -> Self:
        return replace(self, corruption=Corruption.sized(condition, self.preparation.size))

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        labels = self.labels(rows, numbers, where)
        pictures = column(rows, "image", where, numbers)
        if self.corruption is not None:
            pictures = [
                self.corruption(p, item) for p, item in zip(pictures, numbers, strict=True)
            ]
        return [(self.preparation.pixels(p), y) for p, y in zip(pictures, labels, strict=True)]

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        import torch

        pixels, labels = zip(*examples, strict=True)
        return {"pixel_values": self.preparation.values(pixels), "labels": torch.tensor(labels)}

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head sees of each picture: (n, width)."""
        return image_features(model, batch["pixel_values"])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(n, classes)."""
        return linear(
            self.features(model, batch), self.head,
            scale=self.scale, normalise=self.normalise, projection=self.projection,
        )  # fmt: skip


def check_head(head: Tensor, classes: Sequence[str], name: str) -> None:
    """Raises DataError unless the head has one row for each class."""
    if head.dim() != 2 or head.shape[0] != len(classes):
        raise DataError(
            "the head has other classes than the task", where=f"task {name}",
            expected=f"({len(classes)}, width)", found=tuple(head.shape),
            fix="use the head that was made for this task",
        )  # fmt: skip

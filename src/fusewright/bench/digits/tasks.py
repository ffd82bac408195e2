"""The images, their fixed splits, and what is asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

VALIDATION, TEST = 200, 600
"""Images held out of the 1797: for choosing coefficients, and for the numbers that are shown."""

VIEWS = ("upright", "rotated", "inverted", "mirrored")
KNOWN_VIEWS = VIEWS[:2]
"""What the base is pre-trained on; the other views are new to it, as many tasks are."""


@dataclass(frozen=True)
class Task:
    """A question about an image: how it is shown, and the class of each digit 0 … 9."""

    name: str
    question: str
    view: str
    classes: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """The number of classes."""
        return max(self.classes) + 1

    def labels(self, digits: Tensor) -> Tensor:
        """The class of each image, from its digit."""
        return digits.new_tensor(self.classes)[digits]


_SAME = tuple(range(10))

TASKS = (
    Task("digit", "which digit?", "upright", _SAME),
    Task("parity", "even or odd?", "upright", tuple(d % 2 for d in range(10))),
    Task("magnitude", "five or more?", "upright", tuple(int(d >= 5) for d in range(10))),
    Task("holes", "does it enclose a hole (0, 4, 6, 8, 9)?", "upright",
         tuple(int(d in (0, 4, 6, 8, 9)) for d in range(10))),
    Task("rotated", "which digit, turned by 90°?", "rotated", _SAME),
    Task("inverted", "which digit, dark and light exchanged?", "inverted", _SAME),
    Task("mirrored", "which digit, left and right exchanged?", "mirrored", _SAME),
)  # fmt: skip


def seen(images: Tensor, view: str) -> Tensor:
    """Images (n, 1, 8, 8) in [0, 1] under a view."""
    if view == "rotated":
        return images.rot90(1, (2, 3))
    if view == "inverted":
        return 1 - images
    if view == "mirrored":
        return images.flip(3)
    if view == "upright":
        return images
    raise ValueError(f"no view {view!r}; there are {', '.join(VIEWS)}")


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) in [0, 1] and their digits (n,)."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)


@cache
def splits() -> dict[str, Split]:
    """``train``, ``validation`` and ``test``: disjoint, stratified by digit, always the same.

    Raises FusewrightError if scikit-learn is not installed.
    """
    datasets = needs("sklearn.datasets", "demo")
    selection = needs("sklearn.model_selection", "demo")
    import numpy as np
    import torch

    data = datasets.load_digits()
    digits = data.target
    rest, test = selection.train_test_split(
        np.arange(len(digits)), test_size=TEST, stratify=digits, random_state=0
    )
    train, validation = selection.train_test_split(
        rest, test_size=VALIDATION, stratify=digits[rest], random_state=0
    )
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits, dtype=torch.int64)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: Split(images[at], labels[at]) for name, at in parts.items()}

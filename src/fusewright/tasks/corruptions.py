"""Seven corruptions of pictures (Hendrycks & Dietterich 2019, arXiv:1903.12261).

They are the seven of the merging literature's robustness tables, with the parameters of
CIFAR-10-C for small pictures (32x32) and of ImageNet-C for large ones (224x224). Libraries that
offer them serve neither pictures under 32 pixels nor randomness that belongs to the item, so they
are put together here from Pillow, SciPy and scikit-image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fusewright.errors import RecipeError, nearest
from fusewright.extras import needs

Values = NDArray[np.float64]
"""(height, width, channels) in [0, 1]."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, the same for an item whenever and wherever it is met.

    ``name`` is one of :data:`CORRUPTIONS`; ``severity`` 1 to 5, 5 as in the published tables;
    ``pictures`` says whose parameters: "small" (CIFAR-10-C) or "large" (ImageNet-C). Randomness
    follows from ``seed``, the corruption and the item's number. Grey pictures stay grey.

    Raises RecipeError for a name, severity or kind of pictures that does not exist.
    """

    name: str
    severity: int = 5
    pictures: Literal["small", "large"] = "small"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            close = nearest(self.name, CORRUPTIONS)
            raise RecipeError(
                f"no corruption {self.name!r}", expected=", ".join(CORRUPTIONS),
                fix=f"write {close}" if close else None,
            )  # fmt: skip
        if self.severity not in range(1, 6) or self.pictures not in ("small", "large"):
            raise RecipeError(
                "a corruption is not understood", where=self.name,
                expected='a severity from 1 to 5, pictures "small" or "large"',
                found=f"{self.severity}, {self.pictures!r}",
            )  # fmt: skip

    @classmethod
    def sized(cls, name: str, pixels: int) -> Self:
        """As strong as the benchmarks of such pictures have it: CIFAR-10-C up to 64 pixels,
        ImageNet-C above."""
        return cls(name, pictures="small" if pixels <= 64 else "large")

    def __call__(self, picture: Any, item: int) -> Any:
        """The picture (PIL) corrupted, of the same size; mode L or RGB."""
        image = needs("PIL.Image", "tasks")
        mode = "L" if picture.mode in ("1", "L") else "RGB"
        values = np.asarray(picture.convert("RGB" if self.name == "spatter" else mode)) / 255
        values = values if values.ndim == 3 else values[..., None]
        function, small, large = _KINDS[self.name]
        parameter = (small if self.pictures == "small" else large)[self.severity - 1]
        rng = np.random.default_rng([self.seed, CORRUPTIONS.index(self.name), item])
        found = _bytes(function(values, parameter, rng))
        return image.fromarray(found[..., 0] if found.shape[2] == 1 else found).convert(mode)


def _bytes(values: Values) -> NDArray[np.uint8]:
    """Towards zero, as the published data sets were rounded."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: Values, deviation: float, rng: Rng) -> Values:
    return x + rng.normal(size=x.shape, scale=deviation)


def _impulse_noise(x: Values, amount: float, rng: Rng) -> Values:
    """Salt and pepper in equal parts, on each channel by itself."""
    struck, salt = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(struck, salt.astype(np.float64), x)


def _motion_blur(x: Values, shape: tuple[int, float], rng: Rng) -> Values:
    """Half a bell along a line of 2·radius + 1 pixels, turned by -45 to 45 degrees."""
    ndimage = needs("scipy.ndimage", "tasks")
    radius, deviation = shape
    angle = np.deg2rad(rng.uniform(-45, 45))
    reach = 2 * radius
    steps = np.arange(reach + 1)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    down, right = np.rint(steps * np.sin(angle)), np.rint(steps * np.cos(angle))
    at = (reach + down.astype(int), reach + right.astype(int))
    np.add.at(kernel, at, np.exp(-(steps**2) / (2 * deviation**2)))
    return ndimage.correlate(x, (kernel / kernel.sum())[..., None], mode="nearest")


def _contrast(x: Values, factor: float, rng: Rng) -> Values:
    means = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * factor + means


def _pixelate(x: Values, factor: float, rng: Rng) -> Values:
    image = needs("PIL.Image", "tasks")
    height, width = x.shape[:2]
    small = (max(1, int(width * factor)), max(1, int(height * factor)))
    box = image.Resampling.BOX
    return _through(x, lambda p: p.resize(small, box).resize((width, height), box))


def _jpeg(x: Values, quality: int, rng: Rng) -> Values:
    def stored(picture: Any) -> Any:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return needs("PIL.Image", "tasks").open(file)

    return _through(x, stored)


def _through(x: Values, act: Callable[[Any], Any]) -> Values:
    found = np.rint(x * 255).astype(np.uint8)
    picture = needs("PIL.Image", "tasks").fromarray(found[..., 0] if x.shape[2] == 1 else found)
    return np.asarray(act(picture)).reshape(x.shape) / 255


WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def _spatter(x: Values, shape: tuple[float, ...], rng: Rng) -> Values:
    """Drops of water, or of mud, where smoothed noise is above a threshold."""
    ndimage = needs("scipy.ndimage", "tasks")
    mean, deviation, smooth, threshold, strength, is_mud = shape
    liquid = ndimage.gaussian_filter(
        rng.normal(mean, deviation, x.shape[:2]), smooth, mode="nearest"
    )
    liquid[liquid < threshold] = 0
    if is_mud:
        m = ndimage.gaussian_filter((liquid > threshold) * 1.0, strength, mode="nearest")
        m = np.where(m < 0.8, 0, m)[..., None]
        return x * (1 - m) + MUD * m
    m = _drops((np.clip(liquid, 0, 1) * 255).astype(np.uint8))
    return x + strength * m[..., None] * WATER


def _drops(liquid: NDArray[np.uint8]) -> Values:
    """Light on drops: their relief, from the distance to their edges, as 0 to 1."""
    ndimage, canny = needs("scipy.ndimage", "tasks"), needs("skimage.feature", "tasks").canny
    edges = canny(liquid, sigma=0, low_threshold=50, high_threshold=150)
    far = np.full(liquid.shape, 20.0)
    distance = np.minimum(ndimage.distance_transform_edt(~edges), 20) if edges.any() else far
    distance = _equalised(ndimage.uniform_filter(distance, 3, mode="mirror").astype(np.uint8))
    relief = ndimage.correlate(distance, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode="mirror")
    m = liquid * ndimage.uniform_filter(np.clip(relief, 0, 255), 3, mode="mirror")
    return m / m.max() if m.max() > 0 else m


def _equalised(values: NDArray[np.uint8]) -> Values:
    """Histogram equalisation to 0 … 255."""
    below = np.bincount(values.ravel(), minlength=256).cumsum()
    first = below[values.min()]
    if first == values.size:
        return values.astype(np.float64)
    return ((below - first) / (values.size - first) * 255)[values]


_KINDS: dict[str, tuple[Callable[..., Values], tuple[Any, ...], tuple[Any, ...]]] = {
    "motion_blur": (_motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "impulse_noise": (_impulse_noise, (.01, .02, .03, .05, .07), (.03, .06, .09, .17, .27)),
    "gaussian_noise": (_gaussian_noise, (.04, .06, .08, .09, .10), (.08, .12, .18, .26, .38)),
    "pixelate": (_pixelate, (.95, .9, .85, .75, .65), (.6, .5, .4, .3, .25)),
    "spatter": (_spatter,
        ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
         (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)),
        ((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
         (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1))),
    "contrast": (_contrast, (.75, .5, .4, .3, .15), (.4, .3, .2, .1, .05)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}  # fmt: skip
"""Function, then the published parameters of severities 1 to 5: CIFAR-10-C, ImageNet-C."""

CORRUPTIONS = tuple(_KINDS)
"""The names, in the order of tables."""

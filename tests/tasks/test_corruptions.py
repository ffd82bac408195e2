"""The seven corruptions: what each does to a picture, and that an item always gets the same."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fusewright.errors import RecipeError
from fusewright.tasks import CORRUPTIONS, Corruption

pytest.importorskip("skimage")


def scene(size=(32, 32), mode: str = "RGB"):
    """Something natural: soft shapes, light below and dark above."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    soft = np.asarray(noise.filter(ImageFilter.GaussianBlur(1)))
    light = np.linspace(0.2, 1, size[1])[:, None, None]
    return Image.fromarray((soft * light).astype(np.uint8)).convert(mode)


def values(picture):
    return np.asarray(picture).astype(float) / 255


def change(name: str, severity: int, items: int = 12) -> float:
    clean = scene()
    found = [Corruption(name, severity)(clean, item) for item in range(items)]
    return float(np.mean([np.square(values(f) - values(clean)).mean() for f in found]))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (5, 9), (1, 1), (64, 48)])
@pytest.mark.parametrize("pictures", ["small", "large"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_size_and_mode_are_kept(name, pictures, size, mode) -> None:
    for severity in (1, 3, 5):
        found = Corruption(name, severity, pictures)(scene(size, mode), 3)
        assert (found.size, found.mode) == (size, mode)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_item_always_gets_the_same(name) -> None:
    clean = scene()
    first = values(Corruption(name)(clean, 7))
    np.random.seed(1)  # nothing hangs on the shared generator
    assert (values(Corruption(name)(clean, 7)) == first).all()
    others = [values(Corruption(name)(clean, item)) for item in range(8, 12)]
    random = name not in ("pixelate", "contrast", "jpeg")
    assert any((other != first).any() for other in others) == random
    seeded = values(Corruption(name, seed=1)(clean, 7))
    assert (seeded != first).any() == random


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n != "spatter"])
def test_higher_severities_change_more(name) -> None:
    found = [change(name, severity) for severity in range(1, 6)]
    assert found[0] > 0
    assert found == sorted(found)


def test_spatter_is_water_and_then_mud() -> None:
    black = Image.new("RGB", (32, 32))
    water = sum(values(Corruption("spatter", 3)(black, i)) for i in range(20)).sum(axis=(0, 1))
    assert water[0] < water[1] and water[1] == pytest.approx(water[2])
    mud = sum(values(Corruption("spatter", 5)(black, i)) for i in range(20)).sum(axis=(0, 1))
    assert mud[0] > mud[1] > mud[2] > 0
    assert mud[1] / mud[0] == pytest.approx(42 / 63, abs=0.03)


def test_gaussian_noise_has_the_published_deviation() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for severity, deviation in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
        found = values(Corruption("gaussian_noise", severity)(grey, 0))
        assert found.std() == pytest.approx(deviation, rel=0.05)


def test_impulse_noise_strikes_the_published_share_half_of_it_white() -> None:
    grey = Image.new("L", (200, 200), 128)
    for severity, share in enumerate((0.01, 0.02, 0.03, 0.05, 0.07), 1):
        found = np.asarray(Corruption("impulse_noise", severity)(grey, 0))
        assert (found != 128).mean() == pytest.approx(share, rel=0.15)
        assert (found == 255).sum() == pytest.approx((found == 0).sum(), rel=0.2)
        assert set(np.unique(found)) == {0, 128, 255}


def test_contrast_scales_about_the_mean_of_each_channel() -> None:
    clean = scene()
    found, x = values(Corruption("contrast", 5)(clean, 0)), values(clean)
    expected = (x - x.mean(axis=(0, 1))) * 0.15 + x.mean(axis=(0, 1))
    assert np.abs(found - expected).max() <= 1 / 255


def test_motion_blur_keeps_light_and_smears_along_a_line() -> None:
    dot = Image.new("L", (33, 33))
    dot.putpixel((16, 16), 255)
    found = values(Corruption("motion_blur", 3)(dot, 4))
    assert found.sum() == pytest.approx(1, abs=0.1)
    down, right = np.nonzero(found)
    assert len(down) > 3 and np.ptp(right) >= np.ptp(down)  # 45 degrees at most
    flat = Image.new("RGB", (32, 32), (10, 100, 200))
    assert np.abs(values(Corruption("motion_blur")(flat, 0)) - values(flat)).max() <= 1 / 255


def test_pixelate_leaves_few_different_values() -> None:
    found = np.asarray(Corruption("pixelate", 5)(scene(mode="L"), 0))
    rows_that_repeat = (found[1:] == found[:-1]).all(axis=1).sum()
    assert rows_that_repeat >= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [({"name": "motion-blur"}, "write motion_blur"), ({"name": "jpeg", "severity": 6}, "1 to 5"),
     ({"name": "jpeg", "severity": 0}, "1 to 5"), ({"name": "jpeg", "pictures": "huge"}, "large")],
)  # fmt: skip
def test_what_does_not_exist_is_refused(options, message) -> None:
    with pytest.raises(RecipeError, match=message):
        Corruption(**options)

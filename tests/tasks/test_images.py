"""Preparation of pictures: the same numbers as transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusewright.tasks import DataError, ImagePreparation
from fusewright.tasks.images import RESAMPLING

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


def processor(kind: str, **options):
    """transformers' own, in the variant that works on PIL images."""
    from transformers.models.clip import image_processing_pil_clip
    from transformers.models.vit import image_processing_pil_vit

    return {
        "clip": image_processing_pil_clip.CLIPImageProcessorPil,
        "vit": image_processing_pil_vit.ViTImageProcessorPil,
    }[kind](**options)


SIZES = [(8, 8), (9, 14), (40, 23), (16, 16), (224, 100)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_as_transformers_prepares_it(make_picture, kind: str, size, mode: str) -> None:
    edge = {"shortest_edge": 16} if kind == "clip" else {"height": 16, "width": 16}
    options = {"crop_size": {"height": 16, "width": 16}} if kind == "clip" else {}
    theirs = processor(kind, size=edge, **options)
    ours = ImagePreparation.read(theirs.to_dict())
    picture = make_picture(3, size, mode)
    expected = theirs(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    found = ours.values([ours.pixels(picture)])
    assert found.shape == expected.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)


def test_the_published_defaults_of_clip_and_vit_are_read() -> None:
    clip = ImagePreparation.read(processor("clip").to_dict())
    assert (clip.size, clip.resize, clip.fit, clip.resample) == (224, 224, "crop", "bicubic")
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    vit = ImagePreparation.read(processor("vit").to_dict())
    assert (vit.size, vit.fit, vit.resample) == (224, "stretch", "bilinear")


def test_a_picture_of_the_right_size_is_not_touched(make_picture) -> None:
    picture = make_picture(1, (16, 16))
    found = ImagePreparation(size=16).pixels(picture)
    assert (found == np.asarray(picture).transpose(2, 0, 1)).all()


def test_values_are_normalised_by_channel(make_picture) -> None:
    preparation = ImagePreparation(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    pixels = preparation.pixels(make_picture(2))
    values = preparation.values([pixels, pixels])
    expected = (pixels[1] / 255 - 0.2) / 0.25
    np.testing.assert_allclose(values[1, 1].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_channel_makes_grey_of_colour(make_picture) -> None:
    preparation = ImagePreparation(size=8, mean=(0.5,), std=(0.5,), channels=1)
    picture = make_picture(2)
    assert (preparation.pixels(picture)[0] == np.asarray(picture.convert("L"))).all()


def test_a_mean_of_other_channels_is_refused() -> None:
    with pytest.raises(DataError, match="1 channels"):
        ImagePreparation(channels=1)


def test_a_config_that_gives_pictures_of_different_sizes_is_refused() -> None:
    config = {"size": {"shortest_edge": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(DataError, match="no batch"):
        ImagePreparation.read(config)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("resample", RESAMPLING)
@pytest.mark.parametrize("shape", [(28, 28), (13, 40), (90, 31)])
def test_a_grey_picture_is_prepared_as_if_it_were_coloured_first(shape, resample, fit) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    grey = Image.fromarray(values)
    preparation = ImagePreparation(size=24, resample=resample, fit=fit)
    found = preparation.pixels(grey)
    assert np.array_equal(found, preparation.pixels(grey.convert("RGB")))
    assert found.shape == (3, 24, 24) and found.flags["C_CONTIGUOUS"]
    found[0] = 0  # its own memory
    assert found[1].any() or not values.any()

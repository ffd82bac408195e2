"""Preparation of pictures in the words of timm and OpenCLIP: the same numbers as their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusewright.tasks import DataError, ImagePreparation
from fusewright.tasks.image_configs import IMAGENET, OPENAI, from_open_clip, from_timm

CLIP = {"model_cfg": {"vision_cfg": {"image_size": 20}}}


def picture(size):
    from PIL import Image

    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_what_timm_does_not_say_is_its_own_default():
    found = from_timm({"architecture": "resnet18", "pretrained_cfg": {}})
    assert found == ImagePreparation(224, *IMAGENET, resample="bicubic", fit="crop", resize=256,
                                     centre="even")  # fmt: skip


def test_what_openclip_does_not_say_is_its_own_default():
    assert from_open_clip(CLIP) == ImagePreparation(20, *OPENAI, fit="crop", centre="even")


def test_the_size_of_the_arguments_replaces_the_configs():
    assert from_open_clip(CLIP, 8).size == 8
    asked = from_timm({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9}}, 16)
    assert (asked.size, asked.resize) == (16, 17)


def test_an_older_config_of_timm_is_flat():
    found = from_timm({"architecture": "x", "input_size": [1, 28, 28], "mean": [0.1],
                       "std": [0.3], "crop_pct": 1.0, "interpolation": "bilinear"})  # fmt: skip
    assert found == ImagePreparation(28, (0.1,), (0.3,), 1, "bilinear", "crop", 28, "even")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"crop_mode": "border"}, "not fitted in this way"),
        ({"crop_mode": "squash", "crop_pct": 0.9}, "not stretched and cut"),
        ({"input_size": [3, 32, 64]}, "square"),
        ({"interpolation": "random"}, "no such way to resize"),
    ],
)
def test_what_is_not_done_here_is_refused(config, problem):
    with pytest.raises(DataError, match=problem):
        from_timm({"architecture": "x", "pretrained_cfg": config})


def test_openclips_padding_is_refused():
    with pytest.raises(DataError, match="longest"):
        from_open_clip({**CLIP, "preprocess_cfg": {"resize_mode": "longest"}})


def test_a_picture_of_the_right_size_is_enlarged_before_its_centre_is_cut():
    found = ImagePreparation(16, resize=20, fit="crop").pixels(picture((16, 16)))
    large = picture((16, 16)).resize((20, 20), 3).crop((2, 2, 18, 18))
    np.testing.assert_array_equal(found, np.asarray(large).transpose(2, 0, 1))


SIZES = [(20, 20), (32, 32), (41, 28), (33, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "said", [{"crop_pct": 1.0}, {"crop_pct": 0.83}, {"crop_pct": 1.0, "crop_mode": "squash"}]
)
def test_pixels_are_those_of_timms_own_transform(said, size):
    data = pytest.importorskip("timm.data")
    config = {"input_size": (3, 20, 20), "interpolation": "bicubic", **said}
    transform = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config))
    ours = from_timm({"architecture": "x", "pretrained_cfg": config})
    found = ours.values([ours.pixels(picture(size))])[0]
    torch.testing.assert_close(found, transform(picture(size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_pixels_are_those_of_openclips_own_transform(mode, size):
    transforms = pytest.importorskip("open_clip.transform")
    own = transforms.image_transform_v2(
        transforms.PreprocessCfg(size=20, resize_mode=mode), is_train=False
    )
    ours = from_open_clip({**CLIP, "preprocess_cfg": {"resize_mode": mode}})
    found = ours.values([ours.pixels(picture(size))])[0]
    torch.testing.assert_close(found, own(picture(size)), atol=1e-5, rtol=1e-5)

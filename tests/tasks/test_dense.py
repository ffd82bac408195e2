"""The NYUv2 metrics, against values found by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fusewright.tasks import DataError
from fusewright.tasks.dense import (
    confusion,
    depth,
    depth_errors,
    normal_angles,
    normals,
    segmentation,
)


def test_segmentation_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 1], [1, 2, -1]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    found = confusion(predicted, labels, 4)
    assert found.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = segmentation(found)
    # Class 0: 1 of {0,0,2's pixel} = 1/3; class 1: 2/3; class 2: 0; class 3 does not occur.
    assert scores["mean_iou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(3 / 5)


def test_confusions_of_batches_add() -> None:
    labels, predicted = torch.randint(-1, 5, (4, 6, 6)), torch.randint(0, 5, (4, 6, 6))
    parts = [confusion(p, y, 5) for p, y in zip(predicted, labels, strict=True)]
    assert (sum(parts) == confusion(predicted, labels, 5)).all()


def test_depth_by_hand_leaves_out_unknown_pixels() -> None:
    truth = torch.tensor([[[2.0, 0.0], [4.0, 1.0]]])
    predicted = torch.tensor([[[3.0, 9.0], [3.0, 1.0]]])
    found = depth([depth_errors(predicted, truth)])
    assert found["absolute_error"] == pytest.approx(2 / 3)
    assert found["relative_error"] == pytest.approx((1 / 2 + 1 / 4) / 3)
    halves = [depth_errors(predicted[:, :1], truth[:, :1]),
              depth_errors(predicted[:, 1:], truth[:, 1:])]  # fmt: skip
    assert depth(halves) == found


def test_normals_by_hand_whatever_their_length() -> None:
    angles = [0.0, 10.0, 20.0, 25.0, 90.0]
    truth = torch.tensor([[0.0, 0.0, 2.0]] * 5 + [[0.0, 0.0, 0.0]])
    said = [[math.sin(math.radians(a)), 0.0, math.cos(math.radians(a))] for a in angles]
    predicted = 3 * torch.tensor([*said, [1.0, 0.0, 0.0]], dtype=torch.float64)
    shape = (1, 6, 1, 3)
    found = normals([
        normal_angles(predicted.view(shape).permute(0, 3, 1, 2),
                      truth.double().view(shape).permute(0, 3, 1, 2))
    ])  # fmt: skip
    assert found["mean_angle"] == pytest.approx(29)
    assert found["median_angle"] == pytest.approx(20)
    assert (found["within_11.25"], found["within_22.5"], found["within_30"]) == (0.4, 0.6, 0.8)


def test_the_median_of_an_even_number_is_in_the_middle() -> None:
    assert normals([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0])])["median_angle"] == 3


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="different shapes"):
        depth_errors(torch.ones(1, 2, 2), torch.ones(1, 1, 2, 2))
    with pytest.raises(DataError, match="0 to 2"):
        confusion(torch.tensor([3]), torch.tensor([1]), 3)
    with pytest.raises(DataError, match="no known class"):
        confusion(torch.tensor([1]), torch.tensor([-7]), 3)
    with pytest.raises(DataError, match="no pixel"):
        segmentation(confusion(torch.tensor([0]), torch.tensor([-1]), 3))
    with pytest.raises(DataError, match="no pixel"):
        depth([depth_errors(torch.ones(1, 2), torch.zeros(1, 2))])

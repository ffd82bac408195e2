"""Dense prediction against slow NumPy of its definitions, in float64."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fusewright.errors import FusewrightError, RecipeError
from fusewright.tasks import DataError, ImagePreparation, Rows, evaluate
from fusewright.tasks.corruptions import Corruption
from fusewright.tasks.dense import normals
from fusewright.tasks.dense_maps import maps
from fusewright.tasks.dense_prediction import Depth, Normals, Segmentation, corpus

CLASSES = ("floor", "wall", "sofa", "lamp")
SIZES = [(9, 12), (16, 8), (5, 5), (10, 10)]
PREPARATION = ImagePreparation(size=16)


class Coarse(torch.nn.Module):
    """A convolution of stride 4: a map at a quarter of the picture's resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(channels)
        self.convolution = torch.nn.Conv2d(3, channels, 4, stride=4)
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, pixels):
        return {"out": self.norm(self.convolution(pixels))}


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in SIZES]


def png(array) -> dict[str, bytes]:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return {"bytes": out.getvalue()}


def class_ids():
    rng = np.random.default_rng(1)
    return [rng.choice([0, 1, 2, 255], size) for size in SIZES]


def depths():
    rng = np.random.default_rng(2)
    return [rng.choice([0.0, -1.0, 0.5, 2.0, 7.5], size) * rng.uniform(1, 2, size)
            for size in SIZES]  # fmt: skip


def directions():
    rng = np.random.default_rng(3)
    found = [rng.normal(size=(3, *size)) for size in SIZES]
    for one in found:
        one[:, rng.random(one.shape[1:]) < 0.3] = 0
    return found


def resized(values, height, width):
    """Bilinear with half-pixel centres: (c, h, w) -> (c, height, width)."""
    def weights(small, large):
        at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, None)
        low = np.minimum(at.astype(int), small - 1)
        found = np.zeros((large, small))
        found[np.arange(large), low] += 1 - (at - low)
        found[np.arange(large), np.minimum(low + 1, small - 1)] += at - low
        return found

    rows, columns = weights(values.shape[1], height), weights(values.shape[2], width)
    return np.einsum("ih,chw,jw->cij", rows, values.astype(np.float64), columns)


def said(task, model):
    """What the model answers to each picture, at its target's size, in NumPy."""
    for picture, (height, width) in zip(pictures(), SIZES, strict=True):
        pixels = task.preparation.values([task.preparation.pixels(picture)])
        with torch.no_grad():
            yield resized(model.eval()(pixels)["out"][0].numpy(), height, width)


def near(found, expected) -> None:
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def check_weighting(outcomes, expected: float, pixels: list[int]) -> None:
    assert outcomes.weight.tolist() == outcomes.columns["pixels"].tolist() == pixels
    near(outcomes.value, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_segmentation_is_that_of_all_pixels(batch_size) -> None:
    task, model = Segmentation("s", classes=CLASSES, preparation=PREPARATION), Coarse(4)
    split = Rows({"image": pictures(), "target": [png(t.astype(np.uint8)) for t in class_ids()]})
    outcomes = evaluate(model, task, split, batch_size=batch_size)
    answers, truths = list(said(task, model)), class_ids()
    known = [t != 255 for t in truths]
    true = np.concatenate([t[k] for t, k in zip(truths, known, strict=True)])
    logits = np.concatenate([a[:, k] for a, k in zip(answers, known, strict=True)], axis=1)
    guess = logits.argmax(0)
    check_weighting(outcomes, (guess == true).mean(), [int(k.sum()) for k in known])
    overlap = [((guess == c) & (true == c)).sum() / max(1, ((guess == c) | (true == c)).sum())
               for c in range(4) if ((guess == c) | (true == c)).any()]  # fmt: skip
    found = corpus(outcomes)
    near(found["mean_iou"], np.mean(overlap))
    near(found["pixel_accuracy"], outcomes.value)
    logs = logits - np.log(np.exp(logits).sum(0))
    losses = -logs[true, np.arange(len(true))]
    near(np.average(outcomes.columns["loss"], weights=outcomes.weight), losses.mean())
    near(np.average(outcomes.columns["entropy"], weights=outcomes.weight),
         -(np.exp(logs) * logs).sum(0).mean())  # fmt: skip
    near(task.loss(model, next(task.batches(split, 4))).item(), losses.mean())


@pytest.mark.parametrize("metric", Depth.METRICS)
def test_depth_is_that_of_all_pixels(metric) -> None:
    task, model = Depth("d", preparation=PREPARATION, metric=metric), Coarse(1)
    split = Rows({"image": pictures(), "target": [d.tolist() for d in depths()]})
    outcomes = evaluate(model, task, split, batch_size=3)
    known = [d > 0 for d in depths()]
    p, d = (np.concatenate([v.reshape(k.shape)[k] for v, k in zip(values, known, strict=True)])
            for values in (said(task, model), depths()))  # fmt: skip
    d = d.astype(np.float32)
    with np.errstate(divide="ignore"):
        within = (p > 0) & (np.maximum(p / d, d / p) < 1.25)
    error = np.abs(p - d)
    expected = {"absolute_error": error.mean(), "relative_error": (error / d).mean(),
                "within_1.25": within.mean()}  # fmt: skip
    sign = 1 if metric == "within_1.25" else -1
    check_weighting(outcomes, sign * expected[metric], [int(k.sum()) for k in known])
    assert corpus(outcomes) == pytest.approx(expected, rel=1e-5)
    near(outcomes.shown, 100 * expected[metric])
    near(task.loss(model, next(task.batches(split, 4))).item(), expected["absolute_error"])


@pytest.mark.parametrize("metric", Normals.METRICS)
def test_normals_are_those_of_all_pixels(metric) -> None:
    task, model = Normals("n", preparation=PREPARATION, metric=metric), Coarse(3)
    split = Rows({"image": pictures(), "target": directions()})
    outcomes = evaluate(model, task, split, batch_size=3)
    known = [(n != 0).any(0) for n in directions()]
    p, n = (np.concatenate([v[:, k] for v, k in zip(values, known, strict=True)], axis=1)
            for values in (said(task, model), directions()))  # fmt: skip
    cosine = (p * n).sum(0) / np.linalg.norm(p, axis=0) / np.linalg.norm(n, axis=0)
    angles = np.degrees(np.arccos(cosine))
    expected = {"mean_angle": angles.mean(), "median_angle": np.median(angles)} | {
        f"within_{a:g}": (angles < a).mean() for a in (11.25, 22.5, 30)
    }
    sign = -1 if metric == "mean_angle" else 1
    check_weighting(outcomes, sign * expected[metric], [int(k.sum()) for k in known])
    with torch.no_grad():
        whole = normals(task.angles(model.eval(), task.batches(split, 3)))
    assert whole == pytest.approx(expected, rel=1e-5)
    del expected["median_angle"]
    assert corpus(outcomes) == pytest.approx(expected, rel=1e-5)
    model.eval()
    near(task.loss(model, next(task.batches(split, 4))).item(), (1 - cosine).mean())


def test_items_without_truth_weigh_nothing_and_a_split_without_is_refused() -> None:
    task = Depth("d", preparation=PREPARATION)
    targets = [np.zeros(SIZES[0]), *depths()[1:]]
    outcomes = evaluate(Coarse(1), task, Rows({"image": pictures(), "target": targets}))
    assert outcomes.weight[0] == outcomes.score[0] == 0 and np.isfinite(outcomes.score).all()
    bare = Rows({"image": pictures(), "target": [np.zeros(size) for size in SIZES]})
    with pytest.raises(DataError, match="no pixel has ground truth"):
        evaluate(Coarse(1), task, bare)
    for other in (Segmentation("s", classes=CLASSES, preparation=PREPARATION),
                  Normals("n", preparation=PREPARATION)):  # fmt: skip
        empty = np.full(SIZES[0], 255) if other.kind == "segmentation" else np.zeros((3, *SIZES[0]))
        (item,) = other.batches(Rows({"image": pictures()[:1], "target": [empty]}), 1)
        model = Coarse(other.channels)
        ((answer, truth),) = other.answers(model, item)
        assert all(torch.isfinite(v).all() for v in other.measured(answer, truth).values())
        assert other.loss(model, item).item() == 0


def test_stored_pictures_mean_what_arrays_mean() -> None:
    millimetres = np.array([[0, 1500], [2000, 65535]], np.uint16)
    task = Depth("d", scale=0.001)
    assert task.truth(png(millimetres), "x") == pytest.approx(np.array([[0, 1.5], [2, 65.535]]))
    coded = np.array([[[255, 128, 128], [0, 0, 0]], [[128, 128, 128], [0, 127, 128]]], np.uint8)
    found = Normals("n").truth(png(coded), "x")
    assert found[:, 0, 0].tolist() == pytest.approx([1, 1 / 255, 1 / 255], rel=1e-4)
    assert (found != 0).any(0).tolist() == [[True, False], [False, True]]
    assert np.array_equal(Normals("n").truth(np.moveaxis(directions()[0], 0, -1), "x"),
                          Normals("n").truth(directions()[0], "x"))  # fmt: skip
    palette = Image.fromarray(np.array([[0, 3]], np.uint8), "L").convert("P")
    task = Segmentation("s", classes=CLASSES)
    assert task.truth(palette, "x").shape == (1, 2)


@pytest.mark.parametrize(
    ("task", "target", "problem"),
    [
        (Segmentation("s", classes=CLASSES), np.full((2, 2), 4), "no known class"),
        (Segmentation("s", classes=CLASSES), np.full((2, 2), -1), "no known class"),
        (Segmentation("s", classes=CLASSES), np.zeros((2, 2)), "no map of classes"),
        (Segmentation("s", classes=CLASSES), np.zeros((2, 2, 3), int), "no map of classes"),
        (Segmentation("s", classes=CLASSES), [[1, 2], [3]], "different lengths"),
        (Segmentation("s", classes=CLASSES), "cat", "neither a picture nor an array"),
        (Segmentation("s", classes=CLASSES), {"bytes": b"?"}, "cannot be decoded"),
        (Depth("d"), np.zeros((2, 2, 2)), "no map of depths"),
        (Normals("n"), np.zeros((2, 2)), "no map of normals"),
    ],
)
def test_a_target_that_is_none_is_refused_with_its_row(task, target, problem) -> None:
    split = Rows({"image": pictures()[:1], "target": [target]}, name="here")
    with pytest.raises(DataError, match=problem) as caught:
        next(task.batches(split, 1))
    assert "here, row 0" in str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="stretch"):
        Depth("d", preparation=ImagePreparation(fit="crop"))
    with pytest.raises(RecipeError, match="absolute_error"):
        Depth("d", metric="mean_angle")
    task = Depth("d", preparation=PREPARATION)
    with pytest.raises(DataError, match="'target'"):
        next(task.batches(Rows({"image": pictures()}), 2))
    split = Rows({"image": pictures(), "target": depths()})
    with pytest.raises(DataError, match="other channels"):
        evaluate(Coarse(3), task, split)
    with pytest.raises(FusewrightError, match="no map over the picture"):
        maps(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4))


def test_pictures_are_corrupted_and_targets_are_not() -> None:
    split = Rows({"image": pictures(), "target": depths()})
    clean = Depth("d", preparation=PREPARATION)
    noisy = replace(clean, corruption=Corruption("gaussian_noise"))
    a, b = (next(task.batches(split, 4)) for task in (clean, noisy))
    assert torch.equal(a["labels"], b["labels"])
    assert not torch.equal(a["pixel_values"], b["pixel_values"])


def test_pictures_need_not_be_square() -> None:
    task = Depth("d", preparation=PREPARATION, shape=(12, 20))
    split = Rows({"image": pictures(), "target": depths()})
    assert next(task.batches(split, 4))["pixel_values"].shape == (4, 3, 12, 20)
    assert len(evaluate(Coarse(1), task, split)) == 4


def test_a_frozen_decoder_takes_the_place_of_the_models_own_and_stays() -> None:
    model, other = Coarse(1), Coarse(3)
    head = {f"norm.{n}": t.clone() for n, t in other.norm.state_dict().items()} | {
        f"convolution.{n}": t.clone() for n, t in other.convolution.state_dict().items()
    }
    before = {n: t.clone() for n, t in head.items()}
    task = Normals("n", preparation=PREPARATION, head=head)
    split = Rows({"image": pictures(), "target": directions()})
    own = evaluate(other, replace(task, head=None), split)
    assert np.array_equal(evaluate(model, task, split).score, own.score)
    task.loss(model.train(), next(task.batches(split, 4)))
    assert all(torch.equal(head[n], before[n]) for n in head)
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(FusewrightError, match="decoder"):
        evaluate(model, replace(task, head={"decoder.weight": torch.ones(1)}), split)


def test_a_linear_head_sees_the_backbones_features_at_every_place() -> None:
    t = pytest.importorskip("transformers")
    pixels = torch.randn(2, 3, 32, 16)
    segformer = t.SegformerForSemanticSegmentation(t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=8)).eval()  # fmt: skip
    head = torch.randn(5, 12)
    features = segformer.segformer(pixels).last_hidden_state
    expected = torch.einsum("cw,nwij->ncij", head, features)
    torch.testing.assert_close(maps(segformer, pixels, head), expected)
    dino = t.Dinov2Model(t.Dinov2Config(hidden_size=12, num_hidden_layers=1, patch_size=8,
                                        num_attention_heads=2, image_size=32)).eval()  # fmt: skip
    tokens = dino(pixels).last_hidden_state
    found = maps(dino, pixels, head)
    assert found.shape == (2, 5, 4, 2)
    torch.testing.assert_close(found[0, :, 3, 1], head @ tokens[0, -1])
    torch.testing.assert_close(found[0, :, 0, 1], head @ tokens[0, 2])


def test_depth_models_of_transformers_answer() -> None:
    class Found:
        predicted_depth = torch.ones(2, 4, 4)

    class Model(torch.nn.Module):
        def forward(self, pixels):
            return Found()

    assert maps(Model(), torch.zeros(2, 3, 8, 8)).shape == (2, 1, 4, 4)


def test_truth_keeps_its_precision_in_half_precision_models() -> None:
    task = Depth("d", preparation=PREPARATION)
    split = Rows({"image": pictures()[:1], "target": [np.full(SIZES[0], 1001.0)]})
    model = Coarse(1).bfloat16()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1000)  # exact in bfloat16, 1001 is not
    near(evaluate(model, task, split).value, -1)

"""Backbones, heads and what evaluate makes of them, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusewright.errors import FusewrightError
from fusewright.tasks import (
    DataError,
    DataSource,
    ImageClassification,
    ImagePreparation,
    clip_head,
    evaluate,
    image_features,
    open_split,
)

t = pytest.importorskip("transformers")

SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SMALL | {"image_size": 8, "patch_size": 4, "intermediate_size": 8}
CLASSES = ("a", "b", "c")


def models() -> dict:
    clip = t.CLIPVisionConfig(**VISION, projection_dim=12)
    resnet = t.ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1])
    return {
        "vit": t.ViTModel(t.ViTConfig(**VISION), add_pooling_layer=False),
        "vit, pooled": t.ViTModel(t.ViTConfig(**VISION, pooler_output_size=12)),
        "vit with a head": t.ViTForImageClassification(t.ViTConfig(**VISION)),
        "dinov2": t.Dinov2Model(
            t.Dinov2Config(image_size=8, patch_size=4, mlp_ratio=1, **SMALL)),
        "resnet": t.ResNetModel(resnet),
        "resnet with a head": t.ResNetForImageClassification(resnet),
        "convnext": t.ConvNextModel(
            t.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2)),
        "clip": t.CLIPVisionModelWithProjection(clip),
        "clip's tower": t.CLIPVisionModel(clip),
    }  # fmt: skip


def expected_features(name: str, model, pixels):
    """The rule, written out model by model."""
    if "head" in name:
        model = model.base_model
    found = model(pixel_values=pixels)
    if name == "clip":
        return found.image_embeds
    if name in ("vit", "vit with a head"):
        return found.last_hidden_state[:, 0]
    if name.startswith("resnet"):
        return found.last_hidden_state.mean(dim=(2, 3))
    return found.pooler_output


@pytest.mark.parametrize("name", list(models()))
@torch.no_grad()
def test_features_follow_the_stated_rule(name: str) -> None:
    model, pixels = models()[name].eval(), torch.randn(3, 3, 8, 8)
    found = image_features(model, pixels)
    assert found.shape == (3, 12)
    torch.testing.assert_close(found, expected_features(name, model, pixels))


def test_plain_modules_give_features_or_maps() -> None:
    pixels = torch.randn(2, 3, 8, 8)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    assert image_features(flat, pixels).shape == (2, 5)
    maps = torch.nn.Conv2d(3, 4, 3)
    torch.testing.assert_close(image_features(maps, pixels), maps(pixels).mean(dim=(2, 3)))


def make_task(**options) -> ImageClassification:
    head = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    fields = {"head": head, "preparation": ImagePreparation(size=8)} | options
    return ImageClassification("toy", CLASSES, **fields)


@pytest.fixture
def split(image_folder):
    return open_split(DataSource(folder="vision/toy"), "test", image_folder())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet", "clip"])
@pytest.mark.parametrize("batch_size", [3, 64])
@torch.no_grad()
def test_outcomes_are_those_of_a_plain_loop(split, name, normalise, batch_size) -> None:
    model, task = models()[name].eval(), make_task(normalise=normalise, scale=7.0)
    seen = evaluate(model, task, split, batch_size=batch_size)
    rows = split.rows(range(10))
    pixels = np.stack([np.asarray(p).transpose(2, 0, 1) for p in rows["image"]])
    features = expected_features(name, model, torch.tensor(pixels / 127.5 - 1).float())
    features = F.normalize(features, dim=1) if normalise else features
    logits, labels = 7 * features @ task.head.T, torch.tensor(rows["label"])
    chances = torch.distributions.Categorical(logits=logits)
    assert seen.metric == "accuracy"
    assert seen.columns["label"].tolist() == rows["label"]
    assert seen.columns["prediction"].tolist() == logits.argmax(dim=1).tolist()
    assert seen.score.tolist() == (logits.argmax(dim=1) == labels).double().tolist()
    expected = {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "confidence": chances.probs.max(dim=1).values, "entropy": chances.entropy(),
    }  # fmt: skip
    for column, values in expected.items():
        np.testing.assert_allclose(seen.columns[column], values, rtol=2e-4, atol=1e-5)


def test_a_projection_makes_the_tower_a_clip(split) -> None:
    clip = models()["clip"]
    tower = clip.vision_model
    weight = clip.visual_projection.weight.detach()
    ours = evaluate(tower, make_task(normalise=True, projection=weight), split)
    theirs = evaluate(clip, make_task(normalise=True), split)
    np.testing.assert_allclose(ours.columns["loss"], theirs.columns["loss"], rtol=1e-5)


def test_prepared_rows_give_the_same_and_are_not_read_again(split, monkeypatch) -> None:
    model, task = models()["vit"], make_task()
    plain, held = evaluate(model, task, split, limit=7), task.prepared(split, limit=7)
    monkeypatch.setattr(split, "rows", None)
    again = evaluate(model, task, held)
    assert all((plain.columns[k] == again.columns[k]).all() for k in plain.columns)
    assert len(evaluate(model, task, held, limit=2)) == 2


def test_batches_are_shuffled_by_the_seed_and_carry_their_rows(split) -> None:
    def items(**options):
        return torch.cat([b["items"] for b in make_task().batches(split, 3, **options)]).tolist()

    assert items() == list(range(10))
    assert items(limit=4) == [0, 1, 2, 3]
    assert items(seed=1) == items(seed=1) != items(seed=2)
    assert items(seed=-1) == items(seed=-1) != items(seed=1)
    assert sorted(items(seed=1, limit=6)) == list(range(6))
    batch = next(make_task().batches(split, 4, seed=5))
    assert batch["labels"].tolist() == [n % 3 for n in batch["items"].tolist()]


def test_the_loss_is_the_mean_of_the_outcomes_and_has_gradients(split) -> None:
    model, task = models()["vit"].eval(), make_task()
    batch = next(task.batches(split, 10))
    loss = task.loss(model, batch)
    loss.backward()
    assert model.layernorm.weight.grad.abs().sum() > 0
    seen = evaluate(model, task, split)
    assert loss.item() == pytest.approx(seen.columns["loss"].mean(), rel=1e-5)


def test_every_modules_mode_comes_back(split) -> None:
    model = models()["vit"].train()
    model.layernorm.eval()
    before = [m.training for m in model.modules()]
    evaluate(model, make_task(), split)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(FusewrightError):
        evaluate(model, make_task(head=torch.randn(3, 5)), split)
    assert [m.training for m in model.modules()] == before


def test_evaluation_is_in_evaluation_mode_and_without_gradients(split) -> None:
    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(192, 12)

        def forward(self, pixels):
            assert not self.training and torch.is_inference_mode_enabled()
            return self.inner(pixels.flatten(1))

    evaluate(Watched().train(), make_task(), split)


def test_progress_counts_items(split) -> None:
    heard: list[tuple[int, int]] = []
    evaluate(models()["vit"], make_task(), split, batch_size=4, limit=9,
             progress=lambda *seen: heard.append(seen))  # fmt: skip
    assert heard == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float64])
def test_models_of_other_types_are_evaluated_in_their_own(split, own) -> None:
    model = models()["vit"]
    plain = evaluate(model, make_task(), split).columns["loss"]
    seen = evaluate(model.to(own), make_task(), split).columns["loss"]
    np.testing.assert_allclose(seen, plain, rtol=0.1 if own is torch.bfloat16 else 1e-4)


def test_autocast_leaves_the_weights_alone(split) -> None:
    model = models()["vit"]
    plain = evaluate(model, make_task(), split).columns["loss"]
    seen = evaluate(model, make_task(), split, dtype=torch.bfloat16).columns["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not (seen == plain).all()
    np.testing.assert_allclose(seen, plain, rtol=0.1, atol=0.05)
    with pytest.raises(FusewrightError, match="16 bits"):
        evaluate(model, make_task(), split, dtype=torch.float64)


def test_a_label_outside_the_classes_is_named_by_its_row(image_folder) -> None:
    data = image_folder(labels=[0, 1, -1, 2, 0, 0, 0, 0, 0, 0])
    split = open_split(DataSource(folder="vision/toy"), "test", data)
    with pytest.raises(DataError, match=r"row 2[\s\S]*0 to 2[\s\S]*-1"):
        evaluate(models()["vit"], make_task(), split)


def test_data_of_other_classes_are_refused(image_folder) -> None:
    data = image_folder(classes=("a", "b", "d"))
    split = open_split(DataSource(folder="vision/toy"), "test", data)
    with pytest.raises(DataError, match=r"other classes[\s\S]*first: d"):
        evaluate(models()["vit"], make_task(), split)


def test_a_head_of_other_classes_or_another_width_is_refused(split) -> None:
    with pytest.raises(DataError, match=r"\(3, width\)[\s\S]*\(4, 12\)"):
        make_task(head=torch.randn(4, 12))
    with pytest.raises(FusewrightError, match=r"12\)[\s\S]*\(3, 5\)"):
        evaluate(models()["vit"], make_task(head=torch.randn(3, 5)), split)


def clip_text(tokenizer):
    config = t.CLIPConfig(
        text_config=SMALL | {"intermediate_size": 8, "vocab_size": 30, "eos_token_id": 1},
        vision_config=VISION, projection_dim=12,
    )  # fmt: skip
    return t.CLIPModel(config)


@torch.no_grad()
def test_the_text_derived_head_is_the_mean_of_normalised_prompts(tokenizer) -> None:
    words = tokenizer()
    model = clip_text(words).train()
    templates = ("a {} </s>", "the {} sat </s>")
    head = clip_head(model, words, ("cat", "dog"), templates)
    assert model.training and head.shape == (2, 12) and not head.requires_grad
    model.eval()
    for row, name in zip(head, ("cat", "dog"), strict=True):
        each = []
        for template in templates:
            tokens = words(template.format(name), return_tensors="pt")
            pooled = model.text_model(tokens["input_ids"]).pooler_output
            each.append(F.normalize(model.text_projection(pooled), dim=-1)[0])
        torch.testing.assert_close(row, F.normalize(torch.stack(each).mean(0), dim=0))


def test_the_zero_shot_answer_is_clips_own(tokenizer, split) -> None:
    words = tokenizer()
    model = clip_text(words).eval()
    head = clip_head(model, words, ("cat", "dog", "mat"), ("a {} </s>",))
    task = make_task(head=head, normalise=True, scale=model.logit_scale.exp().item())
    batch = next(task.batches(split, 10))
    texts = words(["a cat </s>", "a dog </s>", "a mat </s>"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"],
                       pixel_values=batch["pixel_values"]).logits_per_image  # fmt: skip
        torch.testing.assert_close(task.logits(model, batch), theirs, rtol=1e-4, atol=1e-4)


def test_a_template_without_a_place_is_refused(tokenizer) -> None:
    with pytest.raises(FusewrightError, match="templates"):
        clip_head(clip_text(tokenizer()), tokenizer(), ("cat",), ("a photo",))

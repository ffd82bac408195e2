"""Models of timm and OpenCLIP: opened, merged, reopened by their own libraries, measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import fusewright as fw
from fusewright.bench.opening import open_model
from fusewright.bench.suite_file import Opens
from fusewright.engine.libraries import library_of
from fusewright.engine.state import read_state
from fusewright.errors import FusewrightError
from fusewright.modules import reestimate
from fusewright.tasks.heads import image_features
from tiny_clip_pool import pictures
from tiny_libraries import CLIP, PREPROCESS, TIMM, clip_folder, timm_folder

METHODS = {"task_arithmetic": {"scale": 0.5}, "ties": {}, "iso_c": {}, "lines": {}}
ZERO = {"library": "timm", "arguments": {"num_classes": 0}}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by kind: a base and two experts near it."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            make = clip_folder if kind == "clip" else lambda f, *a: timm_folder(f, kind, *a)
            base = make(folder / "base", 0)
            made[kind] = base, [make(folder / f"{n}", n, base) for n in (1, 2)]
        return made[kind]

    return of


def recipe(name):
    """The method as ``fw.merge`` takes it: LiNeS follows a merger."""
    return [{"task_arithmetic": {"scale": 1.0}}, {"lines": {}}] if name == "lines" else name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*TIMM, "clip"])
def test_a_merge_is_opened_by_its_own_library(kind, method, models, tmp_path, request):
    library = request.getfixturevalue("open_clip" if kind == "clip" else "timm")
    base, experts = models(kind)
    out = tmp_path / "out"
    fw.merge(recipe(method), base=base, experts=experts, out=out, params=METHODS[method])
    arguments = {} if kind == "clip" else {"pretrained": True}
    theirs = library.create_model(f"local-dir:{out}", **arguments).eval()
    ours = fw.load(out)
    merged = read_state(out)
    assert merged.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, merged[name]), name
        assert torch.equal(tensor, ours.state_dict()[name]), name
    moved = [n for n, t in read_state(base).items() if not torch.equal(t, merged[n])]
    assert len(moved) > len(merged) / 4


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_iso_c_sees_query_key_and_value_apart(kind, models, request):
    request.getfixturevalue("open_clip" if kind == "clip" else "timm")
    base, experts = models(kind)
    name = "blocks.0.attn.qkv.weight" if kind == "vit" else (
        "visual.transformer.resblocks.0.attn.in_proj_weight"
    )  # fmt: skip
    start = read_state(base)[name].double()
    merged = fw.merge(fw.IsoC(split=True), base=base, experts=experts, dtype="float64")
    step = merged.state_dict()[name].double() - start
    for piece in step.chunk(3):  # isotropic: every singular value of a piece is the same
        values = torch.linalg.svdvals(piece)
        assert values.max() / values.min() < 1.01
    assert torch.linalg.svdvals(step).std() > 0


@pytest.mark.parametrize("kind", TIMM)
def test_features_of_timm_are_those_its_head_sees(kind, models, timm):
    base, _ = models(kind)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        whole = timm.create_model(f"local-dir:{base}", pretrained=True).eval()
        headless = open_model(base, Opens(**ZERO))
        features = image_features(headless, pixels)
        assert features.shape == (2, whole.num_features)
        torch.testing.assert_close(features, image_features(whole, pixels))
        head = whole.get_classifier()
        torch.testing.assert_close(whole(pixels), F.linear(features, head.weight, head.bias))


def test_a_name_and_a_bare_file_open_without_a_config(models, timm, tmp_path):
    base, _ = models("vit")
    (tmp_path / "vit.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    name, arguments = TIMM["vit"]
    opens = Opens(library="timm", model=name, arguments={**arguments, "num_classes": 3})
    opened = open_model(tmp_path / "vit.safetensors", opens).state_dict()
    assert all(torch.equal(opened[k], v) for k, v in read_state(base).items())
    with pytest.raises(FusewrightError, match="nothing says which model"):
        open_model(tmp_path / "vit.safetensors", Opens(library="timm"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [({"depth": 3}, r"lacks tensors.*blocks\.2"), ({"img_size": 64}, "another shape.*pos_embed"),
     ({"colour": 1}, "cannot make the model")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments, problem, models, timm):
    base, _ = models("vit")
    with pytest.raises(FusewrightError, match=f"(?s){problem}"):
        open_model(base, Opens(library="timm", arguments=arguments))


def test_a_misspelt_name_is_answered_with_the_nearest(models, timm):
    base, _ = models("vit")
    with pytest.raises(FusewrightError, match="vit_tiny_patch16_224"):
        open_model(base, Opens(library="timm", model="vit_tiny_patch16_2244"))


def test_statistics_of_timms_resnet_are_estimated_anew(models, timm):
    base, _ = models("resnet")
    model = fw.load(base)
    batches = [torch.randn(8, 3, 32, 32) + 1 for _ in range(3)]
    found = reestimate(model, batches)
    assert "layer4.1.bn2" in found.modules and found.batches == 3
    with torch.inference_mode():
        means = [model.conv1(batch).mean(dim=(0, 2, 3)) for batch in batches]
    torch.testing.assert_close(model.bn1.running_mean, torch.stack(means).mean(0))


@pytest.fixture
def data(tmp_path):
    for number, task in enumerate(("one", "two")):
        for part, rows in (("train", 6), ("test", 9)):
            pictures(tmp_path / "data/vision" / task / f"{part}.parquet", rows, 3, number)
    return tmp_path / "data"


def suite_of(base, experts, data, folder, **keys):
    tasks = {
        name: {"kind": "image-classification", "data": f"vision/{name}",
               "classes": ["cat", "dog", "sea_lion"],
               "splits": {"validation": "train", "test": "test"}}
        for name in ("one", "two")
    }  # fmt: skip
    named = dict(zip(tasks, map(str, experts), strict=True))
    fields = {"title": "tiny", "base": str(base), "experts": named, "tasks": tasks, **keys}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return fw.suite(folder / "tiny.yaml", pool=folder / "pool", data=data)


def test_a_suite_measures_openclip_as_openclip_itself_scores(models, open_clip, data, tmp_path):
    base, experts = models("clip")
    templates = ["a photo of a {}.", "a drawing of a {}."]
    suite = suite_of(base, experts, data, tmp_path, opens={"library": "open_clip"},
                     zero_shot={"model": str(base), "templates": templates})  # fmt: skip
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{base}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{base}")
    classifier = open_clip.build_zero_shot_classifier(
        model.eval(), tokenizer, ["cat", "dog", "sea lion"],
        [lambda c, t=t: t.replace("{}", c) for t in templates],
    )  # fmt: skip
    task, split = suite.tasks["one"], suite.split("one")
    batch = next(task.batches(split, 9))
    pixels = torch.stack([preprocess(image) for image in split.rows(range(9))["image"]])
    torch.testing.assert_close(batch["pixel_values"], pixels, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        features = F.normalize(model.encode_image(pixels), dim=-1)
        expected = model.logit_scale.exp() * features @ classifier
        found = task.logits(suite.open(base), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "resnet"])
def test_a_sweep_merges_and_measures(kind, models, data, tmp_path, request):
    request.getfixturevalue("open_clip" if kind == "clip" else "timm")
    pytest.importorskip("optuna")
    base, experts = models(kind)
    if kind == "clip":
        keys = {"opens": {"library": "open_clip"}, "zero_shot": {"model": str(base)}}
    else:
        keys = {"opens": ZERO, "own_heads": "fc.weight"}
    suite = suite_of(base, experts, data, tmp_path, **keys)
    results = fw.bench(suite, ["ties"], out=tmp_path / "out", progress=False)
    assert results.facts["failed"] == {}
    (found,) = results.of("average")
    states = [suite.open(path).state_dict() for path in experts]
    module = suite.open(base)
    floats = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in floats}
    module.load_state_dict(mean, strict=False)
    for task in ("one", "two"):
        expected = suite.evaluate(module, task).columns["loss"]
        measured = found.outcomes[task]["clean"].columns["loss"]
        np.testing.assert_allclose(measured, expected, rtol=1e-3, atol=1e-4)


def test_the_folders_own_config_tells_the_library(tmp_path):
    clip = {"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}
    said = {"timm": ("config.json", {"architecture": "resnet18"}),
            "open_clip": ("open_clip_config.json", clip),
            "transformers": ("config.json", {"model_type": "vit"})}  # fmt: skip
    for library, (name, config) in said.items():
        (tmp_path / library).mkdir()
        (tmp_path / library / name).write_text(json.dumps(config))
        assert library_of(tmp_path / library) == library
    (tmp_path / "open_clip" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert library_of(tmp_path / "open_clip") == "transformers"  # it holds both: read as before

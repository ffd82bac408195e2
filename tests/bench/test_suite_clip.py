"""A suite of public CLIP checkpoints, on tiny models of the same classes in the same layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

import fusewright as fw
from fusewright.bench.suite_file import find_suite
from tiny_clip_pool import pictures, tiny_clip

transformers = pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("optuna")

TASKS = ("mnist", "eurosat")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder / "pool", TASKS)
    fields = yaml.safe_load(find_suite("clip-vit-b32").read_text("utf-8"))
    for key in ("tasks", "experts"):
        fields[key] = {name: fields[key][name] for name in TASKS}
    for number, (task, spec) in enumerate(fields["tasks"].items()):
        spec["classes"] = ["one", "two", "three_four"]
        spec["splits"] = {"validation": "train", "test": "test"}
        for part, rows in (("train", 6), ("test", 9)):
            pictures(folder / "data/vision" / task / f"{part}.parquet", rows, 3, number)
    (folder / "tiny-clip.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return fw.suite(folder / "tiny-clip.yaml", pool=folder / "pool", data=folder / "data")


def test_logits_are_those_of_clip_itself(suite):
    model = transformers.CLIPModel.from_pretrained(suite.base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(suite.base)
    task = suite.tasks["mnist"]
    batch = next(task.batches(suite.split("mnist"), 9))
    texts = [f'a photo of the number: "{name}".' for name in ("one", "two", "three four")]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(pixel_values=batch["pixel_values"], **tokens).logits_per_image
        found = task.logits(suite.open(suite.base), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_sweep_merges_the_image_encoders(suite, tmp_path):
    results = fw.bench(suite, ["ties"], out=tmp_path, progress=False, tune=2)
    assert results.facts["failed"] == {}
    (found,) = results.of("average")
    experts = [suite.open(suite.experts[task]).state_dict() for task in TASKS]
    mean = {name: (experts[0][name] + experts[1][name]) / 2 for name in experts[0]}
    module = suite.open(suite.base)
    module.load_state_dict(mean)
    for task in TASKS:
        expected = suite.evaluate(module, task).columns["loss"]
        np.testing.assert_allclose(found.outcomes[task]["clean"].columns["loss"], expected,
                                   rtol=1e-4)  # fmt: skip


def test_corrupted_pictures_are_conditions_of_their_own(suite):
    pytest.importorskip("scipy")
    pytest.importorskip("skimage")
    results = fw.bench(suite, ["average"], limit=4, corruptions=["contrast"], progress=False)
    for cell in results.cells:
        for each in cell.outcomes.values():
            assert list(each) == ["clean", "contrast"]
            losses = [each[name].columns["loss"].tolist() for name in each]
            assert losses[0] != losses[1]
    with pytest.raises(fw.FusewrightError, match="contrst"):
        fw.bench(suite, ["average"], corruptions=["contrst"], progress=False)

"""A suite of public CLIP checkpoints, on tiny models of the same classes in the same layout."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
import yaml

import fusewright as fw
from fusewright.bench.suite_file import find_suite

transformers = pytest.importorskip("transformers")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("optuna")

TASKS = ("mnist", "eurosat")


def tiny_clip(folder):
    """A CLIPModel with its tokenizer and image processor, and an image encoder for each task."""
    text = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    base = transformers.CLIPModel(config)
    base.save_pretrained(folder / "clip-vit-base-patch32")
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    at = folder / "clip-vit-base-patch32"
    (at / "vocab.json").write_text(json.dumps(vocabulary))
    (at / "merges.txt").write_text("#version: 0.2\n")
    (at / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (at / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    }))  # fmt: skip
    for number, task in enumerate(TASKS):
        expert = transformers.CLIPVisionModel.from_pretrained(at)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
        expert.save_pretrained(folder / f"clip-vit-base-patch32_{task}")


def pictures(path, rows, classes, seed):
    from PIL import Image

    random = np.random.default_rng(seed)
    images = []
    for _ in range(rows):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    labels = random.integers(0, classes, rows).tolist()
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder / "pool")
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

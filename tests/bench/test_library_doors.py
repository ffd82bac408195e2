"""What is said of a library's models before, and without, the library: a stand-in makes them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fusewright as fw
from fusewright import extras
from fusewright.bench.opening import open_model
from fusewright.bench.suite_file import Opens
from fusewright.engine import libraries
from fusewright.errors import FusewrightError, WeightsError
from fusewright.tasks.heads import clip_head, image_features

SHAPES = {"fc.weight": (3, 2), "fc.bias": (3,)}


class Toy(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(2, classes)


@pytest.fixture
def toy(monkeypatch):
    """A library that knows one model, "toy"."""
    asked = []

    def create(name, pretrained, **arguments):
        asked.append((name, pretrained))
        return Toy(**arguments)

    made = SimpleNamespace(list_models=lambda: ["toy"], create_model=create)
    monkeypatch.setattr(libraries, "imported", lambda library: made)
    return asked


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "toy"}))
    write(tmp_path)
    return tmp_path


def write(folder, prefix="", **shapes):
    tensors = {prefix + n: torch.randn(s) for n, s in (SHAPES | shapes).items() if s is not None}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_folder_whose_config_names_the_model_needs_no_name(toy, folder):
    stored = write(folder, extra=(4,))
    for module in (fw.load(folder), open_model(folder, Opens(library="timm"))):
        assert not module.training
        assert all(torch.equal(t, stored[n]) for n, t in module.state_dict().items())
    assert toy == [(f"local-dir:{folder}", False)] * 2


def test_names_of_data_parallel_training_are_understood(toy, folder):
    stored = write(folder, prefix="module.")
    assert torch.equal(fw.load(folder).fc.weight, stored["module.fc.weight"])


def test_a_missing_tensor_is_named(toy, folder):
    write(folder, **{"fc.bias": None})
    with pytest.raises(WeightsError, match=r"(?s)lacks tensors.*fc\.bias"):
        fw.load(folder)


def test_another_shape_is_named(toy, folder):
    with pytest.raises(WeightsError, match=r"(?s)another shape.*fc\.weight.*\(5, 2\).*\(3, 2\)"):
        open_model(folder, Opens(library="timm", arguments={"classes": 5}))


def test_pretrained_weights_are_never_asked_for(toy, folder):
    open_model(folder, Opens(library="timm", model="toy", arguments={"pretrained": True}))
    assert toy == [("toy", False)]


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        libraries.library_of(folder)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), r"fusewright\[timm\]"),
        (RuntimeError("operator torchvision::nms does not exist"), "pip install torchvision"),
    ],
)
def test_a_library_that_cannot_be_imported_is_answered_with_a_fix(monkeypatch, error, fix):
    def fails(module):
        raise error

    monkeypatch.setattr(extras, "import_module", fails)
    with pytest.raises(FusewrightError, match=fix):
        libraries.imported("timm")


def test_features_are_asked_below_a_head_and_of_an_image_encoder():
    class Timm(nn.Module):
        def forward_features(self, pixels):
            return pixels * 2

        def forward_head(self, maps, pre_logits=False):
            return maps.mean((2, 3)) if pre_logits else None

    class Clip(nn.Module):
        def encode_image(self, pixels):
            return pixels.sum((2, 3))

    pixels = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(image_features(Timm(), pixels), 2 * pixels.mean((2, 3)))
    torch.testing.assert_close(image_features(Clip(), pixels), pixels.sum((2, 3)))


def test_a_head_is_averaged_over_templates_by_a_text_encoder():
    class Clip(nn.Embedding):
        def encode_text(self, tokens):
            return self(tokens).mean(1)

    def tokenizer(texts):
        return torch.tensor([[len(text), ord(text[0])] for text in texts])

    torch.manual_seed(0)
    model = Clip(128, 4)
    head = clip_head(model, tokenizer, ["cat", "mouse"], ["a {}", "the {}"])
    rows = torch.stack([model.encode_text(tokenizer([f"{w} {name}" for w in ("a", "the")]))
                        for name in ("cat", "mouse")])  # fmt: skip
    expected = nn.functional.normalize(nn.functional.normalize(rows, dim=-1).mean(1), dim=-1)
    torch.testing.assert_close(head, expected)


def test_a_suite_refuses_a_library_that_is_not_known(tmp_path):
    (tmp_path / "s.yaml").write_text("title: x\nbase: b\nexperts: {a: a}\ntasks: {a: {kind: x}}\n"
                                     "opens: {library: keras}\n")  # fmt: skip
    with pytest.raises(FusewrightError, match=r"(?s)opens\.library.*transformers.*keras"):
        fw.suite(tmp_path / "s.yaml")

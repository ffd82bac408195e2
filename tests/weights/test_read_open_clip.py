"""Folders of OpenCLIP: its files are read, unless transformers' lie beside them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fusewright.weights import open_weights


@pytest.mark.parametrize("name", ["open_clip_model", "open_clip_pytorch_model"])
def test_openclips_file_alone_is_the_model(tmp_path, name):
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / f"{name}.bin")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["visual.proj"]


def test_safetensors_are_preferred_to_bin(tmp_path):
    save_file({"visual.proj": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    torch.save({"other": torch.ones(2)}, tmp_path / "open_clip_pytorch_model.bin")
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["visual.proj"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_same_model_for_transformers_is_read_as_before(tmp_path, name):
    save_file({"visual.proj": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    if name.endswith(".bin"):
        torch.save({"theirs": torch.ones(2)}, tmp_path / name)
    else:
        save_file({"theirs": torch.ones(2)}, tmp_path / name)
    with open_weights(tmp_path) as weights:
        assert list(weights) == ["theirs"]
        assert "open_clip_model.safetensors" in weights.notes[0]

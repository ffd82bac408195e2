"""Models that take their tensors from files as they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fusewright.engine.hollow import fill, hollow, mapped, zero
from fusewright.errors import WeightsError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) * self.scale


def test_a_hollow_model_has_no_parameters_in_memory_and_its_buffers() -> None:
    with hollow():
        model = Tied()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.last.weight is model.first.weight and model.scale.tolist() == [2.0] * 4
    assert not any(parameter.is_meta for parameter in Tied().parameters())


def test_a_filled_model_answers_as_the_one_that_was_saved(tmp_path: Path) -> None:
    whole = Tied()
    saved = {n: t for n, t in whole.state_dict().items() if n != "last.weight"}
    save_file(saved, tmp_path / "model.safetensors")
    with hollow():
        model = Tied()
    assert fill(model, mapped(tmp_path)) == ([], [])
    assert model.last.weight is model.first.weight
    x = torch.randn(3, 4)
    assert torch.equal(model(x), whole(x))


def test_what_is_missing_and_what_is_not_known_is_named() -> None:
    with hollow():
        model = Tied()
    assert fill(model, {"other": torch.zeros(1)}) == (["first.weight", "first.bias"], ["other"])
    zero(model, ["first.weight", "first.bias"])
    assert model.last.weight is model.first.weight
    assert model(torch.ones(1, 4)).tolist() == [[0.0] * 4]


def test_what_is_written_to_a_mapped_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    mapped(tmp_path)["a"].zero_()
    assert mapped(tmp_path)["a"].tolist() == [1.0] * 3


def test_no_weights_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        mapped(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(WeightsError, match=r"model\.safetensors[\s\S]*damaged|damaged"):
        mapped(tmp_path)

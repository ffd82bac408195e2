"""torch files give tensors, and nothing else happens."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from read_help import fetch, said, whole

from fusewright.errors import WeightsError
from fusewright.weights.torch_file import TorchFile

A = torch.arange(12.0).view(3, 4)


def saved(path: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        TorchFile(path)
    for word in (*words, path.name):
        assert word in said(caught.value)


class Malice:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.mark}'",))


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict(tmp_path: Path, zipped: bool) -> None:
    state = OrderedDict(a=A, b=A.T, c=torch.tensor(3, dtype=torch.int64))
    weights = TorchFile(saved(tmp_path / "x.pt", state, zipped))
    assert torch.equal(whole(weights, "a"), A) and torch.equal(whole(weights, "b"), A.T)
    assert whole(weights, "c").item() == 3
    assert torch.equal(fetch(weights, "b", 4, 7), A.T.reshape(-1)[4:7])
    assert any("older format" in note for note in weights.notes) is not zipped
    assert weights.identities()[0].size == (tmp_path / "x.pt").stat().st_size


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_container_is_recognised_and_noted(tmp_path: Path, key: str) -> None:
    weights = TorchFile(saved(tmp_path / "x.pt", {key: {"a": A}, "epoch": 3, "optimizer": {}}))
    assert list(weights) == ["a"]
    assert key in weights.notes[0] and "epoch, optimizer" in weights.notes[0]


def test_container_in_a_container(tmp_path: Path) -> None:
    assert list(TorchFile(saved(tmp_path / "x.pt", {"model": {"state_dict": {"a": A}}}))) == ["a"]


def test_two_containers_are_ambiguous(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", {"model": {"a": A}, "state_dict": {"a": A}}), "no state dict")


def test_tensor_named_like_a_container(tmp_path: Path) -> None:
    assert list(TorchFile(saved(tmp_path / "x.pt", {"model": A}))) == ["model"]


@pytest.mark.parametrize("value", [A, [A], {"epoch": 3}, 7])
def test_no_state_dict(tmp_path: Path, value: Any) -> None:
    refused(saved(tmp_path / "x.pt", value), "no state dict")


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", {"a": A, "epoch": 3}), "not named tensors", "'epoch': int")


def test_extra_state_is_left_out_and_noted(tmp_path: Path) -> None:
    weights = TorchFile(saved(tmp_path / "x.pt", {"a": A, "l._extra_state": None}))
    assert list(weights) == ["a"] and "l._extra_state" in weights.notes[0]


def test_tied_names_are_kept_and_known(tmp_path: Path) -> None:
    weights = TorchFile(saved(tmp_path / "x.pt", {"a": A, "b": A}))
    assert weights.tied == (("a", "b"),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_malicious_pickle_is_refused_and_does_not_run(
    tmp_path: Path, zipped: bool, deep: bool
) -> None:
    mark = tmp_path / "ran"
    evil = Malice(mark)
    value = {"a": A, "meta": {"x": [evil]}} if deep else evil
    refused(saved(tmp_path / "x.pt", value, zipped), "run code", "system", "safetensors")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Malice(mark), protocol))
    with pytest.raises(WeightsError) as caught:
        TorchFile(tmp_path / "x.bin")
    assert "code" in str(caught.value) and "weights_only" not in str(caught.value)
    assert not mark.exists()


def test_environment_cannot_allow_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "ran"
    refused(saved(tmp_path / "x.pt", {"a": A, "b": Malice(mark)}), "run code")
    assert not mark.exists()


def test_whole_module_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", torch.nn.Linear(2, 2)), "run code", "Linear")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    refused(tmp_path / "x.pt", "TorchScript")


@pytest.mark.parametrize("keep", [0, 3, 100, -100])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated(tmp_path: Path, keep: int, zipped: bool) -> None:
    path = saved(tmp_path / "x.pt", {"a": A}, zipped)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path)


def test_garbage(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(bytes(range(256)) * 10)
    refused(tmp_path / "x.pt", "without running code")

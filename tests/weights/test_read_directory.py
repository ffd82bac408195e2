"""A directory is read whole and from inside, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from read_help import said, whole
from safetensors.torch import save_file

from fusewright.errors import WeightsError
from fusewright.weights.directory import Directory
from fusewright.weights.locate import ADAPTER_STEMS

A, B = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def sharded(root: Path, weight_map: Mapping[str, object] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save_file({"a": A}, root / ONE)
    save_file({"b": B}, root / TWO)
    index = {
        "metadata": {},
        "weight_map": {"a": ONE, "b": TWO} if weight_map is None else weight_map,
    }
    (root / INDEX).write_text(json.dumps(index))
    return root


def refused(root: Path, *words: str, stems: tuple[str, ...] | None = None) -> None:
    with pytest.raises(WeightsError) as caught:
        Directory(root) if stems is None else Directory(root, stems=stems)
    for word in words:
        assert word in said(caught.value)


def test_one_file_with_its_config(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    with Directory(tmp_path) as weights:
        assert weights.config == {"model_type": "x"} and weights.root == tmp_path
        assert weights.metadata == {"format": "pt"}
        assert torch.equal(whole(weights, "a"), A) and torch.equal(whole(weights, "b"), B)
        assert len(weights.identities()) == 1


def test_shards_with_their_index(tmp_path: Path) -> None:
    with Directory(sharded(tmp_path)) as weights:
        assert torch.equal(whole(weights, "a"), A) and torch.equal(whole(weights, "b"), B)
        assert weights.shards == {ONE: ("a",), TWO: ("b",)}
        assert [one.path.name for one in weights.identities()] == [ONE, TWO]
        assert weights.config == {}


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
     "model.fp16.safetensors"],
)  # fmt: skip
def test_other_known_names(tmp_path: Path, name: str) -> None:
    save_file({"a": A}, tmp_path / name)
    assert list(Directory(tmp_path)) == ["a"]


def test_diffusers_index_of_a_variant(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "diffusion_pytorch_model-00001-of-00001.fp16.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"}})
    )
    assert list(Directory(tmp_path)) == ["a"]


def test_adapter_weights_only_when_asked(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    assert list(Directory(tmp_path, stems=ADAPTER_STEMS)) == ["a"]
    refused(tmp_path, "no weights under a known name", "adapter_model.safetensors")


def test_bin_is_read_when_there_is_nothing_else(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    assert torch.equal(whole(Directory(tmp_path), "a"), A)


def test_sharded_bin(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": B}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(whole(Directory(tmp_path), "b"), B)


def test_safetensors_is_preferred_and_the_rest_is_noted(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "training_args.bin").write_bytes(b"never opened")
    weights = Directory(tmp_path)
    assert torch.equal(whole(weights, "a"), A)
    assert "pytorch_model.bin" in weights.notes[0] and "training_args.bin" in weights.notes[0]


# --- ambiguous or missing -------------------------------------------------------------------


def test_single_file_and_index(tmp_path: Path) -> None:
    save_file({"a": A}, sharded(tmp_path) / "model.safetensors")
    refused(tmp_path, "more than one set", "model.safetensors", INDEX, "mv ")


def test_two_variants(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.fp16.safetensors")
    save_file({"a": A}, tmp_path / "model.bf16.safetensors")
    refused(tmp_path, "more than one set")


def test_nothing(tmp_path: Path) -> None:
    refused(tmp_path, "no weights in the directory")


def test_shards_without_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    refused(tmp_path, "shards without their index", ONE)


def test_diffusers_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    refused(tmp_path, "pipeline", "unet")


# --- paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "..", "", "C:x",
             "a\\..\\x", "x\0y"],
)  # fmt: skip
def test_index_that_names_a_path_outside(tmp_path: Path, name: str) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    refused(sharded(tmp_path / "m", {"a": name}), "leaves its directory", INDEX)


def test_absolute_path_of_a_file_inside(tmp_path: Path) -> None:
    refused(sharded(tmp_path, {"a": str(tmp_path / ONE), "b": TWO}), "leaves its directory")


@pytest.mark.parametrize("name", [ONE, INDEX, "config.json"])
def test_symlink_that_leads_outside(tmp_path: Path, name: str) -> None:
    root = sharded(tmp_path / "m")
    (root / "config.json").write_text("{}")
    (root / name).rename(tmp_path / name)
    (root / name).symlink_to(tmp_path / name)
    refused(root, "symbolic link", name)


def test_symlinked_folder_that_leads_outside(tmp_path: Path) -> None:
    sharded(tmp_path / "other")
    root = sharded(tmp_path / "m", {"a": f"sub/{ONE}", "b": TWO})
    (root / "sub").symlink_to(tmp_path / "other")
    refused(root, "symbolic link")


def test_symlink_that_stays_inside(tmp_path: Path) -> None:
    root = sharded(tmp_path)
    (root / ONE).rename(root / "real")
    (root / ONE).symlink_to("real")
    assert torch.equal(whole(Directory(root), "a"), A)


def test_root_may_itself_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sharded(tmp_path / "m"))
    assert len(Directory(tmp_path / "link")) == 2


def into_cache(tmp_path: Path, name: str, target: str) -> Path:
    """A Hub cache's snapshot in which ``name`` links to ``target``."""
    root = sharded(tmp_path / "models--org--m" / "snapshots" / "0123abcd")
    blobs = tmp_path / "models--org--m" / "blobs"
    blobs.mkdir()
    (root / name).rename(blobs / "beef")
    (root / name).symlink_to(target)
    return root


def test_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    root = into_cache(tmp_path, ONE, "../../blobs/beef")
    assert torch.equal(whole(Directory(root), "a"), A)


def test_hub_cache_may_not_link_beyond_its_blobs(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "secret")
    refused(into_cache(tmp_path, ONE, "../../../secret"), "symbolic link")


def test_hub_cache_may_not_link_beside_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "models--org--m" / "refs").mkdir(parents=True)
    save_file({"a": A}, tmp_path / "models--org--m" / "refs" / "main")
    refused(into_cache(tmp_path, ONE, "../../refs/main"), "symbolic link")


def test_hub_cache_may_not_link_to_another_models_blobs(tmp_path: Path) -> None:
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"a": A}, other / "beef")
    root = into_cache(tmp_path, ONE, "../../../models--org--other/blobs/beef")
    refused(root, "symbolic link")


# --- shards that disagree -------------------------------------------------------------------


def test_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / TWO).unlink()
    refused(tmp_path, "missing", TWO, INDEX)


def test_index_names_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    refused(sharded(tmp_path, {"a": ONE, "b": TWO, "c": TWO}), "disagree", ": c", "in no shard")


def test_index_names_the_wrong_shard(tmp_path: Path) -> None:
    refused(sharded(tmp_path, {"a": TWO, "b": TWO}), "disagree", "in no shard")
    refused(sharded(tmp_path, {"a": TWO, "b": ONE}), "disagree", f"in {ONE}")


def test_shard_holds_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    save_file({"b": B, "c": A}, sharded(tmp_path) / TWO)
    refused(tmp_path, "does not name", ": c", TWO)


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"b": B, "a": A}, sharded(tmp_path) / TWO)
    refused(tmp_path, "two shards", ONE, TWO, ": a")


def test_truncated_shard_names_the_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path) / TWO
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "truncated", TWO)


@pytest.mark.parametrize("weight_map", [[], {"a": 1}, {"a": None}, {}])
def test_index_without_a_usable_weight_map(tmp_path: Path, weight_map: object) -> None:
    root = sharded(tmp_path)
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(root, "weight_map", INDEX)


def test_index_with_a_duplicate_key(tmp_path: Path) -> None:
    root = sharded(tmp_path)
    (root / INDEX).write_text(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}')
    refused(root, "twice", INDEX)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"a": }', b""])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_bad_json(tmp_path: Path, name: str, text: bytes) -> None:
    (sharded(tmp_path) / name).write_bytes(text)
    refused(tmp_path, name)

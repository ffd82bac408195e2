"""One door: paths, Hub ids from the cache, and what is neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from read_help import said, whole
from safetensors.torch import save_file

from fusewright.errors import WeightsError
from fusewright.weights import hub, open_weights
from fusewright.weights.directory import Directory
from fusewright.weights.safetensors_file import SafetensorsFile
from fusewright.weights.torch_file import TorchFile

A = torch.arange(6.0).view(2, 3)
PATHS = ":".join(path for path in sys.path if path)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1, which is read when the client is imported."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def cache(root: Path, repo: str = "org/model", ref: str = "main") -> Path:
    """A Hub cache with one snapshot, laid out as the client does."""
    folder = root / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs" / ref).parent.mkdir(parents=True)
    (folder / "refs" / ref).write_text(COMMIT)
    save_file({"a": A}, folder / "blobs" / "aaaa")
    (folder / "blobs" / "bbbb").write_text('{"model_type": "x"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/aaaa")
    (snapshot / "config.json").symlink_to("../../blobs/bbbb")
    return root


def refused(*words: str, ref: Any, **kwargs: Any) -> None:
    with pytest.raises(WeightsError) as caught:
        open_weights(ref, **kwargs)
    for word in words:
        assert word in said(caught.value)


@pytest.mark.parametrize("as_text", [True, False])
def test_each_kind_of_path(tmp_path: Path, as_text: bool) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    torch.save({"a": A}, tmp_path / "x.pt")
    kinds = {tmp_path: Directory, tmp_path / "model.safetensors": SafetensorsFile,
             tmp_path / "x.pt": TorchFile}  # fmt: skip
    for path, kind in kinds.items():
        weights = open_weights(str(path) if as_text else path)
        assert isinstance(weights, kind) and weights.label == str(path)
        assert torch.equal(whole(weights, "a"), A)


@pytest.mark.parametrize("ref", ["org/model", "org/model@main", f"org/model@{COMMIT}"])
def test_hub_id_from_the_cache(tmp_path: Path, ref: str) -> None:
    weights = open_weights(ref, cache_dir=cache(tmp_path))
    assert torch.equal(whole(weights, "a"), A)
    assert weights.label == ref and weights.config == {"model_type": "x"}
    assert weights.root is not None and weights.root.name == COMMIT


def test_revision_as_an_argument(tmp_path: Path) -> None:
    cache(tmp_path, ref="v1")
    assert len(open_weights("org/model", revision="v1", cache_dir=tmp_path)) == 1
    assert len(open_weights("org/model@v1", revision="v1", cache_dir=tmp_path)) == 1


def test_cache_of_the_environment(tmp_path: Path) -> None:
    cache(tmp_path)
    code = "from fusewright.weights import open_weights; print(list(open_weights('org/model')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": PATHS},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "['a']", done.stderr


def test_adapter_from_the_cache_needs_its_base(tmp_path: Path) -> None:
    cache(tmp_path)
    snapshot = tmp_path / "models--org--model" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").rename(snapshot / "adapter_model.safetensors")
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused("needs its base", ref="org/model", cache_dir=tmp_path)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    refused("hf download org/other", "org/other", ref="org/other", cache_dir=tmp_path)
    refused("hf download org/model --revision v9", ref="org/model@v9", cache_dir=cache(tmp_path))


def test_snapshot_without_its_weights(tmp_path: Path) -> None:
    cache(tmp_path)
    (tmp_path / "models--org--model" / "snapshots" / COMMIT / "model.safetensors").unlink()
    refused("no weights in the directory", "hf download", ref="org/model", cache_dir=tmp_path)


def test_blob_that_is_gone(tmp_path: Path) -> None:
    cache(tmp_path)
    (tmp_path / "models--org--model" / "blobs" / "aaaa").unlink()
    refused("cannot open", "model.safetensors", ref="org/model", cache_dir=tmp_path)


def test_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path / "hub")
    (tmp_path / "org" / "model").mkdir(parents=True)
    save_file({"local": A}, tmp_path / "org" / "model" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert list(open_weights("org/model", cache_dir=tmp_path / "hub")) == ["local"]


def test_revision_of_a_local_path(tmp_path: Path) -> None:
    refused("no revision", ref=tmp_path, revision="main")


def test_two_revisions() -> None:
    refused("two revisions", "v1", "v2", ref="org/model@v1", revision="v2")


@pytest.mark.parametrize(
    "ref", ["./none", "/none", "a/b/c", "~/none", "org/../x", "", "org/m@", "..."]
)
def test_neither_a_path_nor_a_hub_id(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError):
        open_weights(ref, cache_dir=tmp_path)


def test_path_object_is_never_a_hub_id() -> None:
    refused("no such file", ref=Path("org/model"))


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused("not a kind of weights", ".gguf", ref=tmp_path / "x.gguf")


def test_only_what_is_needed_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """safetensors where there is any; never code, never both kinds."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, Any]] = []

    def download(repo: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(tmp_path)

    files = ["model.safetensors", "pytorch_model.bin", "config.json", "modeling.py",
             "tokenizer.json", "chat_template.jinja", "onnx/model.onnx", "onnx/config.json",
             "vocab.txt", "spm.model", "training_args.bin", "README.md"]  # fmt: skip
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("org/model@v1") == tmp_path
    kept = filter_repo_objects(
        files,
        allow_patterns=asked[0]["allow_patterns"],
        ignore_patterns=asked[0]["ignore_patterns"],
    )
    assert set(kept) == {"model.safetensors", "config.json", "tokenizer.json", "README.md",
                         "chat_template.jinja", "vocab.txt", "spm.model"}  # fmt: skip
    assert asked[0]["revision"] == "v1"
    files.remove("model.safetensors")
    hub.fetch("org/model")
    assert "pytorch_model*.bin" in asked[1]["allow_patterns"]


def test_the_hubs_no_is_final(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A gated or vanished model is not answered from the cache as if nothing had happened."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def no(*_: Any, **__: Any) -> list[str]:
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no)
    refused("RevisionNotFoundError", ref="org/model", cache_dir=cache(tmp_path))


def test_importing_the_room_imports_neither_torch_nor_the_hubs_client() -> None:
    code = "import sys, fusewright.weights; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": PATHS},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()", done.stderr

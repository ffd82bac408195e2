"""One door to every kind of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WeightsError
from .adapter import AdapterWeights
from .directory import Directory
from .hub import fetch
from .memory import MemoryWeights
from .quantised import dequantised
from .safetensors_file import SafetensorsFile
from .spec import Weights
from .torch_file import TorchFile

if TYPE_CHECKING:
    import torch

_TORCH = (".bin", ".pt", ".pth", ".ckpt")


def open_weights(
    ref: str | Path | torch.nn.Module | Mapping[str, torch.Tensor] | Weights,
    *,
    base: Weights | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Weights:
    """Open a safetensors or torch file, a Hugging Face directory, a Hub id (``org/name@revision``),
    a LoRA adapter's directory or Hub id (over ``base``), a module, or a state dict.

    A path that exists wins over a Hub id. Weights pass through unchanged. Quantised checkpoints
    are dequantised or refused. Raises WeightsError.
    """
    if isinstance(ref, Weights):
        return ref
    if not isinstance(ref, str | Path):
        return dequantised(MemoryWeights(_in_memory(ref)))
    weights = _open_path(found_path(ref, revision, cache_dir), str(ref), base)
    try:
        return dequantised(weights)
    except BaseException:
        weights.close()
        raise


def found_path(
    ref: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The path that exists, or where a copy of what a Hub id names lies. Raises WeightsError."""
    path = Path(ref).expanduser()
    if not path.exists():
        return _from_hub(ref, revision, cache_dir)
    if revision is not None:
        raise WeightsError(
            "a local path has no revision", where=path, found=f"revision {revision}",
            fix="drop the revision, or write the Hub id so that no path has its name",
        )  # fmt: skip
    return path


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter. Raises WeightsError if it also holds a model."""
    if not (path / "adapter_config.json").exists():
        return False
    adapter = list(path.glob("adapter_model.*"))
    models = [
        p.name
        for stem in ("model", "pytorch_model", "open_clip_")
        for p in path.glob(f"{stem}*")
        if p.suffix in (".safetensors", ".bin") or p.name.endswith(".index.json")
    ]
    if adapter and models:
        raise WeightsError(
            "the directory holds both a model and an adapter", where=path,
            expected="one of them", found=f"{adapter[0].name}, {models[0]}",
            fix=f"mkdir '{path}-adapter' && mv '{path}'/adapter_* '{path}-adapter/'",
        )  # fmt: skip
    return bool(adapter) or not models


def _open_path(path: Path, label: str, base: Weights | None) -> Weights:
    if path.is_dir():
        return _adapter(path, label, base) if is_adapter(path) else Directory(path, label)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, label)
    if path.suffix in _TORCH:
        return TorchFile(path, label)
    raise WeightsError(
        "not a kind of weights that can be read", where=path,
        expected=f"a directory, .safetensors, {', '.join(_TORCH)}",
        found=path.suffix or "no suffix", fix="give the directory that holds the file",
    )  # fmt: skip


def _adapter(path: Path, label: str, base: Weights | None) -> Weights:
    if base is not None:
        return AdapterWeights(base, path, label)
    from .directory import read_config

    declared = read_config(path, "adapter_config.json").get("base_model_name_or_path")
    raise WeightsError(
        "an adapter needs its base", where=label, expected="base=",
        found=f"none (the adapter declares {declared})",
        fix=f"open_weights({label!r}, base=open_weights({declared!r}))",
    )  # fmt: skip


def _from_hub(ref: str | Path, revision: str | None, cache_dir: str | Path | None) -> Path:
    if isinstance(ref, Path):
        raise WeightsError("no such file or directory", where=ref, fix=f"ls '{ref.parent}'")
    return fetch(ref, revision, cache_dir)


def _in_memory(ref: object) -> torch.nn.Module | Mapping[str, torch.Tensor]:
    if isinstance(ref, Mapping):
        return ref
    import torch

    if isinstance(ref, torch.nn.Module):
        return ref
    raise WeightsError(
        "cannot open this as weights", where=type(ref).__name__,
        expected="a path, a Hub id, a torch.nn.Module or a state dict",
    )  # fmt: skip

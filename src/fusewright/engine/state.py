"""Merged models as torch sees them: state dicts, modules, and weights to save again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.weights import open_weights
from fusewright.weights.memory import MemoryWeights


class MergedWeights(MemoryWeights):
    """Tensors in memory that know the folder (or module) whose architecture they fill."""

    def __init__(self, tensors: Mapping[str, Tensor], source: Any) -> None:
        super().__init__(tensors, label="merged in memory")
        if isinstance(source, str | Path) and Path(source).is_dir():
            self.root = Path(source)
            path = self.root / "config.json"
            self.config = json.loads(path.read_text()) if path.is_file() else {}
        elif isinstance(source, nn.Module):
            self.config = MemoryWeights(source).config


def read_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in its storage dtype."""
    found = {}
    with open_weights(path) as weights:
        for name, info in weights.items():
            flat = torch.empty(info.numel, dtype=info.dtype.torch)
            if info.numel:
                weights.read(name, 0, info.numel, flat.view(torch.uint8).numpy().data)
            found[name] = flat.reshape(info.shape)
    return found


def load_module(path: Path) -> nn.Module:
    """The folder's model, of the class its config names, by transformers."""
    try:
        import transformers
    except ImportError as error:
        raise PlanError("transformers is needed to make a module of a folder",
                        fix="pip install 'fusewright[transformers]'") from error  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    names = config.get("architectures") or []
    known = [n for n in names if hasattr(transformers, n)]
    cls: Any = getattr(transformers, known[0]) if known else transformers.AutoModel
    module: nn.Module = cls.from_pretrained(path)
    return module


def load(path: str | Path) -> nn.Module:
    """Open a merged folder as a module."""
    return load_module(Path(path))

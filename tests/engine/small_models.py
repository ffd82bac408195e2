"""Checkpoints of a few tensors, of every shape that the engine treats apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fusewright as fw

Tensors = dict[str, torch.Tensor]

WIDE = (300, 1000)
"""More than one chunk of 4 · 65,536 elements, and no multiple of a block."""

SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (50, 32),
    "layers.0.mlp.weight": WIDE,
    "layers.1.mlp.weight": (64, 96),
    "layers.1.norm.weight": (64,),
    "layers.2.attn.weight": (4097,),
    "layers.2.scale": (),
    "layers.2.empty": (0, 8),
}

# Every method whose bytes may depend on how the work is cut.
METHODS: dict[str, Any] = {
    "linear": fw.Linear(weight={"a": 0.7, "b": 0.3}),
    "task_arithmetic": fw.TaskArithmetic(scale=0.4),
    "slerp": fw.Slerp(t=0.3),
    "ties": fw.Ties(density=0.3),
    "ties per tensor": fw.Ties(density=0.3, scope="tensor"),
    "dare_linear": fw.DareLinear(density=0.4),
    "metagpt": fw.MetaGPT(),
    "model_stock": fw.ModelStock(),
    "lines": fw.Drop(density=0.5) >> fw.Elect() >> fw.LiNeS(),
    "iso_c": fw.IsoC(),
}


def base(dtype: torch.dtype = torch.bfloat16, shapes: Any = None) -> Tensors:
    draws = torch.Generator().manual_seed(0)
    shapes = SHAPES if shapes is None else shapes
    return {n: torch.randn(s, generator=draws).to(dtype) for n, s in shapes.items()}


def expert(of: Tensors, seed: int, size: float = 0.1) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    return {
        n: (t.float() + size * torch.randn(t.shape, generator=draws)).to(t.dtype)
        if t.is_floating_point() else t.clone()
        for n, t in of.items()
    }  # fmt: skip


def models(dtype: torch.dtype = torch.bfloat16, shapes: Any = None) -> tuple[Tensors, Any]:
    origin = base(dtype, shapes)
    return origin, {"a": expert(origin, 1), "b": expert(origin, 2)}


def saved(tensors: Tensors, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "toy", "num_hidden_layers": 3}')
    return folder


def on_disk(folder: Path, dtype: torch.dtype = torch.bfloat16, shapes: Any = None) -> Any:
    """Keywords for ``fw.merge``: a base and two experts in folders."""
    origin, experts = models(dtype, shapes)
    return {
        "base": saved(origin, folder / "base"),
        "experts": {n: saved(t, folder / n) for n, t in experts.items()},
    }


def read(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: Tensors, two: Tensors) -> bool:
    """Whether both have the same tensors, bit by bit."""
    return set(one) == set(two) and all(bits_equal(one[n], two[n]) for n in one)


def bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(*raw)


def entries(folder: Path) -> set[str]:
    """What lies in a folder, locks aside: a refused merge must leave it as it was."""
    return {p.name for p in folder.iterdir() if not p.name.endswith(".lock")}

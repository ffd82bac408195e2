"""Models for benchmarks: Llama-shaped checkpoints of random weights in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"hidden": 2048, "inner": 5632, "layers": 22, "vocab": 32_000, "kv": 256}


def llama_tensors(layers: int = SHAPES["layers"]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of 1.1B parameters (22 layers)."""
    h, inner, kv = SHAPES["hidden"], SHAPES["inner"], SHAPES["kv"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (SHAPES["vocab"], h)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {
            at + "input_layernorm.weight": (h,),
            at + "mlp.down_proj.weight": (h, inner),
            at + "mlp.gate_proj.weight": (inner, h),
            at + "mlp.up_proj.weight": (inner, h),
            at + "post_attention_layernorm.weight": (h,),
            at + "self_attn.k_proj.weight": (kv, h),
            at + "self_attn.o_proj.weight": (h, h),
            at + "self_attn.q_proj.weight": (h, h),
            at + "self_attn.v_proj.weight": (kv, h),
        }
    return found | {"model.norm.weight": (h,), "lm_head.weight": (SHAPES["vocab"], h)}


def write_config(folder: Path, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": SHAPES["hidden"], "intermediate_size": SHAPES["inner"],
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": SHAPES["vocab"], "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_pool(
    folder: Path, experts: int = 3, layers: int = SHAPES["layers"]
) -> tuple[Path, list[Path]]:
    """A base and experts a small random step away from it, two shards each; made once."""
    pool = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    base = _write(folder / "base", pool, 0, layers)
    return base, [_write(folder / f"expert{i}", pool, i + 1, layers) for i in range(experts)]


def _write(folder: Path, pool: torch.Tensor, index: int, layers: int) -> Path:
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = list(llama_tensors(layers).items())
    half, weight_map = len(names) // 2, {}
    for shard, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{shard:05d}-of-00002.safetensors"
        save_file({n: _tensor(pool, n, s, index) for n, s in part}, folder / file, {"format": "pt"})
        weight_map |= {n: file for n, _ in part}
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    write_config(folder, layers)
    return folder


def _tensor(pool: torch.Tensor, name: str, shape: tuple[int, ...], index: int) -> torch.Tensor:
    size = int(torch.Size(shape).numel())
    repeats = -(-size // pool.numel()) + 1
    start = sum(name.encode()) * 977 % pool.numel()
    base = pool.repeat(repeats)[start : start + size] * 0.02
    if index:
        start = (start + index * 7_654_321) % pool.numel()
        base = base + pool.repeat(repeats)[start : start + size] * 0.002
    return base.to(torch.bfloat16).reshape(shape)

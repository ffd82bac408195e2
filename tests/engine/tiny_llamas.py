"""Real transformers models, small enough to be made anew for every test."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def tuned(model: PreTrainedModel, seed: int, size: float = 0.05) -> Any:
    """The model with noise of ``size`` times each tensor's own root mean square."""
    other, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * p.square().mean().sqrt() * torch.randn(p.shape, generator=draws).to(p)
    return other


def saved(model: PreTrainedModel, path: Path, card: str = "apache-2.0") -> Path:
    model.save_pretrained(path)
    (path / "README.md").write_text(f"---\nlicense: {card}\n---\n")
    return path


def lora(base: Path, path: Path, *, declared: str | None = None, seed: int = 0) -> Path:
    """A LoRA adapter on q_proj by peft, with B not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    adapted.save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = declared or str(base)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path

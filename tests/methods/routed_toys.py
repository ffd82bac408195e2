"""Tiny models of every kind for routed methods, their inputs, and what they answer elsewhere."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusewright as fw

hf = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = {"bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 0}
TEXT = {**TINY, "intermediate_size": 32, "vocab_size": 50, **_IDS}
PIXELS = torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8) ** 2
IDS = torch.arange(1, 25).reshape(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
WORDS = {"input_ids": IDS, "attention_mask": MASK}


def clip():
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(
        **TINY, intermediate_size=32, image_size=8, patch_size=4, projection_dim=8))  # fmt: skip


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(
        **TINY, intermediate_size=32, image_size=8, patch_size=4, num_labels=4))  # fmt: skip


def resnet():
    return hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], num_labels=4,
        layer_type="basic"))  # fmt: skip


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=4))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, **_IDS))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50,
        decoder_start_token_id=0))  # fmt: skip


INPUTS = {
    clip: {"pixel_values": PIXELS}, vit: {"pixel_values": PIXELS},
    resnet: {"pixel_values": PIXELS},
    bert: WORDS, gpt2: WORDS, llama: WORDS,
    t5: {**WORDS, "decoder_input_ids": IDS[:, :4], "decoder_attention_mask": MASK[:, 2:6]},
}  # fmt: skip
MODELS = pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)


def base_of(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def expert_of(base: nn.Module, seed: int) -> nn.Module:
    """The base with every parameter and running statistic moved."""
    draw, expert = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            parameter.add_(0.3 * max(0.05, float(parameter.float().std().nan_to_num())) * noise)
        for name, buffer in expert.named_buffers():
            if "running" in name:
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=draw))
    return expert


def experts_of(base: nn.Module) -> dict[str, nn.Module]:
    return {name: expert_of(base, seed) for seed, name in enumerate(("a", "b"), 1)}


def answer(model: nn.Module, make, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**INPUTS[make], **changes})[0]


def built(method, make, **options):
    base = base_of(make)
    return fw.merge(method, base=base, experts=experts_of(base), **options)


def said(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of each input: of texts those of the last token."""
    found = model(**batch)[0]
    return found if found.dim() == 2 else found[:, -1]


def loud(model: nn.Module, seed: int = 7) -> nn.Module:
    """Routers that tell inputs apart plainly."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.get_submodule("routing").parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)
    return model


def images(count: int = 12) -> dict[str, list]:
    draw = torch.Generator().manual_seed(3)
    return {name: [{"pixel_values": torch.randn(6, 3, 8, 8, generator=draw)}
                   for _ in range(count)] for name in ("a", "b")}  # fmt: skip


def sides(make, count: int = 8) -> dict[str, list]:
    """Inputs of which a task's are told from the other's: bright and dark, low and high words."""
    draw, found = torch.Generator().manual_seed(3), {}
    for at, name in enumerate(("a", "b")):
        def ids(tokens: int, at: int = at) -> torch.Tensor:
            return torch.randint(1 + 24 * at, 7 + 24 * at, (6, tokens), generator=draw)

        def batch(at: int = at, ids=ids) -> dict[str, torch.Tensor]:
            if "pixel_values" in INPUTS[make]:
                noise = torch.randn(6, 3, 8, 8, generator=draw)
                return {"pixel_values": noise / 4 + 2 * at - 1}
            mask = torch.ones(6, 8, dtype=torch.long)
            mask[:, 6:] = 0
            more = {"decoder_input_ids": ids(4)} if make is t5 else {}
            return {"input_ids": ids(8), "attention_mask": mask, **more}

        found[name] = [batch() for _ in range(count)]
    return found


class Sum(nn.Module):
    """One linear map of 16 numbers to 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.mlp(inputs)


def leaning() -> dict[str, Any]:
    """Models and data of which entropy is least where expert "a" is added without end: it leans to
    class 0, and "b" changes nothing. Inputs tell their class (0 most often) and their task, and
    have much in common, so that a fast router learns to answer all of them with "a"."""
    base = Sum().eval()
    with torch.no_grad():
        base.mlp.weight.copy_(torch.eye(16)[:4])
        base.mlp.bias.zero_()
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    with torch.no_grad():
        experts["a"].mlp.weight[0, 15] += 2
    draw = torch.Generator().manual_seed(0)
    classes = {"a": [0] * 6 + [1, 1, 1, 2, 2, 2], "b": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]}
    data: dict[str, list[torch.Tensor]] = {}
    for name, size, side in (("a", 3.0, 3.0), ("b", 2.0, -3.0)):
        batches = torch.ones(4, 12, 16)
        batches[..., :4] = size * torch.eye(4)[torch.tensor(classes[name])]
        batches[..., :4] += 0.1 * torch.randn(4, 12, 4, generator=draw)
        batches[..., 4] = side
        data[name] = list(batches)
    return {"base": base, "experts": experts, "data": data}


def saved(made: Any, make, folder: Path, name: str = "out") -> Path:
    """The folder of a routed model that was built of modules in memory."""
    base_of(make).save_pretrained(folder / f"base-{make.__name__}")
    made.source = folder / f"base-{make.__name__}"
    made.save(folder / name)
    return folder / name


_ELSEWHERE = """
import sys, torch, fusewright as fw
found = []
for folder, inputs, told in torch.load(sys.argv[1]):
    model = fw.load(folder)
    for name, value in told.items():
        getattr(model, name)(value)
    with torch.no_grad():
        found.append(model(**inputs)[0])
torch.save(found, sys.argv[1])
"""


def elsewhere(
    scratch: Path, asked: Sequence[tuple[Path, dict[str, torch.Tensor], dict[str, Any]]]
) -> list[torch.Tensor]:
    """What saved models answer in a fresh process to (folder, inputs, {method of the model: what it
    is called with before})."""
    at = scratch / "asked.pt"
    torch.save([(str(folder), inputs, told) for folder, inputs, told in asked], at)
    command = [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(at)]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(at)

"""The tiny CLIP pool and the pictures that against_fusionbench.py merges and measures."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionModel

from fusewright.bench.suite_file import find_suite
from fusewright.tasks import ImagePreparation

TASKS = ("mnist", "eurosat", "rendered-sst2")
OPTIONAL = ["text_model.*", "text_projection.*", "visual_projection.*", "logit_scale"]
BASE = "clip-vit-base-patch32"
SIZE, STORED = 16, (24, 20)  # pictures are stored larger, so that resizing and cropping count
ITEMS = {"train": 400, "test": 300}
BASE_STEPS, EXPERT_STEPS, BATCH = 150, 100, 64

Words = dict[str, tuple[list[str], list[str]]]
"""Of each task, its class names and its templates with {} for the class."""


def make_data(folder: Path, words: Words) -> None:
    """Pictures: a pattern for each class, in noise."""
    for number, task in enumerate(TASKS):
        random = np.random.default_rng(number)
        patterns = random.integers(40, 216, (len(words[task][0]), *STORED, 3))
        for part, items in ITEMS.items():
            labels = random.integers(0, len(patterns), items)
            noise = random.normal(0, 60, (items, *STORED, 3))
            pixels = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
            path = folder / "vision" / task / f"{part}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            images = [{"bytes": _png(p), "path": None} for p in pixels]
            pq.write_table(pa.table({"image": images, "label": labels.tolist()}), path)


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_pool(folder: Path, data: Path, words: Words) -> None:
    """A base, both towers trained a little on every task, and from it an expert for each, its image
    tower trained on."""
    torch.manual_seed(0)
    text = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 77,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 24, "intermediate_size": 32,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    at = folder / BASE
    _write_processor(at)
    tokenizer = AutoTokenizer.from_pretrained(at)
    seen = {task: _read(data / "vision" / task / "train.parquet") for task in TASKS}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    _train(clip, clip.vision_model, seen, words, tokenizer, BASE_STEPS)
    clip.save_pretrained(at)
    clip.requires_grad_(False)
    for task in TASKS:
        expert = CLIPVisionModel.from_pretrained(at)
        _train(clip, expert, {task: seen[task]}, words, tokenizer, EXPERT_STEPS)
        expert.save_pretrained(folder / f"{BASE}_{task}")


def _train(clip: Any, vision: nn.Module, seen: dict[str, Any], words: Words, tokenizer: Any,
           steps: int) -> None:  # fmt: skip
    parameters = [p for p in {*clip.parameters(), *vision.parameters()} if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        task = list(seen)[step % len(seen)]
        pixels, labels = seen[task]
        chosen = torch.randint(len(labels), (BATCH,), generator=draw)
        features = clip.visual_projection(vision(pixel_values=pixels[chosen]).pooler_output)
        logits = normalize(features, dim=1) @ _head(clip, tokenizer, *words[task]).T
        loss = nn.functional.cross_entropy(clip.logit_scale.exp() * logits, labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _head(clip: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    texts = [templates[0].format(name) for name in names]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=1)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    table = pq.read_table(path).to_pydict()
    prepare = ImagePreparation(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    pictures = [Image.open(io.BytesIO(i["bytes"])).resize((SIZE, SIZE)) for i in table["image"]]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    mean, std = torch.tensor(prepare.mean), torch.tensor(prepare.std)
    scaled = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    return scaled, torch.tensor(table["label"])


def _write_processor(at: Path) -> None:
    """A tokenizer of single letters and an image processor, as CLIP's folders have them."""
    at.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (at / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (at / "merges.txt").write_text("#version: 0.2\n")
    (at / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    (at / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True, "do_resize": True, "do_normalize": True, "do_rescale": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }))  # fmt: skip


def write_suite(folder: Path, words: Words) -> None:
    """The shipped suite of CLIP ViT-B/32 with these tasks in place of its own."""
    fields = yaml.safe_load(find_suite("clip-vit-b32").read_text("utf-8"))
    fields["experts"] = {task: f"tanganke/{BASE}_{task}" for task in TASKS}
    fields["tasks"] = {
        task: {
            "kind": "image-classification", "data": f"vision/{task}", "classes": classes,
            "splits": {"validation": "train", "test": "test"},
            "options": {"templates": templates},
        }
        for task, (classes, templates) in words.items()
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))

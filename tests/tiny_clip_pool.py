"""A pool of tiny CLIP models and pictures, in the layout of the public ones."""

from __future__ import annotations

import io
import json

import numpy as np
import torch


def tiny_clip(folder, tasks):
    """A CLIPModel with its tokenizer and image processor, and an image encoder for each task."""
    import transformers

    text = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    base = transformers.CLIPModel(config)
    base.save_pretrained(folder / "clip-vit-base-patch32")
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    at = folder / "clip-vit-base-patch32"
    (at / "vocab.json").write_text(json.dumps(vocabulary))
    (at / "merges.txt").write_text("#version: 0.2\n")
    (at / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (at / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
    }))  # fmt: skip
    for number, task in enumerate(tasks):
        expert = transformers.CLIPVisionModel.from_pretrained(at)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
        expert.save_pretrained(folder / f"clip-vit-base-patch32_{task}")


def pictures(path, rows, classes, seed, names=("image", "label")):
    """A data set of noise; two classes are labelled false and true, as PatchCamelyon's are."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(seed)
    images = []
    for _ in range(rows):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = random.integers(0, classes, rows).tolist()
    labels = [label > 0 for label in labels] if classes == 2 else labels
    pq.write_table(pa.table(dict(zip(names, (images, labels), strict=True))), path)

"""Tiny random models of timm and OpenCLIP, saved as their own libraries lay them out."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

TIMM = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8,
                                     "img_size": 32}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "resnet": ("resnet18", {"channels": (8, 16, 24, 32), "stem_width": 8}),
}  # fmt: skip
"""A model's name in timm, and what makes it small."""
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}  # fmt: skip
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic",
              "resize_mode": "shortest"}  # fmt: skip


def timm_folder(folder, kind, seed, base=None, classes=3):
    """``model.safetensors`` and ``config.json``; near ``base`` if one is given."""
    import timm

    name, arguments = TIMM[kind]
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes, **arguments)
    config = {
        "architecture": name, "num_classes": classes, "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3],
                           "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "crop_pct": 1.0,
                           "crop_mode": "center", "num_classes": classes},
    }  # fmt: skip
    _write(folder, _near(model, base, seed), "model.safetensors", "config.json", config)
    return folder


def clip_folder(folder, seed, base=None):
    """``open_clip_model.safetensors`` and ``open_clip_config.json``."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**CLIP)
    config = {"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}
    names = "open_clip_model.safetensors", "open_clip_config.json"
    _write(folder, _near(model, base, seed), *names, config)
    return folder


def _near(model, base, seed):
    """Its tensors, or the base's with a small step."""
    from fusewright.engine.state import read_state

    if base is None:
        return model.state_dict()
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw).abs()
        if tensor.is_floating_point() else tensor
        for name, tensor in read_state(base).items()
    }  # fmt: skip


def _write(folder, tensors, weights, name, config):
    folder.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / weights)
    (folder / name).write_text(json.dumps(config))

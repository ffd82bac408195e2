"""The network: a Hugging Face vision transformer without a head; features are its class token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusewright.extras import needs

MEAN, DEVIATION = 0.30, 0.37
"""Of the pixels of the upright images, in [0, 1]."""


def new_model(seed: int, width: int, layers: int) -> Any:
    """A ``transformers.ViTModel`` with fresh weights: 8x8 pixels in four patches, four heads.

    Raises FusewrightError if transformers is not installed.
    """
    transformers = needs("transformers", "demo")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # 0.02 suits widths of a thousand; so narrow a model starts dead
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.ViTModel(config, add_pooling_layer=False)


def open_model(path: Path) -> Any:
    """The model of a directory, read by ``transformers`` alone."""
    transformers = needs("transformers", "demo")
    with _silent(transformers.utils.logging):
        return transformers.ViTModel.from_pretrained(path, add_pooling_layer=False).eval()


def save_model(model: Any, path: Path) -> None:
    """An ordinary Hugging Face directory: config.json and model.safetensors."""
    with _silent(needs("transformers", "demo").utils.logging):
        model.save_pretrained(path)


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def features(model: Any, images: Tensor) -> Tensor:
    """The class token of each image: (n, 1, 8, 8) in [0, 1] -> (n, width)."""
    pixels = (images - MEAN) / DEVIATION
    token: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
    return token


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A copy of the model that holds other weights."""
    from copy import deepcopy

    other = deepcopy(model)
    other.load_state_dict(weights)
    return other.eval()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads; sums depend on it, so what is trained says how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

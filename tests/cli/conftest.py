"""The command, run in this process; and small models on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from fusewright.cli.app import app

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("merge", "r.yaml")``: what the command prints and its exit code."""

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a base, two experts near it, and a recipe that adds their changes."""
    random = np.random.default_rng(0)
    base = {f"layers.{i}.mlp.weight": random.standard_normal((8, 8), "f4") for i in range(2)}
    for number, name in enumerate(("base", "a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        change = np.float32(0.01 * number)
        tensors = {key: value + change for key, value in base.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "recipe.yaml").write_text(
        "fusewright: 1\n"
        "method: {task_arithmetic: {scale: 1.0}}\n"
        f"base: '{tmp_path}/base'\n"
        f"experts: {{a: '{tmp_path}/a', b: '{tmp_path}/b'}}\n"
    )
    return tmp_path

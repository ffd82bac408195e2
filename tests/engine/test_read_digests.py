"""The manifest's input digests are those of the input's own bytes, and no leaves stay in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fusewright as fw
from fusewright.engine import work
from fusewright.weights import open_weights
from fusewright.weights.digest import BLOCK, block_digests, content_digest, tensor_digest

SHAPES = {"large": (4 * BLOCK + 5, 9), "small": (3,)}


def written(path: Path, seed: int) -> Path:
    draws = torch.Generator().manual_seed(seed)
    save_file({n: torch.randn(s, generator=draws) for n, s in SHAPES.items()}, path)
    return path


def digest_of(path: Path) -> str:
    found = {}
    with open_weights(path) as weights:
        for name, info in weights.items():
            raw = bytearray(info.nbytes)
            weights.read(name, 0, info.numel, memoryview(raw))
            leaves = block_digests(memoryview(raw), info.dtype.itemsize)
            found[name] = tensor_digest(leaves, info)
    return content_digest(found)


@pytest.mark.parametrize("threads", [1, 3])
def test_inputs_are_digested_whatever_the_order_of_units(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[work.ReadDigests] = []
    plain = work.ReadDigests
    monkeypatch.setattr(work, "ReadDigests", lambda *a: made.append(plain(*a)) or made[-1])
    files = {name: written(tmp_path / f"{name}.safetensors", i) for i, name in enumerate("xyz")}
    base = files.pop("x")
    fw.merge("task_arithmetic", base=base, experts=files, out=tmp_path / "out", threads=threads)
    inputs = json.loads((tmp_path / "out" / "fusewright.json").read_text())["inputs"]
    assert inputs["base"]["content"] == digest_of(base)
    for name, path in files.items():
        assert inputs[f"expert {name}"]["content"] == digest_of(path)
    assert len(made) == 1
    assert not made[0]._open

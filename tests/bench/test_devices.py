"""Suites are trained, measured and searched where they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fusewright as fw
from devices import accelerator, needs_accelerator
from fusewright.bench.finetuning import finetune
from fusewright.bench.pools.images import Images
from fusewright.bench.sweep import bench
from fusewright.errors import FusewrightError, RecipeError
from tiny_suite import built, write_suite

META = torch.device("meta")


def test_examples_are_moved_whole() -> None:
    pictures = Images(torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    there = pictures.on(META)
    assert isinstance(there, Images)
    assert there.pixels.device == there.labels.device == META
    assert pictures.pixels.device.type == pictures.labels.device.type == "cpu"


def test_an_open_suite_has_its_device(tmp_path: Path) -> None:
    suite = built(tmp_path)
    assert suite.at(1).device == suite.device == "cpu"
    with pytest.raises(FusewrightError, match="pool, data and device"):
        finetune(suite, "digit", out=tmp_path / "out", device="cuda")
    with pytest.raises(RecipeError, match="has its device"):
        bench(suite, ["average"], device="cuda")


@needs_accelerator
def test_a_sweep_is_the_same_on_a_device(tmp_path: Path) -> None:
    here = built(tmp_path)
    there = fw.suite(write_suite(tmp_path), pool=tmp_path / "pool", device=accelerator())
    found = []
    for suite in (here, there):
        results = bench(suite, ["task_arithmetic", "adamerging(steps=2)", "smile"], tune=2,
                        limit=32, joint="sum", mixed_stream=4, out=tmp_path / suite.device,
                        progress=False)  # fmt: skip
        assert not results.facts["failed"]
        found.append({c.row: {t: o["clean"].value for t, o in c.outcomes.items()}
                      for c in results.cells})  # fmt: skip
    assert found[0].keys() == found[1].keys()
    for row, scores in found[0].items():
        assert found[1][row] == pytest.approx(scores, abs=0.1), row


@needs_accelerator
@pytest.mark.parametrize("how", ["full", "lora", "l-lora"])
def test_an_expert_is_made_on_a_device(tmp_path: Path, how: str) -> None:
    built(tmp_path)
    suite = fw.suite(write_suite(tmp_path), pool=tmp_path / "pool", device=accelerator())
    found = finetune(suite, "digit", out=tmp_path / "out", how=how, steps=4, progress=False)
    assert len(found.losses) == 4
    assert found.after is not None

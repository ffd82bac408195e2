"""The demo on a tiny recipe: everything it promises to leave behind, and the choice of scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusewright.bench import demo
from fusewright.bench.digits import model, store
from fusewright.bench.digits.tasks import TASKS
from fusewright.bench.digits.train import Training

for library in ("sklearn", "transformers", "matplotlib", "jinja2"):
    pytest.importorskip(library)

TINY = Training(width=16, layers=1, batch=16, base_steps=3, expert_steps=3, multitask_steps=1)
METHODS = ["average", {"task_arithmetic": {"scale": 0.4}}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    board = demo.run_demo(out, methods=METHODS, progress=False, training=TINY, seeds=(0, 1))
    return out, board


def test_it_leaves_models_merges_leaderboard_and_report(made):
    out, board = made
    for name in ("base", *(task.name for task in TASKS)):
        assert (out / "models" / name / "model.safetensors").is_file()
    assert (out / "models" / "heads.safetensors").is_file()
    assert {p.name for p in (out / "merged").iterdir()} == {
        "average", "task_arithmetic", "task_arithmetic-tuned"
    }  # fmt: skip
    assert json.loads((out / "leaderboard.json").read_text())["title"] == board.title
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert not list(out.glob("scratch-*"))


def test_base_experts_and_merges_each_have_a_row(made):
    _, board = made
    keys = {row.key for row in board.rows}
    assert {"base", "own expert", "ensemble", "multitask", "average", "task_arithmetic"} <= keys
    assert {f"expert {task.name}" for task in TASKS} <= keys
    assert len(board["average"].seeds) == 2 and board.items == 600
    assert board["task_arithmetic-tuned"].requirement == "labelled"


def test_the_merge_on_disk_is_the_arithmetic_it_claims(made):
    out, _ = made
    base = load_file(out / "models/base/model.safetensors")
    experts = [load_file(out / "models" / t.name / "model.safetensors") for t in TASKS]
    merged = load_file(out / "merged/task_arithmetic/model.safetensors")
    for name, tensor in merged.items():
        expected = base[name] + 0.4 * sum(e[name] - base[name] for e in experts)
        assert torch.allclose(tensor, expected, atol=1e-5), name


def test_the_scale_is_the_best_of_the_grid_on_validation_images(made):
    out, board = made
    suite = store.Trained(out / "models", 0)
    found = board["task_arithmetic-tuned"].chosen["scale"][0]
    base = model.open_model(suite.base)
    start = base.state_dict()
    experts = [model.open_model(p).state_dict() for p in suite.experts.values()]

    def score(scale: float) -> float:
        from fusewright.bench.digits.evaluate import outcomes
        from fusewright.bench.digits.tasks import splits

        moved = {k: start[k] + scale * sum(e[k] - start[k] for e in experts) for k in start}
        moved = model.with_weights(base, moved)
        return float(outcomes(moved, suite.heads(), splits()["validation"]).mean())

    assert score(found) >= max(map(score, demo.SCALES)) - 2 / (200 * len(TASKS))


def test_a_second_run_trains_nothing_and_gives_the_same_numbers(made, monkeypatch):
    out, first = made
    monkeypatch.setattr(store.train, "pretrain", lambda *_: pytest.fail("trained again"))
    again = demo.run_demo(out, methods=METHODS, progress=False, training=TINY, seeds=(0, 1))
    assert [r.accuracy for r in again.rows] == [r.accuracy for r in first.rows]


def test_without_the_average_nothing_is_compared_with_it(made, monkeypatch):
    out, _ = made
    board = demo.run_demo(out, methods=["metagpt"], progress=False, training=TINY, seeds=(0,))
    assert board["metagpt"].gain is None
    assert np.isfinite(board["metagpt"].normalised.value)


def test_the_declared_seeds_are_three_and_the_grid_holds_one():
    assert demo.SEEDS == (0, 1, 2) and 1.0 in demo.SCALES


def test_the_merges_go_through_the_front_door(tmp_path, monkeypatch):
    seen = {}

    def merge(method, **given):
        seen.update(given)

    monkeypatch.setattr("fusewright.merge", merge, raising=False)
    path, seconds = demo.merge_on_disk("average", Path("b"), {"a": Path("e")}, tmp_path / "m")
    assert path == tmp_path / "m" and seconds >= 0
    assert seen["overwrite"] and seen["base"] == Path("b") and seen["experts"] == {"a": Path("e")}

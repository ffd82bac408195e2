"""Costs of cells: inference time, what is read, and the task vectors by layer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

for _needed in ("sklearn", "transformers", "pyarrow", "optuna", "jinja2"):
    pytest.importorskip(_needed)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fusewright.bench.sweep import layers as by_layer  # noqa: E402
from fusewright.bench.sweep import slowdown as inference  # noqa: E402
from fusewright.bench.sweep.costs import measured  # noqa: E402
from fusewright.bench.sweep.run import bench  # noqa: E402
from fusewright.errors import FusewrightError  # noqa: E402
from fusewright.weights.files import COUNT  # noqa: E402
from tiny_suite import built  # noqa: E402

LIMIT = 10


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return built(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def swept(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return sweep(suite, out), out


def sweep(suite, out, **options):
    given = {"methods": ["average"], "limit": LIMIT, "joint": "none", "progress": False}
    return bench(suite, out=out, **given | options)


def test_every_cell_says_its_inference_time(swept):
    for cell in swept[0].cells:
        several = cell.row.startswith("ensemble") or cell.row == "own expert"
        assert cell.costs["slowdown"] > 0
        assert several or cell.costs["slowdown"] == 1


def test_slowdown_is_the_median_over_turns_and_what_comes_first_is_no_cost(monkeypatch):
    now, took = [0.0], iter([50, 3, 4, 90, 2])  # the first is warming up; 90 is a hiccup
    monkeypatch.setattr(inference, "perf_counter", lambda: now[0])

    def ours():
        now[0] += next(took)

    def base():
        now[0] += 2

    assert inference.slowdown(ours, base, turns=4) == (3 / 2 + 4 / 2) / 2


def test_an_ensemble_asks_every_model_the_same_batches(suite):
    asked = inference.questions(suite, ["digit", "parity"], LIMIT)
    assert [task.name for task, _ in asked] == ["digit", "parity"]
    assert all(batch["items"].tolist() == list(range(LIMIT)) for _, batch in asked)
    base, calls = suite.open(suite.base), []
    models = [suite.open(path) for path in suite.experts.values()]
    for number, model in enumerate([base, *models]):
        model.register_forward_hook(lambda *_, number=number: calls.append(number))
    inference.of_ensemble(asked, base, models, "simple", None)
    counts = [calls.count(number) for number in range(3)]
    assert counts == [2 * (1 + inference.TURNS)] * 3
    calls.clear()
    inference.of_experts(asked, base, dict(zip(("digit", "parity"), models, strict=True)))
    assert [calls.count(number) for number in range(3)] == [counts[0], *[counts[0] // 2] * 2]


def test_fifty_settings_of_task_arithmetic_read_what_two_do(suite, tmp_path):
    def read(trials):
        before = COUNT.bytes_read
        results = sweep(suite, tmp_path / str(trials), methods=["task_arithmetic"], tune=trials)
        (cell,) = results.of("task_arithmetic, tuned")
        return COUNT.bytes_read - before, cell.costs["bytes_read"]

    few, many = read(2), read(50)
    assert few == many
    files = [suite.base, *(suite.experts[name] for name in suite.spec.merged)]
    sizes = [(path / "model.safetensors").stat().st_size for path in files]
    assert 0 < many[1] <= sum(sizes)


def test_layers_are_those_of_the_task_vectors(suite, swept):
    (row,) = (row for row in swept[0].facts["layers"] if row["layer"].endswith(".0"))
    paths = [suite.base, suite.experts["digit"], suite.experts["parity"]]
    base, *experts = (load_file(path / "model.safetensors") for path in paths)
    inside = [key for key in base if "layers.0." in key or "layer.0." in key]
    a, b = (torch.cat([(e[k] - base[k]).double().flatten() for k in inside]) for e in experts)
    whole = torch.cat([base[k].double().flatten() for k in inside])
    both = (a != 0) & (b != 0)
    assert row["norm"] == pytest.approx((a.norm() + b.norm()).item() / 2, rel=1e-5)
    expected = (a.norm() + b.norm()) / whole.norm() / 2
    assert row["relative norm"] == pytest.approx(expected.item(), rel=1e-5)
    cosine = (a @ b / a.norm() / b.norm()).item()
    assert row["cosine"] == row["highest cosine"] == pytest.approx(cosine, rel=1e-4)
    conflicts = ((a * b < 0) & both).sum() / both.sum()
    assert row["sign conflicts"] == pytest.approx(conflicts.item(), abs=1e-6)


def test_the_report_draws_them_also_where_a_number_does_not_apply(swept, tmp_path):
    from dataclasses import replace

    results, _ = swept
    rows = results.facts["layers"]
    still = rows[0] | {"layer": "still", "norm": 0.0, "cosine": None, "highest cosine": None}
    shown = replace(results, facts={**results.facts, "layers": [*rows, still]})
    page = shown.to_html(tmp_path / "report.html").read_text("utf-8")
    assert "layer by layer" in page and ">still<" in page and "highest cosine" in page


def test_models_are_read_for_their_layers_once(suite, swept, monkeypatch):
    results, out = swept
    monkeypatch.setattr(by_layer, "_measured", None)
    assert sweep(suite, out).facts["layers"] == results.facts["layers"]
    (out / "layers.json").write_text(json.dumps({"key": "of other models", "found": []}))
    monkeypatch.setattr(by_layer, "_measured", lambda base, experts: [{"layer": "anew"}])
    assert sweep(suite, out).facts["layers"] == [{"layer": "anew"}]


def test_a_sweep_is_not_lost_for_want_of_its_layers(suite, tmp_path, monkeypatch):
    def refuse(base, experts):
        raise FusewrightError("tensors that nobody can compare")

    monkeypatch.setattr(by_layer, "_measured", refuse)
    results = sweep(suite, tmp_path)
    assert "layers" not in results.facts and "nobody can compare" in results.facts["layers of"]
    assert "average" in results.rows()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_memory_that_the_process_kept_from_before_counts_again() -> None:
    def act(pins: list[bytearray]) -> None:
        held = []
        for _ in range(500):
            held.append(bytearray(100_000))
            pins.append(bytearray(600))
        time.sleep(0.1)  # for the watcher to look

    pins: list[bytearray] = []
    act(pins)  # between these, malloc keeps what is freed
    with measured() as cost:
        act([])
    assert cost.peak_memory > 40e6
    assert len(pins) == 500

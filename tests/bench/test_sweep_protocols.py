"""One mixed stream, and adaptation on the test inputs: what is asked, and what stays as it was."""

from __future__ import annotations

import pytest

for _needed in ("sklearn", "transformers", "pyarrow", "jinja2"):
    pytest.importorskip(_needed)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import fusewright as fw  # noqa: E402
from fusewright.bench.report.files import to_csv, to_json, to_markdown  # noqa: E402
from fusewright.bench.report.html import render  # noqa: E402
from fusewright.bench.report.summary import summarise  # noqa: E402
from fusewright.bench.results import MIXED  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import SuiteError  # noqa: E402
from fusewright.bench.sweep.run import bench  # noqa: E402
from fusewright.bench.sweep.stream import mixed  # noqa: E402
from fusewright.bench.sweep.worker import Worker  # noqa: E402
from tiny_suite import built  # noqa: E402

LIMIT, ROWS = 12, 8
TASKS = ("digit", "parity")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return built(tmp_path_factory.mktemp("suite"))


LEARNS = fw.AdaMerging(steps=2, batch=4, guard=8, every=1)


def sweep(suite, out, **options):
    given = {"methods": ["average"], "limit": LIMIT, "joint": "none", "progress": False}
    return bench(suite, out=out, **given | options)


@pytest.fixture(scope="module")
def swept(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return sweep(suite, out, methods=[LEARNS], mixed_stream=ROWS, transductive=True), out


class Noted(nn.Module):
    """A model that remembers what it was told and asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.told, self.sizes, self.tasks = inner, [], [], TASKS

    def set_task(self, task: str) -> None:
        self.told.append(task)

    def forward(self, pixel_values: torch.Tensor, **rest: object) -> object:
        self.sizes.append(len(pixel_values))
        return self.inner(pixel_values=pixel_values, **rest)


def test_a_stream_asks_one_row_at_a_time_and_mixes_tasks_by_the_seed(suite):
    asked = [Noted(suite.open(suite.base)) for _ in range(2)]
    first, again = (mixed(suite, module, TASKS, ROWS, LIMIT) for module in asked)
    told = asked[0].told
    assert asked[0].sizes == [1] * 2 * ROWS
    assert sorted(told) == sorted(TASKS * ROWS) and told not in (
        sorted(told), sorted(told, reverse=True))  # fmt: skip
    assert asked[1].told == told
    for task in TASKS:
        clean = suite.evaluate(suite.base, task, limit=LIMIT)
        assert first[task].metric == clean.metric and len(first[task]) == ROWS
        for name in ("label", "prediction"):
            assert np.array_equal(first[task].columns[name], clean.columns[name][:ROWS])
        assert np.array_equal(first[task].score, again[task].score)


def test_models_are_asked_in_a_stream_of_merged_tasks(swept):
    for cell in swept[0].cells:
        streamed = {task for task, each in cell.outcomes.items() if MIXED in each}
        assert streamed == (set() if cell.row.startswith("ensemble") else set(TASKS))


def test_a_sweep_without_a_stream_keeps_its_cells(suite, tmp_path, monkeypatch):
    made = []
    make = Worker._cell
    monkeypatch.setattr(Worker, "_cell", lambda self, job, group: (
        made.append(job.row), make(self, job, group))[1])  # fmt: skip
    sweep(suite, tmp_path)
    made.clear()
    sweep(suite, tmp_path, methods=[LEARNS], transductive=True)
    assert made == ["adamerging", "adamerging, adapted on test inputs"]
    made.clear()
    sweep(suite, tmp_path, mixed_stream=2)
    assert {"base", "average"} <= set(made)


def test_transductive_rows_learn_from_test_inputs_without_labels(suite, tmp_path, monkeypatch):
    parts, keys = [], set()
    question = Suite._question

    def noted(self, name, part, limit, shown=()):
        found = question(self, name, part, limit, shown)
        parts.append(part)
        keys.update(next(iter(found.epoch(2, 0))))
        return found

    monkeypatch.setattr(Suite, "_question", noted)
    results = sweep(suite, tmp_path, methods=[LEARNS], transductive=True)
    assert results.facts["failed"] == {} and set(parts) == {"validation", "test"}
    assert not {"label", "labels"} & keys


def test_transductive_rows_are_marked_and_never_ranked(swept):
    results, _ = swept
    found = summarise(results, resamples=50)
    (section,) = found.sections
    line = section.line("adamerging, adapted on test inputs")
    assert line and line.requirement == "transductive"
    assert line.rank is None and line.versus is None and line.level_with == ()
    other = section.line("adamerging")
    assert other and other.rank == 1 and other.level_with == ()
    for text in (to_markdown(found), render(found)):
        assert "Adapted on the test inputs themselves; not ranked" in text
        assert line.row in text


def test_no_method_that_could_adapt_is_said(suite, tmp_path):
    results = sweep(suite, tmp_path, transductive=True)
    assert "learns from unlabelled inputs" in str(results.facts["left out"])


def test_a_stream_is_a_column_beside_the_same_rows_task_by_task(swept):
    results, _ = swept
    found = summarise(results, resamples=50)
    line = found.sections[0].line("base")
    (cell,) = results.of("base")
    scores = [cell.outcomes[task]["clean"].score[:ROWS].mean() for task in TASKS]
    assert line.stream_clean == pytest.approx(100 * np.mean(scores))
    assert line.stream.value == pytest.approx(
        100 * np.mean([cell.outcomes[task][MIXED].score.mean() for task in TASKS]))  # fmt: skip
    assert line.corruptions == {} and found.conditions == ()
    shown = f"{line.stream.value:.1f} ({line.stream_clean:.1f})"
    assert shown in to_markdown(found) and "mixed stream" in to_csv(found)
    assert to_json(found)["sections"][0]["rows"][0]["stream_clean"] == line.stream_clean
    assert f"({line.stream_clean:.1f})" in render(found)
    assert "8 rows" in results.facts["mixed stream"]


def test_a_stream_of_one_row_is_refused(suite, tmp_path):
    with pytest.raises(SuiteError, match="--mixed-stream"):
        sweep(suite, tmp_path, mixed_stream=1)

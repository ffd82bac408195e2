"""A suite of dense tasks: one encoder merged, each task with a frozen decoder of its own."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fusewright as fw
from fusewright.bench.regime import check_suite
from fusewright.bench.report import write_results
from fusewright.bench.report.summary import summarise
from fusewright.bench.suite_file import SuiteError
from fusewright.bench.sweep.store import Store
from fusewright.bench.sweep.worker import Worker
from fusewright.tasks import corpus

transformers = pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")
for needed in ("optuna", "skimage"):
    pytest.importorskip(needed)

KINDS = {"rooms": "segmentation", "depth": "depth", "normals": "normals"}
CHANNELS = {"rooms": 4, "depth": 1, "normals": 3}


def segformer(channels):
    torch.manual_seed(channels)
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=8, num_labels=channels))  # fmt: skip


def write_models(pool) -> None:
    """A base, experts whose encoders are a step away from it, and a decoder for each task."""
    pool.mkdir()
    base = segformer(4)
    base.save_pretrained(pool / "base")
    heads = {}
    for number, task in enumerate(KINDS):
        draw = torch.Generator().manual_seed(number)
        expert = segformer(4)
        with torch.no_grad():
            for name, parameter in expert.named_parameters():
                if name.startswith("segformer."):
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
        expert.save_pretrained(pool / task)
        decoder = segformer(CHANNELS[task]).decode_head.state_dict()
        heads |= {f"{task}.decode_head.{n}": t.contiguous() for n, t in decoder.items()}
    heads["depth.decode_head.classifier.bias"] += 2.0
    save_file(heads, pool / "heads.safetensors")


def write_rows(folder, kind: str, seed: int) -> None:
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    images, targets = [], []
    for _ in range(8):
        images.append({"bytes": png(rng.integers(0, 256, (32, 32, 3), np.uint8))})
        if kind == "segmentation":
            ids = rng.choice([0, 1, 2, 3, 255], (32, 32)).astype(np.uint8)
            targets.append({"bytes": png(ids)})
        elif kind == "depth":
            targets.append((rng.random((32, 32)) * (rng.random((32, 32)) < 0.9)).tolist())
        else:
            targets.append(rng.normal(size=(3, 32, 32)).tolist())
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("validation", "test"):
        pq.write_table(pa.table({"image": images, "target": targets}), folder / f"{part}.parquet")


def png(array) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def written(folder):
    write_models(folder / "pool")
    tasks = {}
    for number, (task, kind) in enumerate(KINDS.items()):
        write_rows(folder / "data" / task, kind, number)
        tasks[task] = {
            "kind": kind, "question": f"what is the {task}?", "data": task,
            "splits": {"validation": "validation", "test": "test"},
            "options": {"preparation": {"size": 32}},
        }  # fmt: skip
    tasks["rooms"]["classes"] = ["floor", "wall", "sofa", "lamp"]
    said = {
        "suite": 1, "title": "Rooms", "base": "base", "experts": {task: task for task in KINDS},
        "heads": "heads.safetensors", "tasks": tasks,
        "opens": {"model": "SegformerForSemanticSegmentation"},
    }  # fmt: skip
    (folder / "rooms.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return fw.suite(folder / "rooms.yaml", pool=folder / "pool", data=folder / "data")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return written(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def swept(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return fw.bench(suite, ["ties"], out=out, tune=2, corruptions=["contrast"], progress=False), out


def test_each_task_asks_its_own_decoder(suite) -> None:
    decoder = load_file(suite.pool / "heads.safetensors")
    model = suite.open(suite.experts["depth"])
    whole = segformer(1)
    state = model.state_dict() | {n.removeprefix("depth."): t for n, t in decoder.items()
                                  if n.startswith("depth.")}  # fmt: skip
    whole.load_state_dict(state)
    batch = next(suite.tasks["depth"].batches(suite.split("depth"), 8))
    with torch.no_grad():
        expected = whole.eval()(batch["pixel_values"]).logits
        found = suite.tasks["depth"].logits(model, batch)
    torch.testing.assert_close(found, expected.movedim(1, -1))


def test_tasks_of_different_units_are_chosen_by_as_shares_of_their_experts(suite, tmp_path) -> None:
    """A metre more of depth and all pixels of a segmentation do not weigh the same."""
    worker, base = Worker(suite, Store(tmp_path)), suite.open(suite.base)
    shares = []
    for task in KINDS:
        expert, ours = (suite.evaluate(suite.open(path), task, "validation").value
                        for path in (suite.experts[task], suite.base))  # fmt: skip
        shares.append(expert / ours if task == "depth" else ours / expert)
    assert worker._validated(base, tuple(KINDS)) == pytest.approx(sum(shares) / 3)
    alike = suite.evaluate(base, "rooms", "validation").value
    assert worker._validated(base, ("rooms",)) == alike


def test_a_sweep_measures_every_row_on_every_task(suite, swept) -> None:
    results, _ = swept
    assert results.facts["failed"] == {}
    rows = list(results.rows())
    assert "ensemble, max" not in rows  # there is no maximum of depths
    assert {"ensemble, simple", "ensemble, weighted", "average", "ties, tuned"} <= set(rows)
    (average,) = results.of("average")
    experts = [suite.open(suite.experts[task]).state_dict() for task in KINDS]
    module = suite.open(suite.base)
    module.load_state_dict({n: sum(e[n] for e in experts) / 3 if t.is_floating_point() else t
                            for n, t in experts[0].items()})  # fmt: skip
    for task in KINDS:
        expected = suite.evaluate(module, task)
        found = average.outcomes[task]
        assert found["clean"].score == pytest.approx(expected.score, abs=2e-4)
        assert not np.array_equal(found["contrast"].score, found["clean"].score)
        assert np.array_equal(found["contrast"].weight, found["clean"].weight)
    assert 0 < corpus(average.outcomes["rooms"]["clean"])["mean_iou"] < 1


def test_ensembles_average_answers(suite, swept) -> None:
    (cell,) = swept[0].of("ensemble, simple")
    task = suite.tasks["depth"]
    batch = next(task.batches(suite.split("depth"), 8))
    with torch.no_grad():
        said = [task.logits(suite.open(path), batch) for path in suite.experts.values()]
    seen = torch.nn.functional.interpolate(
        (sum(said) / 3).movedim(-1, 1), (32, 32), mode="bilinear", align_corners=False
    )[:, 0]
    errors = (seen - batch["labels"]).abs() * (batch["labels"] > 0)
    expected = -errors.sum((1, 2)) / (batch["labels"] > 0).sum((1, 2))
    assert cell.outcomes["depth"]["clean"].score == pytest.approx(expected.numpy(), rel=1e-4)


def test_reports_show_errors_as_errors(swept, tmp_path) -> None:
    results, _ = swept
    summary = summarise(results, resamples=200)
    (section,) = summary.sections
    for row in ("average", "expert rooms"):
        (cell,), line = results.of(row), section.line(row)
        error = -cell.outcomes["depth"]["clean"].value
        found = line.tasks["depth"]
        assert found.value == pytest.approx(100 * error) and found.low <= found.value <= found.high
        own = -next(results.of("expert depth")).outcomes["depth"]["clean"].value
        assert line.shares["depth"] == pytest.approx(100 * own / error)
        assert line.mean is None and line.normalised is not None
    write_results(results, tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "absolute error" in page
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "absolute error × 100 (depth)" in text and "percent (rooms, normals)" in text
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert told["metrics"] == {"rooms": "pixel_accuracy", "depth": "absolute_error",
                               "normals": "within_11.25"}  # fmt: skip


def test_a_smaller_error_is_better(suite, tmp_path) -> None:
    from dataclasses import replace

    from fusewright.bench.results import Cell, Results
    from fusewright.bench.sweep.tables import tables
    from fusewright.tasks import Outcomes

    errors = np.random.default_rng(0).uniform(0.2, 0.6, 60)
    cells = tuple(
        Cell(row, row, kind, "s", 0, ("depth",), {"depth": {"clean": Outcomes(
            "absolute_error", -errors * factor, np.arange(1.0, 61))}})
        for row, kind, factor in (("own expert", "task id", 0.5), ("average", "none", 1.0),
                                  ("ties", "none", 0.8))
    )  # fmt: skip
    results = Results("s", "S", {"depth": ""}, ("depth",), (), cells)
    (section,) = summarise(results, resamples=300).sections
    assert [line.row for line in section.classes()["none"]] == ["ties", "average"]
    ties = section.line("ties")
    assert ties.rank == 1 and section.line("average").rank == 2
    assert ties.normalised.value == pytest.approx(100 * 0.5 / 0.8)
    assert ties.versus.value.low > 0
    (merged,) = (t for t in tables(results) if t.title == "Merged without data")
    assert [row[0] for row in merged.rows] == ["ties", "average"]
    bare = replace(results, cells=cells[1:])
    (section,) = summarise(bare, resamples=300).sections
    assert [line.row for line in section.classes()["none"]] == ["ties", "average"]
    mean = np.average(errors, weights=np.arange(1.0, 61))
    assert section.line("ties").versus.value.value == pytest.approx(100 * 0.2 * mean)
    assert section.line("ties").mean.value == pytest.approx(100 * 0.8 * mean)


def test_the_regime_of_errors_is_in_shares(suite) -> None:
    found = check_suite(suite, progress=False)
    depth = found.tasks["depth"]
    assert depth.expert == 1 and depth.shown_in == "absolute error × 100"
    assert depth.base == pytest.approx(depth.shown[2] / depth.shown[0])
    assert found.tasks["rooms"].shown is None and found.tasks["rooms"].rank is not None


def test_the_command_shows_and_sweeps_it(suite, tmp_path) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from fusewright.cli.app import app

    where = [str(suite.pool.parent / "rooms.yaml"), "--pool", str(suite.pool),
             "--data", str(suite.data)]  # fmt: skip
    shown = runner.invoke(app, ["suite", "show", *where])
    assert shown.exit_code == 0 and "what is the depth?" in shown.output
    done = runner.invoke(app, ["bench", *where, "--methods", "ties", "--limit", "4",
                               "-o", str(tmp_path)])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file()


def test_a_task_without_decoder_or_classes_is_refused(tmp_path) -> None:
    found = written(tmp_path)
    path = found.pool / "heads.safetensors"
    heads = load_file(path)
    save_file({n: t for n, t in heads.items() if not n.startswith("depth.")}, path)
    with pytest.raises(SuiteError, match="'depth' has no head"):
        found.check()
    save_file(heads, path)
    said = yaml.safe_load((tmp_path / "rooms.yaml").read_text())
    del said["tasks"]["rooms"]["classes"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(SuiteError, match="nothing names the classes of 'rooms'"):
        fw.suite(tmp_path / "bare.yaml", pool=found.pool, data=found.data).check()

"""Joint training in sweeps: the experts' steps together, trained once, and never in the way."""

from __future__ import annotations

import io

import pytest

for _needed in ("sklearn", "transformers", "pyarrow", "optuna", "peft", "cvxpy", "quadprog"):
    pytest.importorskip(_needed)
pytest.importorskip("torchjd")

import numpy as np  # noqa: E402
import pyarrow  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from pyarrow import parquet  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fusewright.bench.joint import COMBINATIONS, train_joint  # noqa: E402
from fusewright.bench.joint.recipe import joint_recipe  # noqa: E402
from fusewright.bench.pools.images import VisionRecipe, inputs, shifted  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import SuiteError, SuiteSpec  # noqa: E402
from fusewright.bench.sweep import identity  # noqa: E402
from fusewright.bench.sweep import joint as sweep_joint  # noqa: E402
from fusewright.bench.sweep.joint import TITLES, chosen  # noqa: E402
from fusewright.bench.sweep.run import bench  # noqa: E402
from fusewright.bench.sweep.worker import Worker  # noqa: E402
from fusewright.errors import NumericError, RecipeError  # noqa: E402
from tiny_suite import PARAMETERS, built  # noqa: E402

LIMIT = 30


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return built(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def swept(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return sweep(suite, out), out


def sweep(suite, out, **options):
    given = {"methods": ["average"], "limit": LIMIT, "joint": "all", "progress": False}
    return bench(suite, out=out, **given | options)


def joint_rows(results):
    return [row for row in results.rows() if row.startswith("joint training, ")]


def scores(cell):
    return {task: each["clean"].score.tolist() for task, each in cell.outcomes.items()}


@pytest.fixture
def made(monkeypatch):
    """The rows whose cells are made, not taken from the folder."""
    rows: list[str] = []
    make = Worker._cell

    def note(self, job, group):
        rows.append(job.row)
        return make(self, job, group)

    monkeypatch.setattr(Worker, "_cell", note)
    return rows


def test_every_combination_is_a_row_that_asks_for_labels(swept):
    results, _ = swept
    assert joint_rows(results) == [f"joint training, {how}" for how in TITLES]
    for row in joint_rows(results):
        (cell,) = results.of(row)
        assert cell.requirement == "labelled" and set(cell.outcomes) == set(results.tasks)
        assert cell.costs["seconds"] > 0 and cell.costs["slowdown"] == 1
    assert TITLES.keys() == COMBINATIONS.keys()


def test_steps_are_those_of_all_experts_and_the_batch_is_theirs(suite, swept):
    recipe = joint_recipe(suite, suite.spec.merged)
    assert recipe.steps == 2 * PARAMETERS["expert_steps"]
    assert recipe.batch == PARAMETERS["batch"]
    (cell,) = swept[0].of("joint training, sum")
    assert cell.note == "16 steps of 16 items, as all experts together"


def test_a_row_is_what_training_by_hand_gives(suite, swept):
    recipe, names = joint_recipe(suite, suite.spec.merged), suite.spec.merged
    model = train_joint(
        suite.open(suite.base), [suite.tasks[n] for n in names],
        {n: suite.split(n, "train") for n in names}, how="pcgrad", steps=recipe.steps,
        batch_size=recipe.batch, lr=recipe.rate, seed=suite.seed, augment=recipe.augment,
    )  # fmt: skip
    (kept,) = (suite.root / "joint").glob("pcgrad-*/model.safetensors")
    stored = load_file(kept)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    (cell,) = swept[0].of("joint training, pcgrad")
    for task, found in scores(cell).items():
        assert suite.evaluate(model, task, limit=LIMIT).score.tolist() == found


@pytest.fixture
def trained(monkeypatch):
    """The ways that are trained, not taken from the pool."""
    ways: list[str] = []
    train = sweep_joint._train_into

    def note(folder, suite, how):
        ways.append(how)
        train(folder, suite, how)

    monkeypatch.setattr(sweep_joint, "_train_into", note)
    return ways


def test_another_limit_measures_again_and_trains_nothing(suite, swept, tmp_path, made, trained):
    for out, limit in ((swept[1], LIMIT - 1), (tmp_path, LIMIT)):
        made.clear()
        sweep(suite, out, limit=limit, joint="sum,mgda")
        assert {"joint training, sum", "joint training, mgda"} <= set(made)
    assert trained == []


def test_changed_training_code_trains_again_and_merges_stay(
    suite, tmp_path, made, trained, monkeypatch
):
    sweep(suite, tmp_path, joint="sum")
    source, changed = identity.inspect.getsource, "fusewright.bench.descent"

    def read(module):
        return source(module) + ("# changed" if module.__name__ == changed else "")

    monkeypatch.setattr(identity.inspect, "getsource", read)
    made.clear()
    trained.clear()
    sweep(suite, tmp_path, joint="sum")
    assert made == ["joint training, sum"] and trained == ["sum"]


def test_what_is_not_asked_for_is_not_trained(suite, tmp_path):
    assert joint_rows(sweep(suite, tmp_path, joint="none")) == []


def test_a_training_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    train = sweep_joint._train_into

    def diverge(folder, suite, how):
        if how == "dwa":
            raise NumericError("a loss is not finite", where="digit, step 3")
        train(folder, suite, how)

    monkeypatch.setattr(sweep_joint, "_train_into", diverge)
    results = sweep(built(tmp_path), tmp_path / "out", joint="dwa,sum")
    assert list(results.facts["failed"]) == ["joint training, dwa"]
    assert joint_rows(results) == ["joint training, sum"] and "average" in results.rows()


@pytest.mark.parametrize("asked, expected", [
    ("none", ()), ("", ()), ("all", tuple(TITLES)), ("sum, mgda,sum", ("sum", "mgda")),
    (["upgrad"], ("upgrad",)),
])  # fmt: skip
def test_ways_are_chosen_by_name(asked, expected):
    assert chosen(asked) == expected


@pytest.mark.parametrize("asked", ["pcgard", "all,sum", ["none", "sum"]])
def test_ways_that_are_not_there_are_refused(asked):
    with pytest.raises(RecipeError, match="train tasks jointly"):
        chosen(asked)


def test_public_checkpoints_do_not_say_how_they_were_trained(suite, tmp_path):
    spec = SuiteSpec(**suite.spec.model_dump() | {"build": None})
    public = Suite("public", spec, suite.root)
    results = sweep(public, tmp_path, joint="sum")
    assert joint_rows(results) == [] and results.facts["failed"] == {}
    assert "public checkpoints" in results.facts["left out"]["joint training"]


VISION = {"width": 16, "layers": 1, "size": 16, "base_rows": 8, "base_epochs": 1, "shift": 2,
          "expert_epochs": 3, "batch": 8, "threads": 1, "tunings": ["full", "lora"]}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A vision suite of two tasks with 20 and 13 training rows."""
    root, draw = tmp_path_factory.mktemp("vision"), np.random.default_rng(0)
    for name, rows in (("a", 24), ("b", 17)):
        images = []
        for row in range(rows):
            file, top = io.BytesIO(), 80 * (row % 3 + 1)
            Image.fromarray(draw.integers(0, top, (16, 16), dtype=np.uint8)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"image": images, "label": [row % 3 for row in range(rows)]})
        (root / name).mkdir()
        parquet.write_table(table, root / name / "train.parquet")
    splits = {"train": "train[4:]", "validation": "train[:4]", "test": "train"}
    task = {"kind": "image-classification", "classes": ["x", "y", "z"], "splits": splits}
    spec = SuiteSpec(
        title="tiny", base="base", heads="heads.safetensors",
        experts={n: f"experts/{n}" for n in "ab"}, tasks={n: task | {"data": n} for n in "ab"},
        variants={"lora": {"experts": {n: f"lora/{n}" for n in "ab"}}},
        build={"builder": "vision", "parameters": VISION},
    )  # fmt: skip
    return Suite("tiny", spec, root / "pool", root)


def test_a_vision_pool_is_trained_jointly_and_its_adapters_are_not(pictures, tmp_path):
    results = sweep(pictures, tmp_path, joint="sum", variants=[None, "lora"])
    (cell,) = results.of("joint training, sum")
    assert cell.note.startswith("9 steps of 8 items")  # 3 epochs of 20 // 8 and of 13 // 8
    assert "adapters" in results.facts["left out"]["joint training, lora"]


def test_a_task_without_training_rows_is_named(pictures):
    tasks = {n: t.model_dump() | {"splits": {"test": "train"}}
             for n, t in pictures.spec.tasks.items()}  # fmt: skip
    spec = SuiteSpec(**pictures.spec.model_dump() | {"tasks": tasks})
    pictures.build(progress=False)
    with pytest.raises(SuiteError, match="'a' has no train split"):
        joint_recipe(Suite("tiny", spec, pictures.pool, pictures.data), ["a", "b"])


def test_pictures_are_moved_as_the_experts_were(pictures):
    pictures.build(progress=False)
    recipe, draw = VisionRecipe(**VISION), torch.Generator
    pixels = torch.randint(0, 256, (5, 3, 16, 16), generator=draw().manual_seed(1)).to(torch.uint8)
    expected = inputs(shifted(pixels, recipe.shift, draw().manual_seed(2)), recipe)
    moved = joint_recipe(pictures, ["a", "b"]).augment(
        {"pixel_values": inputs(pixels, recipe)}, draw().manual_seed(2)
    )
    torch.testing.assert_close(moved["pixel_values"], expected)

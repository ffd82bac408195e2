"""The builder of vision pools: ordinary folders, each complete or not at all."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")
image = pytest.importorskip("PIL.Image")

import pyarrow  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fusewright as fw  # noqa: E402
from fusewright.bench.pools import build, making, parts, training, vision  # noqa: E402
from fusewright.bench.pools.images import Images, VisionRecipe, shifted  # noqa: E402
from fusewright.bench.suite_file import SuiteError, SuiteSpec, find_suite, read_suite  # noqa: E402
from fusewright.cli.app import app  # noqa: E402
from fusewright.errors import FusewrightError, OutputError  # noqa: E402

SMALL = {
    "width": 16, "layers": 1, "size": 16, "base_rows": 12, "base_epochs": 1, "expert_epochs": 2,
    "batch": 8, "shift": 1, "threads": 1,
}  # fmt: skip
TASKS = ("light", "dark", "other")


def png(array):
    file = io.BytesIO()
    image.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name in TASKS:
        folder = root / name
        folder.mkdir()
        labels = [row % 3 for row in range(24)]
        pictures = [png(draw.integers(0, 80 * (y + 1), (16, 16), dtype=np.uint8)) for y in labels]
        table = pyarrow.table({"image": pictures, "label": labels})
        parquet.write_table(table, folder / "train.parquet")
    return root


def suite(**parameters):
    tasks = {
        name: {"kind": "image-classification", "data": name, "classes": ["x", "y", "z"],
               "splits": {"train": "train[4:]"}}
        for name in TASKS
    }  # fmt: skip
    return SuiteSpec(
        title="tiny", base="base", heads="heads.safetensors", tasks=tasks,
        experts={name: f"experts/{name}" for name in TASKS[:2]},
        build={"builder": "vision", "parameters": SMALL | parameters},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pool") / "seed-0"
    build(suite(tunings=["full", "lora"]), out, data, seed=0, progress=False)
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_models_are_ordinary_folders(built):
    base = transformers.AutoModel.from_pretrained(built / "base")
    expert = transformers.AutoModel.from_pretrained(built / "experts" / "light")
    assert base.state_dict().keys() == expert.state_dict().keys()
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), expert.parameters(), strict=True)
    )
    transformers.AutoImageProcessor.from_pretrained(built / "base", use_fast=False)


def test_every_task_has_a_head_and_only_those_of_the_suite_an_expert(built):
    heads = load_file(built / "heads.safetensors")
    assert {name: tuple(head.shape) for name, head in heads.items()} == dict.fromkeys(
        TASKS, (3, 16)
    )
    assert all(torch.allclose(h.norm(dim=1), torch.ones(3)) for h in heads.values())
    assert sorted(p.name for p in (built / "experts").iterdir()) == ["dark", "light"]


def test_adapters_open_over_the_base(built):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModel.from_pretrained(built / "base")
    model = peft.PeftModel.from_pretrained(base, built / "lora" / "dark")
    adapter = load_file(built / "lora" / "dark" / "adapter_model.safetensors")
    assert any(t.abs().sum() > 0 for name, t in adapter.items() if "lora_B" in name)
    assert model(torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 16, 2, 2)


def test_provenance_says_what_it_depends_on(built):
    said = json.loads((built / "provenance.json").read_text())
    assert said["seed"] == 0
    assert said["recipe"]["width"] == 16
    assert said["data"]["light"]["count"] == 20
    assert len({said["data"][name]["sha256"] for name in TASKS}) == 3
    assert sorted(said["parts"]) == [
        "base", "experts/dark", "experts/light", "lora/dark", "lora/light"
    ]  # fmt: skip
    assert all(np.isfinite(p["loss"]) and p["seconds"] > 0 for p in said["parts"].values())
    assert said["versions"]["torch"] == torch.__version__


def test_nothing_half_done_is_left(built):
    names = {path.name for path in built.rglob("*")}
    assert not [name for name in names if name.startswith(".") or name.endswith("partial")]


def test_a_complete_pool_is_not_built_again(built, tmp_path):
    build(suite(tunings=["full", "lora"]), built, tmp_path / "no data", seed=0, progress=False)


def test_a_pool_is_given_another_tuning_later(data, built, tmp_path, monkeypatch):
    out = tmp_path / "seed-0"
    build(suite(), out, data, seed=0, progress=False)
    before = json.loads((out / "provenance.json").read_text())
    kept = [path for path in out.rglob("*") if path.is_file() and path.suffix == ".safetensors"]
    times = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(making, "versions", lambda *modules: {"torch": "another"})
    adapters = {name: f"lora/{name}" for name in TASKS[:2]}
    build(suite().model_copy(update={"experts": adapters}), out, data, seed=0, progress=False)
    after = json.loads((out / "provenance.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert after["parts"].keys() - before["parts"].keys() == {"lora/light", "lora/dark"}
    assert {name: after["parts"][name] for name in before["parts"]} == before["parts"]
    assert after["versions"] == before["versions"]
    assert after["parts"]["lora/dark"]["versions"] == {"torch": "another"}
    for name in TASKS[:2]:
        ours, theirs = (p / "lora" / name / "adapter_model.safetensors" for p in (out, built))
        assert ours.read_bytes() == theirs.read_bytes()


def test_only_the_models_that_the_suite_names_are_made(data, tmp_path):
    adapters = {name: f"lora/{name}" for name in TASKS[:2]}
    spec = suite().model_copy(update={"experts": adapters})
    build(spec, tmp_path / "seed-0", data, seed=0, progress=False)
    assert sorted(p.name for p in (tmp_path / "seed-0" / "lora").iterdir()) == ["dark", "light"]
    assert not (tmp_path / "seed-0" / "experts").exists()


def test_a_variant_is_built_by_its_name_and_missed_with_it(data, tmp_path):
    def built(*words):
        found = CliRunner().invoke(app, ["suite", "build", *given, "--json", *words])
        assert found.exit_code == 0, found.output

    path = tmp_path / "tiny.yaml"
    fields = suite().model_dump(mode="json", exclude_defaults=True)
    fields["variants"] = {"lora": {"experts": {name: f"lora/{name}" for name in TASKS[:2]}}}
    path.write_text(yaml.safe_dump(fields))
    pool = tmp_path / "pool"
    given = [str(path), "--pool", str(pool), "--data", str(data)]
    built()
    assert not (pool / "seed-0" / "lora").exists()
    with pytest.raises(SuiteError, match="--variant lora"):
        fw.suite(path, pool=pool, data=data, variant="lora").check()
    built("--variant", "lora")
    assert len(fw.suite(path, pool=pool, data=data, variant="lora").experts) == 2


def killed_at(monkeypatch, call):
    """The nth training of an expert is interrupted, when its folder has been begun."""
    calls = []

    def interrupted(model, images, *rest):
        calls.append(len(images))
        if len(calls) == call:
            raise KeyboardInterrupt
        return training_of_experts(model, images, *rest)

    training_of_experts = training.fine_tune
    monkeypatch.setattr(training, "fine_tune", interrupted)
    return calls


def test_a_killed_build_goes_on_and_gives_the_same_models(data, built, tmp_path, monkeypatch):
    out, spec = tmp_path / "seed-0", suite(tunings=["full", "lora"])
    calls = killed_at(monkeypatch, call=2)
    with pytest.raises(KeyboardInterrupt):
        build(spec, out, data, seed=0, progress=False)
    assert sorted(p.name for p in (out / "experts").iterdir()) == ["dark.partial", "light"]
    assert not (out / "provenance.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "base", out / "experts" / "light")}
    monkeypatch.setattr(vision, "new_model", None)  # the base is not trained again
    build(spec, out, data, seed=0, progress=False)
    assert len(calls) == 2 + 3  # the interrupted expert and two adapters
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for part in ("base", "experts/light", "experts/dark"):
        assert weights(out / part) == weights(built / part)


def test_another_seed_gives_other_models(data, built, tmp_path):
    build(suite(), tmp_path / "seed-1", data, seed=1, progress=False)
    assert weights(tmp_path / "seed-1" / "base") != weights(built / "base")


def test_a_folder_of_another_recipe_is_refused(data, built):
    with pytest.raises(OutputError, match=r"another recipe[\s\S]*expert_rate"):
        build(suite(expert_rate=1.0, tunings=["full", "lora"]), built, data, progress=False)


def test_two_builders_of_one_folder_are_refused(data, tmp_path):
    with parts.pool(tmp_path, {}), pytest.raises(OutputError, match="Another run"):
        build(suite(), tmp_path, data, progress=False)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"expert_rat": 1}, "expert_rate"), ({"tunings": ["full", "dora"]}, "dora")],
)
def test_recipes_that_are_not_understood_are_refused(data, tmp_path, parameters, said):
    with pytest.raises(SuiteError, match=said):
        build(suite(**parameters), tmp_path / "pool", data, progress=False)
    assert not (tmp_path / "pool").exists()


def test_an_unknown_builder_names_the_nearest(data, tmp_path):
    spec = suite().model_copy(update={"build": suite().build.model_copy(
        update={"builder": "visoin"})})  # fmt: skip
    with pytest.raises(SuiteError, match="did you mean 'vision'"):
        build(spec, tmp_path, data, progress=False)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FusewrightError, match="light"):
        build(suite(), tmp_path / "pool", tmp_path, progress=False)


def test_pictures_are_moved_and_nothing_else():
    pixels = torch.zeros(50, 1, 9, 9, dtype=torch.uint8)
    pixels[:, 0, 4, 4] = 200
    moved = shifted(pixels, 2, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert (moved.flatten(1).sum(1) == 200).all()
    places = moved[:, 0].flatten(1).argmax(1)
    rows, columns = places // 9 - 4, places % 9 - 4
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == [-2, -1, 0, 1, 2]


def test_tasks_of_the_base_do_not_compete_with_each_other():
    """With one class a task there is nothing to learn: each task has a softmax of its own."""
    images = Images(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    recipe = VisionRecipe(**SMALL)
    model = vision.new_model(recipe, 0)
    loss = training.pretrain(model, {"a": images, "b": images}, recipe, 0, lambda said: None)
    assert loss == pytest.approx(0, abs=1e-6)


def test_the_shipped_suite_has_a_recipe_of_two_or_three_million_parameters():
    spec = read_suite(find_suite("vision-mini"))
    model = vision.new_model(vision.read_recipe(spec), 0)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert len(spec.merged) >= 8
    assert len(spec.unseen) >= 2
    assert not {"cifar10", "gtsrb"} & set(spec.merged)

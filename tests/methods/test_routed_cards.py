"""Saved routed models: what they say of their making, how they open, and broken ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from routed_toys import answer, base_of, elsewhere, expert_of, experts_of, images, resnet, vit
from torch import nn

import fusewright as fw
from fusewright.bench.suite import Suite
from fusewright.engine import opening
from fusewright.errors import PlanError, RecipeError, WeightsError
from fusewright.methods.routed import (
    EMR,
    EWEMoE,
    ParetoSet,
    RankOneMoE,
    RepresentationSurgery,
    Smile,
    Tall,
    Twin,
    WEMoE,
)

LEARNS: dict[str, Any] = {"steps": 1, "guard": 0}
METHODS = {
    "smile": Smile(rank=2, gate=1), "emr": EMR(), "tall": Tall(),
    "wemoe": WEMoE(**LEARNS), "e_wemoe": EWEMoE(**LEARNS), "rank_one_moe": RankOneMoE(**LEARNS),
    "twin": Twin(epochs=1, inputs=12), "pwe_moe": ParetoSet(**LEARNS, objective="entropy"),
    "surgery": RepresentationSurgery(steps=1, batch=6),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """A base and two experts whose licences differ."""
    base = base_of(vit)
    found = {"base": base, **experts_of(base)}
    for name, model in found.items():
        model.save_pretrained(tmp_path / name)
        licence = "apache-2.0" if name == "base" else "cc-by-nc-4.0"
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return {"base": tmp_path / "base", "experts": {name: tmp_path / name for name in ("a", "b")}}


def asked(name: str) -> dict[str, Any]:
    return {} if METHODS[name].card.data == "none" else {"data": images(2)}


def front(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def check_card(folder: Path, models: dict[str, Any], name: str) -> None:
    text = (folder / "README.md").read_text()
    assert "license" not in front(folder) and "Their licences differ" in text
    assert f"- base: `{models['base']}` (licence: apache-2.0)" in text
    for expert, path in models["experts"].items():
        assert f"- expert {expert}: `{path}` (licence: cc-by-nc-4.0)" in text
    assert METHODS[name].card.paper in text and "assthrough" not in text
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert set(recipe["method"]) == {name} and recipe["base"] == str(models["base"])


@EACH
def test_card_and_manifest_name_the_models_the_method_and_the_fit(
    name: str, folders: dict[str, Any], tmp_path: Path
) -> None:
    written = fw.merge(METHODS[name], **folders, **asked(name), out=tmp_path / "out")
    check_card(tmp_path / "out", folders, name)
    fitted = json.loads((tmp_path / "out" / "fusewright.json").read_text())["fitted"]
    assert fitted["program"] == METHODS[name].spec() and fitted["experts"] == ["a", "b"]
    assert fitted["recipe"]["base"] == str(folders["base"])
    fw.merge("ties", **folders, out=tmp_path / "ties")
    assert fitted["models"] == json.loads((tmp_path / "ties" / "fusewright.json").read_text())[
        "inputs"]  # paths, bytes and content of base and experts, as of a dense merge
    assert written.report["notes"] == []  # of no merge: one model is written as it is
    assert fitted.keys() >= json.loads(json.dumps(written.report["fitted"])).keys()
    assert fw.verify(tmp_path / "out").ok


def test_what_is_saved_or_unloaded_from_memory_says_the_same(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    made = fw.merge(METHODS["emr"], **folders)
    made.save(tmp_path / "out")
    made.unload("a").save(tmp_path / "plain")
    for name in ("out", "plain"):
        check_card(tmp_path / name, folders, "emr")


def test_a_dense_merge_saved_from_memory_has_the_card_of_one_on_disk(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    fw.merge("ties", **folders, out=tmp_path / "disk")
    fw.merge("ties", **folders).save(tmp_path / "memory")
    one, two = ((tmp_path / name / "README.md").read_text() for name in ("disk", "memory"))
    assert one == two and "cc-by-nc-4.0" in one


def test_a_licence_that_not_all_models_state_is_not_the_results(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    for expert in folders["experts"].values():
        (expert / "README.md").unlink()
    fw.merge("ties", **folders, out=tmp_path / "out")
    assert "license" not in front(tmp_path / "out")
    assert "not all stated" in (tmp_path / "out" / "README.md").read_text()


def test_a_bases_running_statistics_are_not_said_to_become_a_mean(tmp_path: Path) -> None:
    base = base_of(resnet)
    fw.merge(Smile(rank=2, gate=1), base=base, experts=experts_of(base), out=tmp_path / "out")
    said = json.loads((tmp_path / "out" / "fusewright.json").read_text())
    assert said["report"]["notes"] == [] and said["plan"]["notes"] == []


# --- how the base was opened ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A suite that opens its models without the pooling layer that their class has."""
    from tiny_suite import built

    return built(tmp_path_factory.mktemp("suite"))


def test_a_suites_module_comes_back_as_the_suite_opened_it(tiny: Suite, tmp_path: Path) -> None:
    inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)}
    asked, wanted = [], []
    for name, method in METHODS.items():
        data = tiny.unlabelled(8, limit=16)
        made = fw.merge(method, base=tiny.base, experts=tiny.experts, data=data)
        made.save(tmp_path / name)
        said = json.loads((tmp_path / name / "routed.json").read_text())
        assert said["opens"] == {"class": "ViTModel", "arguments": {"add_pooling_layer": False}}
        model, told = made.module(), {"set_task": "digit"} if method.card.task_id else {}
        for key, value in told.items():
            getattr(model, key)(value)
        with torch.no_grad():
            wanted.append(model(**inputs)[0])
        asked.append((tmp_path / name, inputs, told))
    found = elsewhere(tmp_path, asked)
    assert [one.equal(two) for one, two in zip(found, wanted, strict=True)] == [True] * len(METHODS)


def test_a_suites_head_answers_of_a_loaded_model_as_of_the_one_in_memory(
    tiny: Suite, tmp_path: Path
) -> None:
    data = tiny.unlabelled(8, limit=16)
    made = fw.merge(METHODS["wemoe"], base=tiny.base, experts=tiny.experts, data=data)
    made.save(tmp_path / "out")
    loaded = fw.load(tmp_path / "out")
    assert loaded.pooler is None
    one, two = (tiny.evaluate(model, "digit", limit=8) for model in (loaded, made.module()))
    assert one.columns["loss"].tolist() == two.columns["loss"].tolist()


@pytest.fixture
def opened(folders: dict[str, Any], tmp_path: Path) -> Callable[[Any], Path]:
    """A routed folder whose file says that its base was opened so."""
    def made(said: Any) -> Path:
        fw.merge(METHODS["smile"], **folders, out=tmp_path / "out", overwrite=True)
        edit(tmp_path / "out", lambda one: one.update(opens=said))
        return tmp_path / "out"

    return made


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said = json.loads((folder / "routed.json").read_text())
    change(said)
    (folder / "routed.json").write_text(json.dumps(said))


VIT = "ViTForImageClassification"


@pytest.mark.parametrize("said", [
    "ViTModel", {}, {"class": "pipeline", "arguments": {}},
    {"class": "AutoModel", "arguments": {}}, {"class": ["ViTModel"], "arguments": {}},
    {"class": VIT}, {"class": VIT, "arguments": {"name": "a text"}},
    {"class": VIT, "arguments": {"trust_remote_code": True}},
    {"class": VIT, "arguments": {"_commit_hash": 1}},
])  # fmt: skip
def test_how_a_base_was_opened_names_a_model_switches_and_numbers_alone(
    opened: Callable[[Any], Path], said: Any
) -> None:
    folder = opened(said)
    with pytest.raises(WeightsError, match=r"how the base was opened[\s\S]*opens[\s\S]*module="):
        fw.load(folder)


def test_a_class_that_the_config_does_not_describe_is_named(opened: Callable[[Any], Path]) -> None:
    folder = opened({"class": "BertModel", "arguments": {}})
    with pytest.raises(WeightsError, match=r"does not describe[\s\S]*BertModel[\s\S]*module="):
        fw.load(folder)


def test_a_config_that_is_cut_or_of_another_kind_is_named(opened: Callable[[Any], Path]) -> None:
    folder = opened({"class": VIT, "arguments": {}})
    config = folder / "config.json"
    whole = config.read_text()
    config.write_text(whole[:100])
    with pytest.raises(WeightsError, match=r"not valid JSON[\s\S]*config\.json"):
        fw.load(folder)
    config.write_text(whole.replace('"model_type": "vit"', '"model_type": "of tomorrow"'))
    with pytest.raises(WeightsError, match=r"does not describe[\s\S]*of tomorrow[\s\S]*module="):
        fw.load(folder)


def test_a_description_that_says_nothing_of_it_opens_by_the_config(
    opened: Callable[[Any], Path],
) -> None:
    assert answer(fw.load(opened(None)), vit).isfinite().all()


def test_numbers_of_the_config_are_kept_and_text_is_not() -> None:
    module = base_of(vit)
    said = opening.opening(module, {"num_labels": 4, "dtype": "bfloat16", "device_map": None})
    assert said == {"class": VIT, "arguments": {"num_labels": 4}}
    assert opening.opening(nn.Linear(1, 1), {}) is None


# --- broken descriptions --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models, by their methods."""
    folder, base = tmp_path_factory.mktemp("routed"), base_of(vit)
    base.save_pretrained(folder / "base")
    expert_of(base, 1).save_pretrained(folder / "a")
    expert_of(base, 2).save_pretrained(folder / "b")
    models = {"base": folder / "base", "experts": {name: folder / name for name in ("a", "b")}}
    for name in METHODS:
        fw.merge(METHODS[name], **models, **asked(name), out=folder / name)
    return {name: folder / name for name in METHODS}


@EACH
@pytest.mark.parametrize("text", ["", '{"routed": 1, "layers', "[]", "3", '"x"', "\xff"])
def test_a_file_that_is_no_description_is_named(
    name: str, text: str, routed: dict[str, Path]
) -> None:
    file = routed[name] / "routed.json"
    whole = file.read_bytes()
    file.write_bytes(text.encode("latin-1"))
    try:
        with pytest.raises(WeightsError) as refused:
            fw.load(routed[name])
    finally:
        file.write_bytes(whole)
    assert str(file) in str(refused.value)


def first(said: dict[str, Any]) -> str:
    return next(iter(said["layers"]))


def moved(said: dict[str, Any]) -> None:
    said["layers"]["no.such"] = said["layers"].pop(first(said))


def bare(said: dict[str, Any]) -> None:
    said["layers"][first(said)] = {"kind": said["layers"][first(said)]["kind"]}


CHANGES = {
    "layers: gone": (lambda said: said.pop("layers"), "layers"),
    "layers: a list": (lambda said: said.update(layers=[]), "layers"),
    "layers: of text": (lambda said: said["layers"].update({first(said): "x"}), "layers"),
    "left: gone": (lambda said: said.pop("left"), "left"),
    "left: a number": (lambda said: said.update(left=3), "left"),
    "tied: a number": (lambda said: said.update(tied=3), "tied"),
    "a path that is not there": (moved, "no.such"),
    "a layer without its description": (bare, "not complete"),
}


@EACH
@pytest.mark.parametrize("what", CHANGES)
def test_a_description_that_does_not_fit_names_file_and_key(
    name: str, what: str, routed: dict[str, Path]
) -> None:
    change, key = CHANGES[what]
    file = routed[name] / "routed.json"
    whole = file.read_bytes()
    edit(routed[name], change)
    try:
        with pytest.raises(WeightsError) as refused:
            fw.load(routed[name])
    finally:
        file.write_bytes(whole)
    assert str(file) in str(refused.value) and key in str(refused.value)


def test_a_folder_without_its_description_is_refused(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    fw.merge(METHODS["smile"], **folders, out=tmp_path / "out")
    (tmp_path / "out" / "routed.json").unlink()
    with pytest.raises(WeightsError, match=r"routed\.json"):
        fw.load(tmp_path / "out")


def test_a_network_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    made = fw.merge(EMR(), base=base, experts={"a": expert_of(base, 1)})
    made.save(tmp_path / "out")
    with pytest.raises(WeightsError, match=r"does not say what module[\s\S]*module="):
        fw.load(tmp_path / "out")
    made.unload("a").save(tmp_path / "plain")
    with pytest.raises(PlanError, match=r"does not say what module[\s\S]*config\.json"):
        fw.load(tmp_path / "plain")


@pytest.mark.parametrize("name", ["wemoe", "e_wemoe", "rank_one_moe", "pwe_moe"])
def test_modules_that_are_no_regular_expression_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"'modules' is not valid[\s\S]*regular expression"):
        fw.merge({name: {"modules": "("}}, base=nn.Linear(1, 1), experts={"a": nn.Linear(1, 1)})

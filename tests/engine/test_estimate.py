"""A plan says how long the merge should take, without doing it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import METHODS, models, on_disk, read, same, saved

import fusewright as fw
from fusewright.engine import Options
from fusewright.engine.recipe import make_recipe
from fusewright.errors import OutputError


def planned(given: dict, method: str = "ties", **named: object) -> dict:
    experts = {name: {"model": str(path)} for name, path in given["experts"].items()}
    recipe = make_recipe(method=METHODS[method], base=str(given["base"]), experts=experts)
    return dict(fw.plan(recipe, **named).costs)


@pytest.mark.parametrize("method", METHODS)
def test_every_plan_estimates_its_work(tmp_path: Path, method: str) -> None:
    assert planned(on_disk(tmp_path), method)["seconds_of_work"] >= 1


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    models_before = read(given["base"])
    costs = planned(given, out=tmp_path / "out")
    assert costs["seconds_of_writing"] >= 1
    assert same(models_before, read(given["base"]))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert before == after and not (tmp_path / "out").exists()


def test_work_grows_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.engine import estimate

    monkeypatch.setattr(estimate, "_rehearsed", lambda plan, inputs, job: 1.0)
    one = on_disk(tmp_path / "one", shapes={"layers.0.mlp.weight": (256, 1024)})
    ten = on_disk(tmp_path / "ten", shapes={"layers.0.mlp.weight": (2560, 1024)})
    options = Options(threads=2)
    assert planned(ten, "linear", options=options)["seconds_of_work"] == 5
    assert planned(ten, "linear", options=Options(threads=1))["seconds_of_work"] == 10
    assert planned(one, "linear", options=options)["seconds_of_work"] == 1


def test_large_matrices_are_not_decomposed_for_a_plan(tmp_path: Path) -> None:
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": (1100, 1000)})
    assert "seconds_of_work" not in planned(given, "iso_c")


def test_bad_numbers_are_left_to_the_run(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    origin, experts = models()
    experts["a"]["layers.0.mlp.weight"][0, 0] = float("nan")
    saved(experts["a"], given["experts"]["a"])
    assert "seconds_of_work" not in planned(given)
    assert torch.isfinite(origin["layers.0.mlp.weight"]).all()


def test_an_output_that_could_not_be_written_is_refused(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    with pytest.raises(OutputError, match="input"):
        planned(given, out=given["base"] / "merged")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError):
        planned(given, out=tmp_path / "there")

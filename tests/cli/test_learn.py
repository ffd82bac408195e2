"""``fusewright merge`` with a method that learns, from a recipe alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fusewright as fw
from fusewright.cli._progress import Lines, Pace
from fusewright.engine import Options, load_recipe
from fusewright.engine import run as run_recipe
from fusewright.engine.progress import Progress, fit_told
from fusewright.engine.state import read_state
from fusewright.errors import PlanError
from tiny_suite import built, write_suite

for needed in ("sklearn", "transformers", "pyarrow"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("learn"))


@pytest.fixture
def recipe(suite: Any, tmp_path: Path) -> Path:
    experts = {name: str(suite.experts[name]) for name in suite.spec.merged}
    said = {
        "fusewright": 1, "base": str(suite.base), "experts": experts,
        "method": {"adamerging": {"steps": 2, "batch": 8, "guard": 8, "every": 2}},
        "data": {"suite": str(write_suite(tmp_path)), "pool": str(suite.pool), "limit": 32},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(said))
    return tmp_path / "recipe.yaml"


def test_adamerging_runs_from_a_recipe(run: Any, suite: Any, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("merge", recipe, "-o", out)
    assert found.exit_code == 0, found.stderr
    assert "fitted in" in found.stdout and "numbers learned" in found.stdout
    assert "at the start" in found.stdout and "written in" in found.stdout
    said = json.loads((out / "fusewright.json").read_text())["fitted"]
    assert set(said["tasks"]) == set(suite.spec.merged) and len(said["losses"]) == 2
    assert said["recipe"]["data"]["limit"] == 32
    method = fw.AdaMerging(steps=2, batch=8, guard=8, every=2)
    same = fw.merge(method, base=suite.base, experts=dict(suite.experts),
                    data=suite.unlabelled(limit=32))  # fmt: skip
    for name, tensor in read_state(out).items():
        assert tensor.equal(same.state_dict()[name])


@pytest.mark.parametrize("where", ["guard", "step"])
def test_memory_that_runs_out_is_a_refusal_and_not_a_traceback(
    run: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from fusewright.methods.learned import _fitting, _guard

    def short(*given: Any, **more: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    with monkeypatch.context() as patch:
        begins = (_guard, "answered") if where == "guard" else (_fitting.Fitting, "loss")
        patch.setattr(*begins, short)
        found = run("merge", recipe, "-o", tmp_path / "out")
    assert found.exit_code == 7 and "Traceback" not in found.stderr
    assert "memory ran out" in found.stderr and "batch" in found.stderr
    assert ("goes on at step 0" in found.stderr) == (where == "step")
    assert not (tmp_path / "out").exists()
    assert run("merge", recipe, "-o", tmp_path / "out").exit_code == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_fit(
    run: Any, recipe: Path, tmp_path: Path
) -> None:
    found = run("merge", recipe, "-o", recipe / "out", "--json")
    assert found.exit_code == 5 and "Traceback" not in found.stderr
    assert "The output's parent is not a folder that may be written" in found.output


def test_misspelt_data_are_refused(run: Any, recipe: Path, tmp_path: Path) -> None:
    found = run("merge", recipe, "-o", tmp_path / "out", "--set", "data.splitt=test")
    assert found.exit_code == 2 and "unknown key 'data.splitt'" in found.stderr
    assert "did you mean 'data.split'" in found.stderr
    assert "split, suite, pool, data, seed, variant, limit" in found.stderr  # nearest first
    found = run("merge", recipe, "-o", tmp_path / "out", "--set", "data.suite=digist")
    assert found.exit_code == 2 and "did you mean 'digits'" in found.stderr


def test_from_python_data_are_given_open(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"opened by the command[\s\S]*unlabelled"):
        run_recipe(load_recipe(recipe), tmp_path / "out", Options())


def test_a_fit_shows_steps_loss_and_the_time_left(capsys: Any) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    tell = fit_told(lines.report)
    for done in range(1, 22):
        tell(done, 100, 1 / done)
        now[0] += 1
    text = capsys.readouterr().err.splitlines()
    assert text[0] == "fit: 11 of 100 steps, loss 0.09091, 1 min 29 s left" and len(text) == 2


def test_the_pace_starts_anew_with_another_phase() -> None:
    now = [0.0]
    pace = Pace()
    pace.rate(Progress(10, 20, "fit", "", unit="steps", loss=1.0), now[0])
    now[0] = 2.0
    assert pace.rate(Progress(14, 20, "fit", "", unit="steps", loss=1.0), now[0]) == 2.0
    pace.rate(Progress(1000, 9000, "merge", "w"), now[0])
    now[0] = 3.0
    assert pace.rate(Progress(5000, 9000, "merge", "w"), now[0]) == 4000.0

"""A sweep: what is always there, and that nothing finished is lost or made twice."""

from __future__ import annotations

import json
import multiprocessing
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import fusewright as fw
from fusewright.bench.suite_file import SuiteError
from fusewright.bench.sweep import execute, identity
from fusewright.bench.sweep.run import bench
from fusewright.bench.sweep.store import Store, load_results
from fusewright.bench.sweep.worker import Worker
from fusewright.errors import FusewrightError, OutputError
from tiny_suite import built

for needed in ("sklearn", "transformers", "pyarrow", "optuna", "torchjd"):
    pytest.importorskip(needed)

LIMIT = 60
ALWAYS = ["base", "expert digit", "expert parity", "own expert", "best expert", "ensemble, simple",
          "ensemble, weighted", "ensemble, max", "joint training, sum", "average",
          "task_arithmetic"]  # fmt: skip


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    found = built(tmp_path_factory.mktemp("suite"))
    found.at(1).build(progress=False)
    return found


@pytest.fixture(scope="module")
def swept(suite, tmp_path_factory):
    """(results, folder) of one sweep with a tuned method."""
    out = tmp_path_factory.mktemp("sweep")
    return sweep(suite, out, tune=2), out


def sweep(suite, out, **options):
    given = {"methods": ["ties"], "limit": LIMIT, "progress": False} | options
    return bench(suite, out=out, **given)


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


def scores(cell):
    return {task: each["clean"].score.tolist() for task, each in cell.outcomes.items()}


def test_references_and_baselines_are_always_there(swept):
    results, _ = swept
    assert list(results.rows()) == [*ALWAYS, "task_arithmetic, tuned", "ties", "ties, tuned"]
    assert results.merged == ("digit", "parity") and results.unseen == ("inverted",)
    assert results.facts["failed"] == {}


def test_methods_that_learn_or_route_are_measured_when_they_are_asked_for(suite, tmp_path):
    learns = fw.AdaMerging(steps=2, batch=8, guard=8, every=1)
    results = sweep(suite, tmp_path / "out", methods=[learns, fw.Smile(rank=2, gate=2)],
                    joint=[], tune=1)  # fmt: skip
    assert results.facts["failed"] == {}
    (learned,), (routed,), (base,) = (results.of(row) for row in ("adamerging", "smile", "base"))
    assert learned.requirement == "unlabelled" and routed.requirement == "routed"
    assert "adamerging, tuned" not in results.rows()
    assert learned.costs["extra_parameters"] == 0 and learned.costs["seconds"] > 0
    assert routed.costs["extra_parameters"] > 0 and routed.costs["slowdown"] > 1
    assert (base.costs["stored"], base.costs["bytes"]) == (learned.costs["stored"],
                                                           learned.costs["bytes"])  # fmt: skip
    assert "trained" not in base.costs and routed.costs["trained"] == 0
    merged = fw.merge(fw.Smile(rank=2, gate=2), base=suite.base, experts=suite.experts,
                      data=suite.unlabelled())  # fmt: skip
    sizes = merged.report["parameters"]
    assert {n: routed.costs[n] for n in ("stored", "active", "bytes")} == {
        n: sizes[n] for n in ("stored", "active", "bytes")}  # fmt: skip
    assert base.costs["active"] < routed.costs["active"] < routed.costs["stored"]
    module = merged.module()
    found = suite.evaluate(module, "digit", limit=LIMIT)
    assert found.score.tolist() == routed.outcomes["digit"]["clean"].score.tolist()
    assert scores(routed) != scores(base)


def test_routed_methods_without_data_are_tuned_and_told_the_task(suite, tmp_path):
    methods = [fw.Smile(rank=4, gate=2), fw.Tall(), fw.EMR()]
    results = sweep(suite, tmp_path / "out", methods=methods, joint=[], tune=2)
    assert results.facts["failed"] == {}
    (smile,), (tall,) = results.of("smile, tuned"), results.of("tall, tuned")
    assert (smile.requirement, tall.requirement) == ("labelled", "task id")
    assert "rank = " in smile.note and "gate = " in smile.note and "strictness" in tall.note
    assert "emr, tuned" not in results.rows()
    chosen = fw.merge(tall.method, base=suite.base, experts=suite.experts).module()
    validated = []
    for task in suite.spec.merged:
        chosen.set_task(task)
        found = suite.evaluate(chosen, task, limit=LIMIT)
        assert found.score.tolist() == tall.outcomes[task]["clean"].score.tolist()
        validated.append(suite.evaluate(chosen, task, "validation", LIMIT).value)
    stored = Store(tmp_path / "out")
    trials = [stored.trials(p.stem) for p in (tmp_path / "out" / "cells").glob("*.json")]
    values = [t["value"] for each in trials if each for t in each
              if "strictness" in t["parameters"]]  # fmt: skip
    assert len(values) == 2 and max(values) == np.mean(validated)  # each task was told


def test_labels_to_learn_from_weigh_more_than_routing_and_being_told_the_task_most():
    from fusewright.bench.sweep.cells import requirement_of

    found = {name: requirement_of(getattr(fw, name)())
             for name in ("ParetoSet", "WEMoE", "Smile", "Tall", "AdaMerging", "Ties")}
    assert found == {
        "ParetoSet": "labelled", "WEMoE": "routed", "Smile": "routed", "Tall": "task id",
        "AdaMerging": "unlabelled", "Ties": "none",
    }  # fmt: skip


def test_a_cell_that_was_in_another_class_changes_it_and_is_not_made_again(suite, swept, made):
    out = swept[1]
    path = next(p for p in (out / "cells").glob("*.json")
                if json.loads(p.read_text())["row"] == "ties")  # fmt: skip
    path.write_text(path.read_text().replace('"requirement": "none"', '"requirement": "routed"'))
    results = sweep(suite, out, tune=2)
    assert made == [] and {c.requirement for c in results.of("ties")} == {"none"}
    assert {c.requirement for c in load_results(out).of("ties")} == {"none"}


def test_every_cell_has_an_outcome_for_every_item(swept):
    results, _ = swept
    for cell in results.cells:
        expected = {"digit", "parity"} if cell.row == "own expert" else set(results.tasks)
        assert set(cell.outcomes) == expected
        assert all(len(each["clean"]) == LIMIT for each in cell.outcomes.values())


def test_a_merge_is_measured_as_its_folder_would_be(suite, swept, tmp_path):
    results, _ = swept
    (cell,) = results.of("ties")
    fw.merge(fw.Ties(), base=suite.base, out=tmp_path / "ties",
             experts={name: suite.experts[name] for name in ("digit", "parity")})  # fmt: skip
    for task, found in scores(cell).items():
        assert suite.evaluate(tmp_path / "ties", task, limit=LIMIT).score.tolist() == found


def test_own_and_best_experts_are_experts(suite, swept):
    results, _ = swept
    experts = {n: next(results.of(f"expert {n}")) for n in ("digit", "parity")}
    (own,), (best,) = results.of("own expert"), results.of("best expert")
    assert {t: scores(experts[t])[t] for t in experts} == scores(own)
    assert scores(best) in [scores(cell) for cell in experts.values()]
    assert own.requirement == "task id" and best.requirement == "expert"


def test_an_ensemble_combines_what_the_experts_say(suite, swept):
    from fusewright.methods.outputs import combine

    (cell,) = swept[0].of("ensemble, max")
    task = suite.tasks["digit"]
    batch = next(task.batches(suite.split("digit"), LIMIT))
    with torch.inference_mode():
        said = [task.logits(suite.open(suite.experts[n]), batch) for n in ("digit", "parity")]
    found = cell.outcomes["digit"]["clean"].columns["prediction"]
    assert np.array_equal(found, combine(said, "max").argmax(dim=1).numpy())
    assert cell.costs["slowdown"] > 0
    (base,) = swept[0].of("base")
    sizes = "stored", "active", "bytes"
    assert [cell.costs[n] for n in sizes] == [2 * base.costs[n] for n in sizes]
    (own,) = swept[0].of("own expert")
    assert own.costs["active"] == base.costs["active"] == own.costs["stored"] / 2


def test_tuned_cells_ask_for_labels_and_tell_their_trials(swept):
    results, out = swept
    (cell,) = results.of("ties, tuned")
    assert cell.requirement == "labelled" and "density = " in cell.note
    stored = [p.stem for p in (out / "cells").glob("*.json")]
    trials = [t for key in stored if (t := Store(out).trials(key))]
    assert [len(t) for t in trials] == [2, 2]
    assert {c.requirement for c in results.of("ties")} == {"none"}


def test_costs_are_measured(swept):
    for cell in swept[0].of("ties"):
        assert cell.costs["seconds"] > 0 and cell.costs["bytes_read"] > 0
        assert cell.costs["extra_parameters"] == 0
        assert ("peak_memory" in cell.costs) == (sys.platform == "linux")


def test_results_are_read_as_they_were_given(swept):
    results, out = swept
    found = load_results(out)
    assert [c.row for c in found.cells] == [c.row for c in results.cells]
    assert [scores(c) for c in found.cells] == [scores(c) for c in results.cells]


def test_the_same_sweep_again_makes_nothing(suite, swept, made):
    again = sweep(suite, swept[1], tune=2)
    assert made == []
    assert [scores(c) for c in again.cells] == [scores(c) for c in swept[0].cells]


def test_a_new_method_makes_only_itself(suite, swept, made):
    sweep(suite, swept[1], methods=["ties", "iso_c"], tune=0)
    assert made == ["iso_c"]


def test_other_parameters_and_limits_are_other_cells(suite, swept, made):
    sweep(suite, swept[1], methods=[{"ties": {"density": 0.5}}])
    assert made == ["ties"]
    made.clear()
    sweep(suite, swept[1], limit=LIMIT - 1)
    assert set(made) == {*ALWAYS, "ties"}


def test_another_setting_of_a_method_makes_only_itself(suite, swept, made):
    half, tenth = ({"ties": {"density": density}} for density in (0.5, 0.1))
    assert "ties" in sweep(suite, swept[1], methods=[half]).rows()
    made.clear()
    both = sweep(suite, swept[1], methods=[half, tenth])
    assert made == ["ties(density=0.1)"]
    assert {"ties(density=0.5)", "ties(density=0.1)"} <= set(both.rows())


def test_a_method_whose_code_changed_makes_only_itself(suite, swept, made, monkeypatch):
    source = identity.inspect.getsource
    changed = "fusewright.methods.static._elect"

    def read(module):
        return source(module) + ("# changed" if module.__name__ == changed else "")

    monkeypatch.setattr(identity.inspect, "getsource", read)
    sweep(suite, swept[1], tune=2)
    assert made == ["ties", "ties, tuned"]


def test_other_weights_of_an_expert_are_other_cells(suite, swept, made, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    pool = tmp_path / "pool"
    shutil.copytree(suite.pool, pool, symlinks=True)
    other = fw.suite(suite.pool.parent / "tiny.yaml", pool=pool)
    sweep(other, swept[1])
    assert made == []  # a copy elsewhere is the same models
    path = other.experts["parity"] / "model.safetensors"
    tensors = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    sweep(other, swept[1])
    untouched = {"base", "expert digit", "joint training, sum"}
    assert set(made) == {*ALWAYS, "ties"} - untouched


def test_an_interrupted_sweep_goes_on_where_it_was(suite, tmp_path, made, monkeypatch):
    save = Store.save

    def die(self, key, cell, trials=None):
        if cell.row == "own expert":
            raise KeyboardInterrupt
        save(self, key, cell, trials)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(Store, "save", die)
        sweep(suite, tmp_path)
    finished = made[:-1]
    made.clear()
    sweep(suite, tmp_path)
    assert finished == ["base", "expert digit", "expert parity"]
    assert not set(finished) & set(made) and "own expert" in made


def test_a_damaged_cell_is_made_again_and_no_other(suite, swept, made):
    out = swept[1]
    results = sweep(suite, out)
    keys = json.loads((out / "results.json").read_text())["cells"]
    key = dict(zip(results.rows(), keys, strict=True))["expert parity"]
    victim = out / "cells" / f"{key}.parquet"
    victim.write_bytes(victim.read_bytes()[:-4])
    sweep(suite, out)
    assert made == ["expert parity"]


def test_two_sweeps_on_one_folder_are_refused(suite, tmp_path):
    lock = Store(tmp_path).lock()
    with pytest.raises(OutputError, match="Another run is writing"):
        sweep(suite, tmp_path)
    lock.release()


def test_what_a_method_refuses_is_told_and_the_others_go_on(suite, tmp_path):
    zero = {"ties": {"weight": 0.0}}
    broken = [{"linear": {"weight": {"digit": 1.0, "parity": -1.0}}}]
    results = sweep(suite, tmp_path, methods=[zero, *broken])
    assert list(results.facts["failed"]) == ["linear"]
    assert "sum to zero" in results.facts["failed"]["linear"]
    assert "ties" in results.rows() and "linear" not in results.rows()


def test_seeds_and_subsets_are_cells_of_their_own(tmp_path):
    everyone = {"digit": "digit", "parity": "parity", "inverted": "inverted"}
    three = built(tmp_path, experts=everyone)
    results = sweep(three, tmp_path / "out", seeds=2, subsets=[2], draws=2)
    found = list(results.of("ties"))
    assert {c.seed for c in found} == {0, 1}
    subsets = {c.experts for c in found if len(c.experts) == 2}
    assert len(subsets) == 2, "draws are different subsets"
    assert all(set(c.outcomes) == set(c.experts) for c in found)
    assert all(len([c for c in found if c.experts == s]) == 2 for s in subsets)


@pytest.mark.parametrize(
    "options, part",
    [({"subsets": [2]}, "2 to 1"), ({"tune": -1}, "tune >= 0"), ({"seeds": 3}, "1 to 2")],
)
def test_numbers_that_make_no_sense_are_refused(suite, tmp_path, options, part):
    with pytest.raises(SuiteError, match=part):
        sweep(suite, tmp_path, **options)


def test_a_method_of_a_notebook_is_refused_where_other_processes_would_import_it(
    suite, tmp_path, monkeypatch
):
    typed = type("Typed", (fw.TaskArithmetic,), {"__module__": "__main__", "name": "typed"})
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    with pytest.raises(FusewrightError, match=r"notebook[\s\S]*Typed[\s\S]*jobs=1"):
        bench(suite, [typed()], out=tmp_path, joint="none", jobs=2, progress=False)
    assert not list((tmp_path / "cells").glob("*.json"))


def test_processes_give_the_same_and_a_killed_one_loses_nothing(
    suite, swept, tmp_path, monkeypatch
):
    def kill(row):
        for child in multiprocessing.active_children():
            child.kill()

    in_processes = execute._in_processes
    with monkeypatch.context() as broken, pytest.raises(FusewrightError, match="was killed"):
        broken.setattr(execute, "_in_processes", lambda *a: in_processes(*a[:-1], kill))
        sweep(suite, tmp_path, jobs=2)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").glob("*.json")}
    assert kept
    results = sweep(suite, tmp_path, jobs=2)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    expected = {c.row: scores(c) for c in swept[0].cells if ", tuned" not in c.row}
    assert {c.row: scores(c) for c in results.cells} == expected


def test_a_notebook_needs_no_folder(suite, tmp_path):
    results = fw.bench(suite, methods=["average", fw.IsoC()], limit=5, progress=False)
    assert {"average", "iso_c", "task_arithmetic"} <= set(results.rows())
    assert "iso_c" in results.to_html(tmp_path / "report.html").read_text("utf-8")

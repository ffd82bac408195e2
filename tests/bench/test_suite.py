"""A suite opened: its models, tasks and evaluation are what the pool's own code says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fusewright as fw
from fusewright.bench.digits import evaluate, model, tasks
from fusewright.bench.suite_file import SuiteError
from fusewright.tasks import DataError
from fusewright.tasks.adaptation import adaptation
from tiny_suite import TASKS, built, write_suite

pytest.importorskip("sklearn")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return built(tmp_path_factory.mktemp("suite"))


def test_outcomes_are_those_of_the_digits_own_evaluation(suite):
    heads = {t: suite.heads[t.name] for t in tasks.TASKS if t.name in TASKS}
    opened = model.open_model(suite.experts["digit"])
    expected = evaluate.outcomes(opened, heads, tasks.splits()["test"])
    for task, right in zip(heads, expected, strict=True):
        found = suite.evaluate(suite.experts["digit"], task.name)
        assert np.array_equal(found.score, right)
        assert found.metric == "accuracy" and len(found.columns["loss"]) == 600


def test_a_limit_keeps_the_first_rows(suite):
    whole, part = (suite.evaluate(suite.base, "digit", limit=n) for n in (None, 37))
    assert len(part) == 37 and np.array_equal(part.score, whole.score[:37])


def test_evaluation_leaves_the_module_as_it_was(suite):
    module = suite.open(suite.base).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    suite.evaluate(module, "digit", limit=5)
    assert module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_unlabelled_batches_have_no_labels_and_come_from_every_merged_task(suite):
    batches = list(suite.unlabelled(size=64))
    assert not any({"label", "labels"} & set(batch) for batch in batches)
    assert {batch["task"] for batch in batches} == {"digit", "parity"}
    seen = sorted(n for b in batches if b["task"] == "digit" for n in b["items"].tolist())
    assert seen == list(range(200))


def test_the_suites_own_heads_beside_its_data_say_nothing_new(suite):
    data = suite.unlabelled()
    assert adaptation(data, suite.heads) is data
    with pytest.raises(DataError, match="bring their own heads"):
        adaptation(data, {**suite.heads, "digit": torch.zeros(10, 16)})


def test_a_missing_model_says_how_to_build_it(tmp_path):
    found = fw.suite(write_suite(tmp_path), pool=tmp_path / "nowhere")
    with pytest.raises(SuiteError) as refusal:
        found.check()
    build = f"fusewright suite build {tmp_path / 'tiny.yaml'} --pool '{tmp_path / 'nowhere'}'"
    assert refusal.value.fix == build  # a file's name is not enough to find it
    for other in (found.at(1), pickle.loads(pickle.dumps(found.at(1)))):
        with pytest.raises(SuiteError) as refusal:
            other.check()
        assert refusal.value.fix == f"{build} --seeds 2"  # so many trainings; 1 would be seed 0's
    with pytest.raises(SuiteError, match="suite build digits --pool"):
        fw.suite("digits", pool=tmp_path / "nowhere").check()


def test_a_seed_is_one_of_the_suites(tmp_path):
    path = write_suite(tmp_path, seeds=[5, 3, 8])
    assert fw.suite(path).seed == 5
    with pytest.raises(SuiteError, match=r"has no seed 7[\s\S]*5, 3, 8"):
        fw.suite(path, seed=7)
    with pytest.raises(SuiteError, match="has no seed 0"):
        fw.suite(path).at(0)
    with pytest.raises(SuiteError, match=r"--seeds 3$"):
        fw.suite(path, pool=tmp_path / "nowhere", seed=8).check()


def test_a_head_of_other_classes_is_refused(tmp_path):
    found = built(tmp_path)
    path = found.root / "heads.safetensors"
    heads = load_file(path)
    save_file({**heads, "parity": heads["digit"].clone()}, path)
    with pytest.raises(SuiteError, match="head of 'parity' is for other classes") as caught:
        found.check()
    assert "2 classes" in str(caught.value) and "(10, 16)" in str(caught.value)


def test_a_missing_head_is_refused(tmp_path):
    found = built(tmp_path)
    path = found.root / "heads.safetensors"
    save_file({"digit": load_file(path)["digit"]}, path)
    with pytest.raises(SuiteError, match="'parity' has no head"):
        found.check()


def test_a_task_of_unknown_kind_names_the_nearest(tmp_path):
    specs = {"digit": {"kind": "digit"}}
    found = built(tmp_path, tasks=specs, experts={"digit": "digit"})
    with pytest.raises(SuiteError, match="did you mean 'digits'"):
        found.check()


def test_an_unknown_task_or_variant_names_the_nearest(suite):
    with pytest.raises(SuiteError, match="did you mean 'digit'"):
        suite.evaluate(suite.base, "digitt")
    with pytest.raises(SuiteError, match="has no variant 'lora'"):
        suite.at(0, "lora")


def test_building_again_changes_nothing(suite):
    before = suite.root.resolve(), (suite.base / "model.safetensors").stat().st_mtime_ns
    suite.build(progress=False)
    assert (suite.root.resolve(), (suite.base / "model.safetensors").stat().st_mtime_ns) == before


def test_a_suite_goes_to_other_processes(suite):
    other = pickle.loads(pickle.dumps(suite))
    assert (other.seed, other.pool, other.spec) == (suite.seed, suite.pool, suite.spec)


def test_a_suite_of_public_models_has_nothing_to_build(tmp_path):
    found = fw.suite(write_suite(tmp_path, build=None), pool=tmp_path)
    with pytest.raises(SuiteError, match="nothing to build"):
        found.build()

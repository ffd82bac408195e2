"""Suites as data: what is read, and what is refused with the nearest that would be right."""

from __future__ import annotations

import pytest

from fusewright.bench.suite_file import SuiteError, find_suite, read_suite, shipped
from tiny_suite import write_suite


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_suite_that_is_shipped_can_be_read(name):
    spec = read_suite(find_suite(name))
    assert spec.title and spec.licence and set(spec.merged) <= set(spec.experts)


def refused(path, *parts):
    with pytest.raises(SuiteError) as caught:
        read_suite(path)
    for part in parts:
        assert part in str(caught.value)


def test_tasks_with_experts_are_merged_and_the_others_unseen(tmp_path):
    spec = read_suite(write_suite(tmp_path))
    assert spec.merged == ["digit", "parity"] and spec.unseen == ["inverted"]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"expert": {}}, ["unknown key 'expert'", "did you mean 'experts'?"]),
        ({"opens": {"modell": "ViTModel"}}, ["'opens.modell'", "did you mean 'model'?"]),
        ({"tasks": {"digit": {"kind": "digits", "split": {}}}}, ["did you mean 'splits'?"]),
        ({"tasks": {"digit": {}}}, ["'tasks.digit.kind' is missing"]),
        ({"suite": 2}, ["newer schema", "pip install --upgrade"]),
        ({"suite": "1"}, ["schema version is not understood", "'1'"]),
        ({"merged": ["digti"]}, ["merged names 'digti'", "no task", "did you mean 'digit'?"]),
        ({"merged": ["digit", "parity", "digit"]}, ["merged names 'digit' twice"]),
        ({"merged": ["inverted"]}, ["merged names 'inverted'", "no expert"]),
        ({"unseen": ["digit"]}, ["merged or unseen, not both", "digit"]),
        ({"experts": {}}, ["nothing is merged"]),
        ({"seeds": ["first"]}, ["'seeds.0' is not valid", "'first'"]),
        ({"variants": {"lora": {"experts": {"digits": "x"}}}}, ["variants.lora", "'digit'"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, parts):
    refused(write_suite(tmp_path, **changes), *parts)


@pytest.mark.parametrize(
    "text, part",
    [
        ("title: &a x\nbase: *a\n", "anchors and aliases are not allowed"),
        ("title: !!python/name:os.system x\n", "tags are not allowed"),
        ("title: x\ntitle: y\n", "'title' is given twice"),
        ("- a list\n", "a suite is a mapping"),
        ("title: [\n", "not plain YAML"),
    ],
)
def test_only_plain_yaml_is_read(tmp_path, text, part):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    refused(path, part, "suite.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    refused(path, "cannot be read")


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(SuiteError, match="did you mean 'digits'"):
        find_suite("digit")


def test_the_digest_follows_what_results_depend_on(tmp_path):
    spec = read_suite(write_suite(tmp_path))
    assert read_suite(write_suite(tmp_path, title="other")).digest() == spec.digest()
    assert read_suite(write_suite(tmp_path, seeds=[0, 1, 2])).digest() == spec.digest()
    words = {n: {"kind": "digits", "question": "?", "licence": "x"} for n in spec.tasks}
    plain = {n: {"kind": "digits"} for n in spec.tasks}
    digests = [read_suite(write_suite(tmp_path, tasks=t)).digest() for t in (words, plain)]
    assert digests[0] == digests[1] != spec.digest()  # classes were said
    assert read_suite(write_suite(tmp_path, merged=["digit"])).digest() != spec.digest()


def test_a_pool_is_found_again_when_only_the_questions_change(tmp_path):
    spec = read_suite(write_suite(tmp_path))
    assert read_suite(write_suite(tmp_path, merged=["digit"])).pool_digest() == spec.pool_digest()
    other = {"builder": "digits", "parameters": {"width": 32}}
    assert read_suite(write_suite(tmp_path, build=other)).pool_digest() != spec.pool_digest()

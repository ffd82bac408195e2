"""``fusewright suite`` and ``fusewright bench``, as they are typed."""

from __future__ import annotations

import json

import pytest

from tiny_suite import write_suite

for needed in ("sklearn", "transformers", "pyarrow"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_suite(folder), "--pool", folder / "pool"


def test_suites_are_listed(run):
    found = run("suite", "list")
    assert found.exit_code == 0 and "digits" in found.stdout
    assert "digits" in json.loads(run("suite", "list", "--json").stdout)


@pytest.mark.parametrize(("suite", "data"), [
    ("digits", "none to be given"), ("vision-mini", "not given: --data DIR"),
    ("clip-vit-b32", "the Hugging Face Hub"),
])  # fmt: skip
def test_a_suite_says_where_its_data_come_from(run, suite, data):
    assert data in run("suite", "show", suite).stdout


def test_a_suite_is_shown_before_it_is_built(run, tiny):
    found = run("suite", "show", *tiny)
    assert found.exit_code == 0 and "which digit?" in found.stdout and "unseen" in found.stdout


def test_an_unknown_suite_is_a_mistake_in_the_command(run):
    found = run("suite", "show", "digist")
    assert found.exit_code == 2 and "did you mean 'digits'?" in found.stderr


def test_what_is_built_is_named(run, tiny):
    found = run("suite", "build", *tiny)
    assert found.exit_code == 0 and found.stdout.strip().endswith("seed-0")


def test_no_fewer_trainings_are_built_than_were_asked_for(run, tiny):
    found = run("suite", "build", *tiny, "--seeds", 3)
    assert found.exit_code == 2 and "1 to 2" in found.stderr


def test_the_regime_is_printed_and_doubts_are_an_exit_code(run, tiny):
    assert run("suite", "build", *tiny).exit_code == 0
    found = run("suite", "check", *tiny, "--limit", 30, "--json")
    said = json.loads(found.stdout)
    assert set(said["tasks"]) == {"digit", "parity"} and len(said["cosines"]) == 1
    assert found.exit_code == bool(said["doubts"])


def test_a_sweep_prints_its_table_and_writes_a_report(run, tiny, tmp_path):
    found = run("bench", *tiny, "--methods", "ties,drop >> elect", "--limit", 20, "-o", tmp_path)
    assert found.exit_code == 0, found.stderr
    for row in ("base", "own expert", "ties", "drop-elect", "average", "task_arithmetic"):
        assert row in found.stdout
    assert (tmp_path / "report.html").stat().st_size and (tmp_path / "results.json").is_file()
    again = run("bench", *tiny, "--methods", "ties", "--limit", 20, "-o", tmp_path, "--json")
    said = json.loads(again.stdout)
    assert {c["row"] for c in said["cells"]} >= {"ties", "average"} and said["files"]


def test_a_method_that_fails_is_told_and_is_an_exit_code(run, tiny, tmp_path):
    found = run("bench", *tiny, "--methods", "slerpp", "--limit", 5, "-o", tmp_path)
    assert found.exit_code == 2 and "did you mean 'slerp'?" in found.stderr


def test_a_table_that_is_not_there_is_refused_before_anything_is_measured(run, tiny, tmp_path):
    found = run("bench", *tiny, "--limit", 5, "--against", "publishd", "-o", tmp_path / "out")
    assert found.exit_code == 2 and "--against published" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--subsets", "two"), ("--tune", "-1"), ("--limit", "1")])
def test_numbers_are_checked(run, tiny, tmp_path, option):
    assert run("bench", *tiny, *option, "-o", tmp_path).exit_code == 2

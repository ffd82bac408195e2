"""``inspect``, ``check``, ``verify``, ``methods`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusewright.methods.registry import registry


def test_inspect_lists_tensors(run: Any, models: Path) -> None:
    result = run("inspect", models / "base")
    assert result.exit_code == 0 and "layers.1.mlp.weight" in result.stdout


def test_inspect_compares_as_json(run: Any, models: Path) -> None:
    found = json.loads(run("inspect", models / "base", models / "a", "--json").stdout)
    assert found["comparison"]["experts"] == ["a"]


def test_inspect_says_in_which_subspace_task_vectors_lie(run: Any, models: Path) -> None:
    names = models / "base", models / "a"
    text = run("inspect", *names, "--subspace")
    assert text.exit_code == 0 and "leading" in text.stdout and "random" in text.stdout
    found = json.loads(run("inspect", *names, "--subspace", "--json").stdout)["subspaces"]
    assert found["matrices"] and found["experts"] == ["a"]
    assert run("inspect", names[0], "--subspace").exit_code == 4


def test_check_passes_experts_of_the_base_and_refuses_other_shapes(run: Any, models: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    assert run("check", models / "base", models / "a", models / "b").exit_code == 0
    save_file({"layers.0.mlp.weight": np.ones((4, 8), "f4")}, models / "b/model.safetensors")
    result = run("check", models / "base", models / "b", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)


def test_verify_passes_what_was_published_and_names_what_changed(run: Any, models: Path) -> None:
    run("merge", models / "recipe.yaml", "-o", models / "out")
    whole = run("verify", models / "out")
    assert whole.exit_code == 0 and "intact" in whole.stdout
    file = models / "out/model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    text = run("verify", models / "out")
    assert text.exit_code == 1 and "changed: model.safetensors" in text.stdout
    found = json.loads(run("verify", models / "out", "--json").stdout)
    assert found["ok"] is False and found["tensors"] == ["layers.1.mlp.weight"]


def test_verify_refuses_a_folder_of_others(run: Any, models: Path) -> None:
    result = run("verify", models / "base")
    assert result.exit_code == 3 and "fusewright.json" in result.stderr


def test_methods_lists_all(run: Any) -> None:
    lines = run("methods").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(registry())


@pytest.mark.parametrize("name", list(registry()))
def test_methods_shows_each_parameter_with_its_default(run: Any, name: str) -> None:
    method = registry()[name]
    card = json.loads(run("methods", name, "--json").stdout)
    assert {p["name"]: p["default"] for p in card["parameters"]} == method().spec()[name]
    assert all(p["type"] and p["type"] != "any" for p in card["parameters"])
    text = run("methods", name)
    assert text.exit_code == 0 and all(field in text.stdout for field in method.model_fields)


def test_types_name_choices_and_bounds(run: Any) -> None:
    card = json.loads(run("methods", "ties", "--json").stdout)
    types = {p["name"]: p["type"] for p in card["parameters"]}
    assert types["density"] == "number > 0 ≤ 1" and types["scope"] == "model | tensor"


def test_an_unknown_method_names_the_nearest(run: Any) -> None:
    result = run("methods", "tie")
    assert result.exit_code == 2 and "ties" in result.stderr


def test_schema_accepts_and_refuses_as_the_reader_does(run: Any) -> None:
    schema = json.loads(run("schema").stdout)
    assert set(schema["required"]) == {"method", "experts"}
    assert "ties" in schema["$defs"] and "density" in schema["$defs"]["ties"]["properties"]


def test_demo_prints_its_tables_or_its_json(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    demo = pytest.importorskip("fusewright.bench.demo")

    class Board:
        def to_json(self) -> dict[str, int]:
            return {"schema": 1}

        def tables(self, width: int) -> list[Table]:
            assert width > 80
            return [Table("first"), Table("second")]

    calls: list[tuple[Path, bool]] = []
    monkeypatch.setattr(
        demo, "run_demo", lambda out, progress: calls.append((out, progress)) or Board()
    )
    shown = run("demo", "-o", tmp_path)
    assert shown.exit_code == 0 and "second" in shown.stdout
    assert f"{tmp_path}/report.html" in shown.stdout
    assert json.loads(run("demo", "-o", tmp_path, "--json").stdout) == {"schema": 1}
    assert calls == [(tmp_path, True), (tmp_path, False)]


def test_a_union_of_types_is_named_with_all_its_members(run: Any) -> None:
    card = json.loads(run("methods", "pwe_moe", "--json").stdout)
    types = {each["name"]: each["type"] for each in card["parameters"]}
    assert types["preference"] == "object | array | null"
    text = run("methods", "pwe_moe").stdout
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["preference", "None"]]
    assert "object | array | null" in line
    ties = json.loads(run("methods", "ties", "--json").stdout)["parameters"]
    assert "object" not in next(each for each in ties if each["name"] == "density")["type"]


def test_a_search_for_backdoors_needs_a_suite_and_a_suite_a_search(run: Any) -> None:
    for given in (("--backdoor",), ("--suite", "digits")):
        result = run("inspect", "merged", *given)
        assert result.exit_code == 2 and "--backdoor MODEL --suite NAME" in result.stderr


def test_a_search_names_a_model_that_is_not_there_before_it_begins(
    run: Any, tmp_path: Path
) -> None:
    from tiny_suite import write_suite

    asked = ("inspect", "--backdoor", tmp_path, "./nothing/x/y", "--suite", write_suite(tmp_path))
    found, plain = run(*asked), run("inspect", "./nothing/x/y")
    assert found.exit_code == plain.exit_code == 3
    assert found.stderr == plain.stderr and "neither a path that exists" in found.stderr


def test_a_search_says_each_class_and_that_nothing_is_proven(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    from tiny_suite import built

    suite = built(tmp_path)
    asked = ("inspect", "--backdoor", suite.base, "--suite", tmp_path / "tiny.yaml", "--pool",
             tmp_path / "pool", "--limit", "8", "--threads", "1")  # fmt: skip
    (found,) = json.loads(run(*asked, "--json").stdout).values()
    assert [(risk["task"], risk["target"]) for risk in found["risks"]] == [
        *(("digit", digit) for digit in range(10)), ("parity", 0), ("parity", 1),
    ]  # fmt: skip
    assert "Nothing here shows that a model has no backdoor" in found["caution"]
    text = run(*asked)
    assert found["caution"] in text.stdout and "searching parity" in text.stderr

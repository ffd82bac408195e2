"""``fusewright finetune``: its table, its JSON, its refusals, its completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for _needed in ("sklearn", "transformers", "peft", "torchjd"):
    pytest.importorskip(_needed)

from tiny_suite import built  # noqa: E402

WORDS = ("--steps", 2, "--limit", 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    root: Path = tmp_path_factory.mktemp("suite")
    built(root)
    return root


def command(folder: Path, out: Path, *more: object) -> tuple[object, ...]:
    suite = folder / "tiny.yaml", "--pool", folder / "pool"
    return ("finetune", *suite, "--task", "parity", "-o", out, *WORDS, *more)


def test_scores_before_and_after_are_a_table(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run(*command(folder, tmp_path / "x", "--how", "l-lora", "--rank", 2))
    assert result.exit_code == 0, result.output
    assert "accuracy (percent), validation" in result.stdout and "\nbase " in result.stdout
    assert (tmp_path / "x" / "adapter_config.json").is_file()


def test_json_has_every_loss(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run(*command(folder, tmp_path / "x", "--json"))
    found = json.loads(result.stdout)
    assert len(found["losses"]) == 2 and found["how"] == "full" and found["before"] is not None


def test_the_expert_can_be_merged_by_the_command(run: Any, folder: Path, tmp_path: Path) -> None:
    assert run(*command(folder, tmp_path / "x", "--how", "lora", "--json")).exit_code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"fusewright: 1\nmethod: task_arithmetic\nexperts: ['{tmp_path}/x']\n"
                      f"base: '{folder}/pool/seed-0/base'\n")  # fmt: skip
    result = run("merge", recipe, "-o", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.output


def test_refusals_are_json_too(run: Any, folder: Path, tmp_path: Path) -> None:
    result = run(*command(folder, tmp_path / "x", "--how", "lorra", "--json"))
    assert result.exit_code == 2 and "lora" in json.loads(result.stdout)["error"]["fix"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("digits --task par", "parity"), ("digits --how l-", "l-lora"), ("digi", "digits")],
)
def test_it_completes(words: str, expected: str) -> None:
    env = {**os.environ, "_FUSEWRIGHT_COMPLETE": "complete_bash",
           "COMP_WORDS": f"fusewright finetune {words}",
           "COMP_CWORD": str(1 + len(words.split()))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from fusewright.cli import main; main()"], env=env,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [expected], done.stderr

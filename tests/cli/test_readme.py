"""The README: its table is that of the cards, its snippets run as written."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def demo(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small models, under the names that the README's snippets use."""
    names = sorted(set(re.findall(r"out/demo/models/(\w+)", README)))
    for name in names:
        source = models / ("base" if name == "base" else "a")
        shutil.copytree(source, models / "out/demo/models" / name)
    monkeypatch.chdir(models)
    return models


def test_the_table_is_that_of_the_cards() -> None:
    tool = runpy.run_path(str(ROOT / "tools/readme.py"))
    assert tool["updated"](README) == README, "run: make readme"
    assert tool["table"]() in README


def test_its_experts_are_the_demos() -> None:
    from fusewright.bench.digits.tasks import TASKS

    names = set(re.findall(r"out/demo/models/(\w+)", README)) - {"base"}
    assert names <= {task.name for task in TASKS}


def test_the_first_merge_is_short_and_runs(demo: Path, capsys: Any) -> None:
    first, *others = snippets("python")
    assert len([line for line in first.splitlines() if line]) <= 8
    for code in (first, *others):
        exec(code, names := {"fw": __import__("fusewright")})
    assert capsys.readouterr().out.strip() == "512 True" and names["method"]
    assert (demo / "out/first-merge/model.safetensors").exists()


def test_the_recipe_and_its_commands_run(demo: Path, run: Any) -> None:
    recipe, *_ = snippets("yaml")
    (demo / "recipe.yaml").write_text(recipe)
    commands = re.findall(r"^fusewright (.*?)(?: {2,}#.*)?$", "\n".join(snippets("sh")), re.M)
    assert len(commands) == 5
    for command in commands:
        result = run(*command.split())
        assert result.exit_code == 0, f"{command}\n{result.output}"

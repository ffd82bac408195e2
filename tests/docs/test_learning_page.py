"""docs/learning.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fusewright.engine.recipe import make_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "learning.md").read_text()


def test_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 5
    names: dict[str, object] = {"__name__": "learning"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"learning.md, block {number}", "exec", dont_inherit=True), names)


def test_its_recipe_is_one() -> None:
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    said = yaml.safe_load(recipe)
    assert make_recipe(**{k: v for k, v in said.items() if k != "fusewright"}).data is not None

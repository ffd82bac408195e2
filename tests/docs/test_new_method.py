"""docs/new-method.md runs as written, and an entry point makes a method known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.methods import registry as registry_module
from fusewright.methods.contract import Method

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's Python blocks define, run in order as one program."""
    names: dict[str, Any] = {"__name__": "new_method"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 5
    for number, block in enumerate(blocks, 1):
        code = compile(block, f"{PAGE.name}, block {number}", "exec", dont_inherit=True)
        exec(code, names)
    return names


def test_the_page_runs(page: dict[str, Any]) -> None:
    assert {"Median", "Clip", "BestScale", "ByKind", "NearestMean"} <= page.keys()


@pytest.mark.parametrize(
    "name", ["Median", "Clip", "BestScale", "ByKind", "Nearest", "NearestMean"]
)
def test_the_methods_are_short(page: dict[str, Any], name: str) -> None:
    block = re.search(rf"^class {name}\(.*?(?=^\S|\Z)", PAGE.read_text(), re.M | re.S)
    assert block is not None
    code = re.sub(r'""".*?"""', "", block.group(), flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


class _Point:
    """What an installed package's entry point looks like."""

    def __init__(self, name: str, target: object) -> None:
        self.name, self.value, self._target = name, f"my_package:{name}", target

    def load(self) -> object:
        return self._target


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Any:
    def offer(*targets: object) -> dict[str, type[Method]]:
        points = [_Point(getattr(t, "__name__", "thing"), t) for t in targets]
        monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
        registry_module.registry.cache_clear()
        return registry_module.registry()

    yield offer
    registry_module.registry.cache_clear()


def test_an_entry_point_makes_a_method_known(page: dict[str, Any], offered: Any) -> None:
    assert offered(page["Median"])["median"] is page["Median"]
    assert registry_module.parse_method("median") == page["Median"]()


def test_a_name_is_offered_once(page: dict[str, Any], offered: Any) -> None:
    with pytest.raises(RecipeError, match="two packages"):
        offered(page["Median"], page["Median"])


def test_only_methods_are_taken(offered: Any) -> None:
    with pytest.raises(RecipeError, match="not a fusewright method"):
        offered(dict)

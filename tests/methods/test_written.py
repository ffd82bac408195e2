"""Methods in one line of text, and back."""

from __future__ import annotations

from typing import Any

import pytest

from fusewright.bench.entries import entries
from fusewright.errors import RecipeError
from fusewright.methods.learned import AdaMerging
from fusewright.methods.registry import parse_method
from fusewright.methods.static import Drop, Elect, IsoC, Ties, Trim
from fusewright.methods.written import call, called, listed


@pytest.mark.parametrize(
    ("text", "method"),
    [("ties", Ties()), ("ties()", Ties()), ("ties(density=0.3)", Ties(density=0.3)),
     ("ties(density={layers: [0.1, 0.2]}, scale=2)",
      Ties(density={"layers": [0.1, 0.2]}, scale=2)),
     ("trim(density=0.3) >> elect", Trim(density=0.3) >> Elect()),
     ("adamerging(merger=[trim, agree], steps=3)", AdaMerging(merger=["trim", "agree"], steps=3)),
     ("adamerging(merger='trim >> agree')", AdaMerging(merger="trim >> agree")),
     ("adamerging(profile=plus)", AdaMerging.profile("plus"))],
)  # fmt: skip
def test_text_says_a_method_with_parameters(text: str, method: Any) -> None:
    assert parse_method(text) == method


def test_parameters_beside_the_text_come_last() -> None:
    assert parse_method("ties(density=0.3)", {"scale": 2}) == Ties(density=0.3, scale=2)
    assert parse_method("ties(density=0.3)", {"density": 0.1}) == Ties(density=0.1)


@pytest.mark.parametrize(
    "text", ["ties(density=0.3", "ties density=0.3)", "ties(0.3)", "ties(=3)", "ties(density=0.3)x",
             "ties(density=1, density=1)", "ties(density=[)", "ties(density={a: 'b)", "drop >>",
             ">> elect", ""],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_method(text)


@pytest.mark.parametrize("parameters", [{}, {"a": 1, "b": [1, {"c": None}], "d": "x, y", "e": 0.1}])
def test_what_is_written_is_read_back(parameters: dict[str, Any]) -> None:
    assert called(call("name", parameters)) == ("name", parameters)


def test_lists_are_parted_outside_brackets() -> None:
    assert listed("a, b(c=[1, 2]),, {d, e}") == ["a", "b(c=[1, 2])", "{d, e}"]
    assert listed("a >> b(c='>>')", ">>") == ["a", "b(c='>>')"]


def test_settings_of_one_method_have_rows_of_their_own() -> None:
    found, _ = entries(3, ["iso_c", "ties", "ties(density=0.3)", Drop(density=0.5) >> Elect()])
    assert [one.key for one in found] == ["iso_c", "ties", "ties(density=0.3)", "drop-elect"]
    assert [one.method for one in found[:2]] == [IsoC(), Ties()]
    assert found[2].title == found[1].title + "(density=0.3)"
    found, _ = entries(3, ["drop(density=0.5) >> elect", "drop >> elect(scale=2)"])
    assert [one.key for one in found] == ["drop(density=0.5)-elect", "drop-elect(scale=2.0)"]


@pytest.mark.parametrize("twice", [["ties", "ties()"], ["ties", "ties(scale=1)"]])
def test_one_method_twice_is_refused(twice: list[str]) -> None:
    with pytest.raises(RecipeError, match="given twice"):
        entries(3, twice)


def test_where_plain_models_are_wanted_routed_methods_are_left_out() -> None:
    kept, left = entries(3, routed=False)
    assert not {"smile", "emr"} & {one.key for one in kept} and "plain model" in left["smile"]
    assert {"smile", "emr"} <= {one.key for one in entries(3)[0]}
    with pytest.raises(RecipeError, match="bench digits --methods smile"):
        entries(3, ["ties", "smile"], routed=False)

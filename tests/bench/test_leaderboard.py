"""Rows, classes, tables and the report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from fusewright.bench.entries import entries, entry
from fusewright.bench.leaderboard import Leaderboard, measured, without_repeats
from fusewright.errors import FusewrightError

TASKS = {"odd <b>": "even or odd?", "large": "five or more?"}


def outcomes(rate: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 2, 80)) < rate


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    own, average = outcomes(0.95, 0), outcomes(0.7, 1)

    def row(key, requirement, correct, **facts):
        return measured(key, key.title(), requirement, correct, own, list(TASKS), average, **facts)

    rows = (
        row("base", "reference", outcomes(0.5, 2), note="pre-trained"),
        row("own expert", "reference", own),
        row("expert large", "expert", outcomes(0.6, 3)),
        row("average", "none", average, method={"average": {}}, seconds=0.1),
        row("ties", "none", outcomes(0.85, 4), seconds=0.2),
        row("ties-tuned", "labelled", outcomes(0.9, 5), chosen={"scale": [0.3, 0.5, 1.0]}),
    )
    return Leaderboard("Two <tasks>", TASKS, rows, (0, 1, 2), 80, {"slerp": "two at most"})


def test_a_row_is_in_percent_and_the_reference_is_100(board):
    own, ties = board["own expert"], board["ties"]
    assert own.normalised.value == own.normalised.low == own.normalised.high == 100
    assert own.seeds == (100, 100, 100)
    assert 80 < ties.mean.value < 90 < 100 * 0.9 / 0.95 + 5
    assert ties.mean.value == pytest.approx(np.mean([c.value for c in ties.accuracy.values()]))
    assert ties.gain is not None and ties.gain.low > 0


def test_rows_are_ranked_within_their_class_only(board):
    classes = board.classes()
    assert list(classes) == ["reference", "expert", "none", "labelled"]
    assert [row.key for row in classes["none"]] == ["ties", "average"]
    assert [row.key for row in classes["labelled"]] == ["ties-tuned"]


def test_rows_that_agree_in_every_answer_become_one(board):
    same, other = outcomes(0.8, 6), outcomes(0.8, 7)
    found = {"a": same, "b": same.copy(), "c": other, "d": same}
    rows = [measured(k, k, "labelled" if k == "d" else "none", v, same, list(TASKS))
            for k, v in found.items()]  # fmt: skip
    kept = without_repeats(rows, found)
    assert [(row.key, row.also) for row in kept] == [("a", ("b",)), ("c", ()), ("d", ())]


def test_an_unknown_row_is_a_key_error(board):
    with pytest.raises(KeyError):
        board["nothing"]


def test_the_json_is_complete_and_plain(board, tmp_path):
    board.save(tmp_path / "leaderboard.json")
    found = json.loads((tmp_path / "leaderboard.json").read_text())
    assert found["schema"] == 1 and found["seeds"] == [0, 1, 2]
    ties = next(row for row in found["rows"] if row["key"] == "ties")
    assert set(ties["accuracy"]) == set(TASKS)
    assert ties["normalised"]["low"] < ties["normalised"]["value"] < ties["normalised"]["high"]


@pytest.mark.parametrize(("width", "count"), [(80, 2), (200, 1)])
def test_the_table_fits_the_terminal(board, width, count):
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in board.tables(width):
        console.print(table)
    text = console.export_text()
    assert len(board.tables(width)) == count
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert f"{board['ties'].normalised.value:.1f} [" in text and "odd <b>" in text


def test_the_report_needs_nothing_else_and_escapes_what_it_shows(board):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from fusewright.bench.report.page import render

    page = render(board)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "@import" not in page and "url(http" not in page
    assert "Two &lt;tasks&gt;" in page and "<b>odd" not in page and "odd <b>" not in page
    for row in board.rows:
        assert f'data-v="{row.key}"' in page
    assert page.count("<svg") == 2 and "currentColor" in page and "#010203" not in page
    assert "ties-tuned: best with a validated scale" in page


def test_the_report_is_the_same_every_time(board):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from fusewright.bench.report.page import render

    assert render(board) == render(board)


def test_a_missing_library_names_the_extra():
    from fusewright.extras import needs

    with pytest.raises(FusewrightError, match=r"pip install 'fusewright\[demo\]'"):
        needs("no_such_library", "demo")


def test_every_registered_method_is_run_or_has_a_reason():
    from fusewright.methods.registry import registry

    kept, left_out = entries(7)
    named = {stage for e in kept for stage in _names(e.method.spec())}
    assert set(registry()) == (named & set(registry())) | set(left_out)
    assert not set(left_out) & {e.key for e in kept}
    assert {"average", "task_arithmetic", "ties", "iso_c"} <= {e.key for e in kept}
    assert "slerp" in left_out and "passthrough" in left_out


def _names(spec) -> list[str]:
    return [name for stage in (spec if isinstance(spec, list) else [spec]) for name in stage]


def test_methods_that_are_asked_for_are_taken_as_written():
    (one, pipeline), left_out = entries(7, [{"ties": {"density": 0.3}}, ["drop", "elect"]])
    assert one.method.density == 0.3 and left_out == {}
    assert pipeline.key == "drop-elect" and pipeline.scale is None


def test_another_scale_keeps_every_other_parameter():
    tuned = entry({"ties": {"density": 0.3}}).scaled(0.7)
    assert (tuned.key, tuned.method.density, tuned.method.scale) == ("ties-tuned", 0.3, 0.7)

"""Sizes, times, progress lines and JSON, as printed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusewright.cli._print import duration, print_json, size
from fusewright.cli._progress import EVERY, Lines
from fusewright.engine import Progress


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (2_112_345_678, "2.11 GB"),
     (3.5e12, "3.5 TB")],
)  # fmt: skip
def test_sizes_are_decimal_with_three_digits(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_json_has_no_nan(capsys: Any) -> None:
    print_json({"a": [float("nan"), float("inf"), 1.5], 2: "é"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "2": "é"}


def test_progress_is_a_line_every_ten_seconds_and_a_rate_since_this_run_began(capsys: Any) -> None:
    times = iter([0.0, 0.0, EVERY - 1, EVERY, EVERY + 1])
    lines = Lines(clock=lambda: next(times))
    for megabytes in (500, 600, 700, 710):
        lines.report(Progress(megabytes * 10**6, 10**9, "merge", "x", resumed=True))
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["merge: resumed, 700 MB of 1 GB, 20 MB/s, 15.0 s left"]


def test_a_terminal_gets_drawn_tables(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fusewright.cli._print import print_tables
    from fusewright.engine import Table

    table = Table("Sizes", ("name", "bytes"), (("a[b]", 1), ("c", None)))
    print_tables([table, Table("Empty", ("x",), ())])
    plain = capsys.readouterr().out
    assert plain == table.text() + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_tables([table])
    drawn = capsys.readouterr().out
    assert "a[b]" in drawn and "─" in drawn

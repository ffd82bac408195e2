"""Plots as inline SVG. Text and lines take the colour of the page, so both themes can be read."""

from __future__ import annotations

import io
import re
from typing import Any

from fusewright.bench.leaderboard import Leaderboard, Row
from fusewright.extras import needs

INK = "#010203"
"""Stands for the page's own text colour while matplotlib draws."""

COLOURS = {"reference": "#8a8f98", "expert": "#8a8f98", "none": "#2f7ed8", "labelled": "#d97a2b"}


def shown_rows(board: Leaderboard) -> list[Row]:
    """References, then merges, class by class: what both plots show."""
    classes = board.classes()
    return [row for name, rows in classes.items() if name != "expert" for row in rows]


def intervals(board: Leaderboard) -> str:
    """Normalised accuracy of each row: bar and 95 % interval; a small mark for each seed."""
    rows = shown_rows(board)
    figure, axes = _figure(9.0, 0.29 * len(rows) + 1.1)
    places = _places(rows)
    values = [row.normalised.value for row in rows]
    colours = [COLOURS[row.requirement] for row in rows]
    axes.barh(places, values, color=colours, alpha=0.75, height=0.72)
    spread = [[r.normalised.value - r.normalised.low for r in rows],
              [r.normalised.high - r.normalised.value for r in rows]]  # fmt: skip
    axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.4, capsize=3)
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.seeds, [place] * len(row.seeds), "o", ms=3.4, mfc="white", mec=INK, mew=0.7)
        edge = max(row.normalised.high, *row.seeds)
        axes.text(edge + 0.8, place, f"{row.normalised.value:.1f}", va="center", color=INK, size=8)
    axes.axvline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(places, [row.key for row in rows])
    axes.set(xlim=(0, 108), ylim=(max(places) + 0.6, -0.6))
    axes.set_xlabel("normalised accuracy (%): 100 = as good as each task's own expert", color=INK)
    return _svg(figure)


def heat_map(board: Leaderboard) -> str:
    """Accuracy of each row on each task, as a share of that task's expert."""
    rows = shown_rows(board)
    own = board["own expert"].accuracy
    shares = [[100 * r.accuracy[t].value / max(own[t].value, 1e-9) for t in board.tasks]
              for r in rows]  # fmt: skip
    figure, axes = _figure(9.0, 0.29 * len(rows) + 0.9)
    low = min(map(min, shares))
    image = axes.imshow(shares, cmap="viridis", aspect="auto", vmin=low, vmax=max(100.0, low + 1))
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            dark = image.norm(share) < 0.6
            axes.text(x, y, f"{share:.0f}", ha="center", va="center", size=8,
                      color="white" if dark else "black")  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.key for row in rows])
    axes.set_xticks(range(len(board.tasks)), list(board.tasks))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    return _svg(figure)


def _places(rows: list[Row]) -> list[float]:
    """Where each row lies, with a gap between classes."""
    places, gaps = [], 0.0
    for i, row in enumerate(rows):
        gaps += 0.6 if i and row.requirement != rows[i - 1].requirement else 0.0
        places.append(i + gaps)
    return places


def _figure(width: float, height: float) -> tuple[Any, Any]:
    needs("matplotlib", "demo")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an element: transparent, real text, no date, ink as the page's own colour."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusewright",
                     "font.family": "sans-serif"}):  # fmt: skip
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(
        r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)  # fmt: skip

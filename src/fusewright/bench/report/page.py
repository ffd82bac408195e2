"""The page: a template filled with the leaderboard and its plots."""

from __future__ import annotations

from pathlib import Path

from fusewright.bench.leaderboard import CLASSES, Leaderboard, Row
from fusewright.bench.report.plots import heat_map, intervals
from fusewright.extras import needs

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(board: Leaderboard) -> str:
    """The report as text.

    Raises FusewrightError if jinja2 or matplotlib is not installed.
    """
    jinja2 = needs("jinja2", "demo")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    plots = {name: jinja2.utils.markupsafe.Markup(draw(board))
             for name, draw in (("intervals", intervals), ("heat_map", heat_map))}  # fmt: skip
    return str(template.render(
        board=board, titles=CLASSES, plots=plots, highlights=highlights(board)
    ))  # fmt: skip


def highlights(board: Leaderboard) -> list[tuple[str, Row]]:
    """The rows that say most, from the base to the experts."""
    classes = board.classes()
    found = [("base", board["base"])]
    found += [("plain average", r) for r in board.rows if r.key == "average"]
    found += [(f"{name}: best {how}", classes[kind][0])
              for kind, how in (("none", "without data"), ("labelled", "with a validated scale"))
              if kind in classes for name in [classes[kind][0].key]]  # fmt: skip
    return [*found, ("each task's own expert", board["own expert"])]


def write_report(board: Leaderboard, path: Path) -> None:
    """Write the report to a file."""
    path.write_text(render(board), encoding="utf-8")

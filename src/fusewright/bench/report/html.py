"""The report of a sweep as one HTML page: no network, no other files, no library in the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewright.bench.comparison import OWN
from fusewright.bench.published import Published
from fusewright.bench.report.costs import COSTS, DASH, EXPLAINED, UNITS, cost, known_costs
from fusewright.bench.report.marks import (
    COLOURS,
    Axis,
    Point,
    axis,
    interval_mark,
    scatter,
    shade,
    strip,
)
from fusewright.bench.report.rates import RATES, rated
from fusewright.bench.report.summary import Line, Section, Summary
from fusewright.bench.results import REQUIREMENTS, UNRANKED
from fusewright.bench.statistics import Interval
from fusewright.extras import needs
from fusewright.tasks.units import PERCENT, Unit, unit_of

_TEMPLATE = Path(__file__).with_name("results.html.j2")
_MARK = 150.0  # pixels of an interval in a table's cell


def render(summary: Summary, against: Published | None = None) -> str:
    """The page as text.

    Raises FusewrightError if jinja2 is not installed.
    """
    jinja2 = needs("jinja2", "bench")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    safe = jinja2.utils.markupsafe.Markup
    drawings = {name: lambda *args, draw=draw: safe(draw(*args)) for name, draw in {
        "quality": _quality, "generalisation": _generalisation, "interval": interval_mark,
        "strip": strip,
    }.items()}  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    return str(template.render(
        summary=summary, results=summary.results, against=against, draw=drawings, shade=shade,
        classes=REQUIREMENTS, colours=COLOURS, costs=COSTS, explained=EXPLAINED,
        rates=RATES, sections=[
            Shown(section, summary) for section in summary.sections
        ], percent=percent, cost=cost, p_value=p_value, layers=layers(summary), number=number,
        facts=flat({k: v for k, v in summary.results.facts.items()
                    if k not in ("command", "layers", "items")}),
    ))  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A section with the scales that its drawings share."""

    section: Section
    summary: Summary

    @property
    def title(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.section.axes.items())

    @property
    def normalised(self) -> bool:
        return any(line.normalised for line in self.section.lines)

    def main(self, line: Line) -> Interval | None:
        """What a line is ranked by."""
        return line.normalised if self.normalised else line.mean

    def each(self, line: Line) -> list[float]:
        """The same, pool by pool."""
        found = (p.normalised if self.normalised else p.mean for p in line.pools)
        return [value for value in found if value is not None]

    def scale(self) -> Axis | None:
        """One axis for every interval of the section (experts alone left out)."""
        lines = [line for line in self.section.lines if line.requirement != "expert"]
        found = [self.main(line) for line in lines]
        values = [v for one in found if one for v in (one.low, one.high)]
        values += [value for line in lines for value in self.each(line)]
        if not values:
            return None
        whole = axis(values, _MARK - 12)
        return Axis(whole.low, whole.high, _MARK)

    def heat(self) -> tuple[float, float]:
        """From the least to the largest share of an expert (or score) in the heat map."""
        values = [v for line in self.merging() for task, v in self.heats(line).items()
                  if self._shaded(line, task)]  # fmt: skip
        return (min(values), max(values)) if values else (0.0, 1.0)

    def heat_style(self, line: Line, task: str) -> str:
        """The colour of a cell of the heat map; none for what has no place on its one scale."""
        value = self.heats(line)[task]
        return shade(value, *self.heat()) if self._shaded(line, task) else ""

    def _shaded(self, line: Line, task: str) -> bool:
        return bool(line.shares) or unit_of(self.summary.metrics[task]) == PERCENT

    def heats(self, line: Line) -> Mapping[str, float]:
        return line.shares or {t: line.tasks[t].value for t in self.merged if t in line.tasks}

    @property
    def merged(self) -> list[str]:
        return [t for t in self.summary.results.merged if t in self.summary.metrics]

    @property
    def unseen(self) -> list[str]:
        return [t for t in self.summary.results.unseen if t in self.summary.metrics]

    @property
    def unseen_unit(self) -> Unit:
        """What scores of unseen tasks are shown in, where they have a mean."""
        return unit_of(self.summary.metrics[self.unseen[0]])

    @property
    def streamed(self) -> bool:
        return any(line.stream for line in self.section.lines)

    def merging(self) -> list[Line]:
        """Lines of plots: experts alone would hide what differs between merges."""
        return [line for lines in self.section.classes().values() for line in lines
                if line.requirement != "expert"]  # fmt: skip

    def rated(self) -> dict[str, list[str]]:
        return rated(self.section)

    def known_costs(self) -> list[str]:
        return known_costs(self.section.lines)

    def highlights(self) -> list[tuple[str, str, float]]:
        """What says most: base, average, the best of each class, the experts."""
        found = [(name, row, one.value) for name, row in (("base", "base"), ("average", "average"))
                 if (line := self.section.line(row)) and (one := self.main(line))]  # fmt: skip
        for name, lines in self.section.classes().items():
            best = next((line for line in lines if line.row != OWN), None)
            one = self.main(best) if best else None
            if name not in UNRANKED and best and one and best.row != "average":
                found.append((REQUIREMENTS[name].lower(), best.row, one.value))
        own = self.section.line(OWN)
        if own and (one := self.main(own)):
            found.append(("each task's own expert", own.row, one.value))
        return found


def _quality(shown: Shown, name: str) -> str:
    """Quality against one cost; nothing where rows pile up on a few values of it, or only
    references have it."""
    points = [
        Point(line.row, line.costs[name] / UNITS.get(name, 1), one.value,
              COLOURS[line.requirement], (one.low, one.high))
        for line in shown.merging() if name in line.costs and (one := shown.main(line))
    ]  # fmt: skip
    positive = all(point.x > 0 for point in points)
    colours = {point.colour for point in points} - {COLOURS["reference"]}
    if len({point.x for point in points}) < max(2, len(points) / 3) or not colours:
        return ""
    wide = positive and max(p.x for p in points) > 5 * min(p.x for p in points)
    return scatter(points, COSTS[name], _label(shown), log=wide)


def _generalisation(shown: Shown) -> str:
    points = [
        Point(line.row, one.value, line.unseen.value, COLOURS[line.requirement],
              (line.unseen.low, line.unseen.high))
        for line in shown.merging() if line.unseen and (one := shown.main(line))
    ]  # fmt: skip
    if len(points) < 2:
        return ""
    unit = shown.unseen_unit
    score = "mean score" if unit.bounded else f"mean {unit.name}, smaller is better"
    return scatter(points, f"merged tasks: {_label(shown)}", f"unseen tasks: {score}")


def _label(shown: Shown) -> str:
    return "normalised score, %" if shown.normalised else "mean score"


def percent(summary: Summary, task: str) -> str:
    """The unit of a task's scores."""
    unit = unit_of(summary.metrics[task])
    return "%" if unit == PERCENT else unit.name


def number(value: float | None, sign: str = "") -> str:
    """One decimal; a dash where nothing was measured."""
    return DASH if value is None or value != value else f"{value:{sign}.1f}".replace("-", "\u2212")


def p_value(p: float) -> str:
    """Three decimals; smaller ones are not worth telling apart."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def layers(summary: Summary) -> tuple[list[str], list[dict[str, Any]]] | None:
    """The analysis of task vectors by layer, where the facts carry one: a list of rows, each with
    "layer" and numbers under the same names."""
    rows = summary.results.facts.get("layers")
    return (list(rows[0]), rows) if rows else None


def flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Facts as lines, nested names joined."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{before}{name}: ")
        else:
            found.append((before + str(name), str(value)))
    return found

"""The same numbers as Markdown, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fusewright.bench.published import Published
from fusewright.bench.report.costs import COSTS, EXPLAINED, cost, known_costs
from fusewright.bench.report.rates import explained, rated
from fusewright.bench.report.summary import Line, Section, Subset, Summary
from fusewright.bench.results import REQUIREMENTS
from fusewright.bench.statistics import Interval
from fusewright.tasks.units import unit_of

SCHEMA = 1
STREAM = (
    " Mixed stream: the first test rows of each merged task in one stream, mixed, one row at a "
    "time; in brackets the same rows, task by task."
)
SUBSETS = (
    "Normalised scores over the tasks that were merged, by their number; least, most, and how many "
    "draws and seeds:"
)


def to_json(summary: Summary, against: Published | None = None) -> dict[str, Any]:
    """Every number with its interval, in the units of ``metrics``."""
    results = summary.results
    return {
        "schema": SCHEMA, "suite": results.suite, "title": results.title,
        "tasks": dict(results.tasks), "merged": list(results.merged),
        "unseen": list(results.unseen), "metrics": dict(summary.metrics),
        "items": dict(summary.items), "level": summary.level,
        "sections": [
            {"axes": dict(section.axes), "baseline": section.baseline,
             "rows": [_line_json(line, against) for line in section.lines]}
            for section in summary.sections
        ],
        "subsets": [asdict(subset) for subset in summary.subsets],
        "published": None if against is None else {
            "name": against.name, "title": against.title, "source": against.source,
            "about_this_suite": against.same,
        },
        "facts": dict(results.facts),
    }  # fmt: skip


def _line_json(line: Line, against: Published | None) -> dict[str, Any]:
    found = asdict(line)
    if against is not None:
        found["published"] = {"mean": against.of(line.row),
                              "normalised": against.normalised(line.row)}  # fmt: skip
    return found


def to_csv(summary: Summary, against: Published | None = None) -> str:
    """One line for each row and setting of the axes; intervals as columns ``… low``, ``… high``."""
    lines = [_flat(section, line, against) for section in summary.sections
             for line in section.lines]  # fmt: skip
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(section: Section, line: Line, against: Published | None) -> dict[str, Any]:
    found: dict[str, Any] = {**section.axes, "row": line.row, "requirement": line.requirement,
                             "rank": line.rank, **_bounds("normalised", line.normalised),
                             **_bounds("mean", line.mean)}  # fmt: skip
    found["worst task"], found["worst"] = line.worst or (None, None)
    found |= _bounds("unseen", line.unseen)
    if line.stream is not None:
        found |= _bounds("mixed stream", line.stream)
        found["mixed stream, same rows task by task"] = line.stream_clean
    for task, one in line.tasks.items():
        found |= _bounds(task, one)
        found |= {f"{task} {name}": rate for name, rate in line.rates.get(task, {}).items()}
    for condition, one in line.corruptions.items():
        found |= _bounds(f"corruption {condition}", one)
    each = [pool.normalised for pool in line.pools if pool.normalised is not None]
    found |= {"calibration error": line.calibration, "pools": len(line.pools),
              "least pool": min(each, default=None), "most pool": max(each, default=None)}
    if line.versus is not None:
        found |= {"versus": line.versus.theirs, **_bounds("difference", line.versus.value),
                  "p": line.versus.p, "p Holm": line.versus.adjusted,
                  "p McNemar": line.versus.all_items.p}  # fmt: skip
    if against is not None:
        found[f"published normalised ({against.name})"] = against.normalised(line.row)
    return found | dict(line.costs)


def _bounds(name: str, one: Interval | None) -> dict[str, float | None]:
    if one is None:
        return {name: None, f"{name} low": None, f"{name} high": None}
    return {name: one.value, f"{name} low": one.low, f"{name} high": one.high}


def to_markdown(summary: Summary, against: Published | None = None) -> str:
    """Tables by requirement class, for a README or an issue."""
    parts = [f"# {summary.results.title}", _preface(summary)]
    for section in summary.sections:
        if section.axes:
            parts.append("## " + ", ".join(f"{k} {v}" for k, v in section.axes.items()))
        parts.append(_markdown(*_table(summary, section, against)))
        if corrupted := _corrupted(section):
            parts += ["Mean over merged tasks, inputs corrupted:", _markdown(*corrupted)]
        if costs := _costs(section):
            parts += [f"Costs, medians over pools ({EXPLAINED}):", _markdown(*costs)]
    if summary.subsets:
        parts += [SUBSETS, _markdown(*_by_number(summary))]
    if against is not None:
        parts.append(_cited(against))
    if command := summary.results.facts.get("command"):
        parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def to_latex(summary: Summary, against: Published | None = None) -> str:
    """The same tables for a paper; needs the package booktabs."""
    parts = [f"% {line}" for line in (_preface(summary), "\\usepackage{booktabs}")]
    for section in summary.sections:
        parts += _latex(*_table(summary, section, against))
        if corrupted := _corrupted(section):
            parts += ["% Mean over merged tasks, inputs corrupted", *_latex(*corrupted)]
        if costs := _costs(section):
            parts += [f"% Costs, medians over pools ({EXPLAINED})", *_latex(*costs)]
    if summary.subsets:
        parts += [f"% {SUBSETS}", *_latex(*_by_number(summary))]
    if against is not None:
        parts.append(f"% {_cited(against)}")
    return "\n".join(parts) + "\n"


Body = list[tuple[str, list[list[str]]]]
"""The lines of a table, by requirement class."""


def _markdown(names: list[str], body: Body) -> str:
    rows = ["| " + " | ".join(names) + " |", "|" + "---|" + "--:|" * (len(names) - 1)]
    for title, lines in body:
        rows.append(f"| **{title}** |" + " |" * (len(names) - 1))
        rows += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(rows)


def _latex(names: list[str], body: Body) -> list[str]:
    rows = [f"\\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", "\\toprule",
            " & ".join(map(_escaped, names)) + " \\\\"]  # fmt: skip
    for title, lines in body:
        rows += ["\\midrule",
                 f"\\multicolumn{{{len(names)}}}{{l}}{{\\emph{{{_escaped(title)}}}}} \\\\",
                 *(" & ".join(map(_escaped, line)) + " \\\\" for line in lines)]  # fmt: skip
    return [*rows, "\\bottomrule", "\\end{tabular}"]


def _corrupted(section: Section) -> tuple[list[str], Body] | None:
    """Headings and lines of the scores under corruptions, if any was asked for."""
    body = [
        (REQUIREMENTS[kind], [[line.row, *map(_one, line.corruptions.values())]
                              for line in lines if line.corruptions])
        for kind, lines in section.classes().items()
    ]  # fmt: skip
    body = [(title, lines) for title, lines in body if lines]
    first = next((line for lines in section.classes().values() for line in lines
                  if line.corruptions), None)  # fmt: skip
    return None if first is None else (["model", *first.corruptions], body)


def _by_number(summary: Summary) -> tuple[list[str], Body]:
    """Headings and lines of the scores by the number of merged experts."""
    numbers = sorted({subset.merged for subset in summary.subsets})
    rows: dict[str, dict[str, dict[int, str]]] = {}
    for one in summary.subsets:
        name = ", ".join([one.row, *one.axes.values()])
        rows.setdefault(one.requirement, {}).setdefault(name, {})[one.merged] = _spread(one)
    body = [(title, [[name, *(found.get(n, "") for n in numbers)]
                     for name, found in rows[kind].items()])
            for kind, title in REQUIREMENTS.items() if kind in rows]  # fmt: skip
    return ["model", *(f"{n} of {len(summary.results.merged)}" for n in numbers)], body


def _spread(subset: Subset) -> str:
    each = [pool.normalised for pool in subset.pools if pool.normalised is not None]
    if not each:
        return ""
    return f"{sum(each) / len(each):.1f} ({min(each):.1f} to {max(each):.1f}; {len(each)})"


def _costs(section: Section) -> tuple[list[str], Body] | None:
    """Headings and lines of what was measured of the costs."""
    names = known_costs(section.lines)
    body = [
        (REQUIREMENTS[kind], [[line.row, *(cost(name, line.costs.get(name)) for name in names)]
                              for line in lines if line.costs])
        for kind, lines in section.classes().items()
    ]  # fmt: skip
    body = [(title, lines) for title, lines in body if lines]
    return (["model", *(COSTS[name] for name in names)], body) if names else None


def _table(
    summary: Summary, section: Section, against: Published | None
) -> tuple[list[str], Body]:
    """Headings, and for each class its title and lines, as text."""
    known = rated(section)
    tasks = {task: known.get(task, []) for task in summary.metrics}
    scores = [text for task in tasks for text in (task, *(f"{task} {r}" for r in tasks[task]))]
    streamed = any(line.stream for line in section.lines)
    names = ["model", *scores, "mean", "normalised", "worst", "unseen",
             *(["mixed stream"] if streamed else []), "rank"]  # fmt: skip
    if section.baseline:
        names += [f"above {section.baseline}", "p (Holm)"]
    names += ["published*"] if against else []
    body = [(REQUIREMENTS[kind], [list(_cells(line, tasks, section, against)) for line in lines])
            for kind, lines in section.classes().items()]  # fmt: skip
    return names, body


def _cells(
    line: Line, tasks: Mapping[str, Sequence[str]], section: Section, against: Published | None
) -> Iterator[str]:
    yield line.row
    for task, rates in tasks.items():
        yield _one(line.tasks.get(task))
        own = line.rates.get(task, {})
        yield from (f"{own[name]:.1f}" if name in own else "" for name in rates)
    yield from (_one(line.mean), _one(line.normalised, bounds=True))
    yield f"{line.worst[1]:.1f} ({line.worst[0]})" if line.worst else ""
    yield _one(line.unseen)
    if any(other.stream for other in section.lines):
        yield f"{line.stream.value:.1f} ({line.stream_clean:.1f})" if line.stream else ""
    yield f"{line.rank}{' =' if line.level_with else ''}" if line.rank else ""
    if section.baseline:
        yield _one(line.versus.value, "+", bounds=True) if line.versus else ""
        yield _p(line.versus.adjusted) if line.versus else ""
    if against is not None:
        theirs = against.normalised(line.row) if line.normalised else against.of(line.row)
        yield "" if theirs is None else f"{theirs:.1f}"


def _one(one: Interval | None, sign: str = "", bounds: bool = False) -> str:
    if one is None:
        return ""
    between = f" [{one.low:{sign}.1f}, {one.high:{sign}.1f}]" if bounds else ""
    return f"{one.value:{sign}.1f}{between}"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _preface(summary: Summary) -> str:
    units = {task: unit_of(metric).name for task, metric in summary.metrics.items()}
    kinds = "; ".join(
        name if len(set(units.values())) == 1 else
        f"{name} ({', '.join(t for t in units if units[t] == name)})"
        for name in dict.fromkeys(units.values())
    )
    return (
        f"Suite {summary.results.suite}; scores in {kinds}; normalised: percent of each task's own "
        f"expert; {100 * summary.level:g} % intervals over items; ranks inside a class, = where "
        "rows are not told apart."
    ) + (f" {more[0].upper()}{more[1:]}." if (more := explained(summary.sections)) else "") + (
        STREAM if any(line.stream for one in summary.sections for line in one.lines) else ""
    )


def _cited(against: Published) -> str:
    other = "" if against.same else " Other models and other tasks: only the order may be compared."
    return f"* Not ours: {against.title}; {against.source}.{other}"


def _escaped(text: str) -> str:
    marks: Mapping[str, str] = {
        "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_",
        "{": "\\{", "}": "\\}", "<": "$<$", ">": "$>$", "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
    }  # fmt: skip
    return "".join(marks.get(letter, letter) for letter in text)

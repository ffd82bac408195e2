"""A report in every format, beside the results that it is made from."""

from __future__ import annotations

import json
from pathlib import Path

from fusewright.bench.published import published
from fusewright.bench.results import Results
from fusewright.plain import finite
from fusewright.weights.folders import make_folder


def write_results(
    results: Results, folder: str | Path, against: str | None = None, *, level: float = 0.95
) -> list[Path]:
    """Write ``report.html``, ``.md``, ``.csv``, ``.tex`` and ``.json`` into a folder.

    ``against`` adds a cited column: "published", or the name of a table of
    :mod:`fusewright.bench.published`. ``level`` is that of intervals and of what is told apart.

    Raises FusewrightError if there is no such table, a task's cells answered different items, or
    the folder cannot be made.
    """
    from fusewright.bench.report import files, html
    from fusewright.bench.report.summary import summarise

    table = None if against is None else published(against, results.suite)
    summary = summarise(results, level=level)
    numbers = finite(files.to_json(summary, table))
    texts = {
        "html": html.render(summary, table),
        "md": files.to_markdown(summary, table),
        "csv": files.to_csv(summary, table),
        "tex": files.to_latex(summary, table),
        "json": json.dumps(numbers, indent=1, ensure_ascii=False, default=str) + "\n",
    }
    make_folder(Path(folder))
    written = []
    for kind, text in texts.items():
        written.append(Path(folder) / f"report.{kind}")
        written[-1].write_text(text, encoding="utf-8")
    return written


def to_html(results: Results, path: str | Path, against: str | None = None) -> Path:
    """Write the page alone."""
    from fusewright.bench.report.html import render
    from fusewright.bench.report.summary import summarise

    table = None if against is None else published(against, results.suite)
    path = Path(path)
    path.write_text(render(summarise(results), table), encoding="utf-8")
    return path

"""``fusewright bench``: a sweep, its table, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusewright.cli._print import print_json, print_tables
from fusewright.cli._shared import Json, add
from fusewright.cli.suite import Data, Device, Name, Pool, Seeds

if TYPE_CHECKING:
    from fusewright.bench.results import Results


_JOINT = (
    "Joint training: sum, uncertainty, dwa, gradnorm, pcgrad, mgda, cagrad, upgrad; each takes "
    "about as long as training all experts did."
)


def register(app: typer.Typer) -> None:
    """Add ``bench``."""
    add(
        app, bench, "fusewright bench digits -o results/digits",
        "fusewright bench digits --methods ties,iso_c,'drop >> elect' --tune 20 -o results/digits",
        "fusewright bench digits --methods 'ties,ties(density=0.1),trim(density=0.5) >> sum' "
        "-o results/digits",
        "fusewright bench digits --joint all -o results/digits",
        "fusewright bench digits --methods adamerging,wemoe --mixed-stream 100 --transductive "
        "-o results/digits",
        "fusewright bench vision-mini --seeds 3 --jobs 2 --data data/ -o results/vision-mini",
    )  # fmt: skip


def bench(
    suite: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where cells and report go.")],
    methods: Annotated[
        str | None, typer.Option(help="Separated by commas, with parameters as "
                                 "ties(density=0.3); all that need no data, if not given.")
    ] = None,
    tune: Annotated[
        int, typer.Option(min=0, metavar="N", help="Trials on validation rows for each method.")
    ] = 0,
    seeds: Seeds = 1,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Rows of each split, at most (intervals need two).")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Kinds of models, separated by commas; plain is the suite's.")
    ] = None,
    subsets: Annotated[
        str | None, typer.Option(help="Also merge so many experts, separated by commas.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Subsets of each number, drawn.")] = 3,
    corruptions: Annotated[
        bool,
        typer.Option("--corruptions", help="Also on corrupted pictures (in 7 ways) or texts (5)."),
    ] = False,
    joint: Annotated[
        str, typer.Option(metavar="A,B|all|none", help=_JOINT)
    ] = "sum",
    mixed_stream: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also ask N test rows of each merged task in "
                          "one stream, mixed, one at a time.")
    ] = 0,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Also adapt on the test inputs, as papers do; "
                           "these rows are not ranked.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    pool: Pool = None,
    data: Data = None,
    device: Device = "cpu",
    against: Annotated[
        str | None, typer.Option(help='Add a cited column: "published", or a table\'s name.')
    ] = None,
    json: Json = False,
) -> None:
    """Measure every method on a suite, and write the report.

    Each cell (pool, method, parameters) is kept in OUT as soon as it is finished: the same command
    again makes only what is missing. Base, experts, ensembles, average, task arithmetic and, where
    the suite says how its experts were trained, joint training are always there.
    Needs the extra: pip install 'fusewright\\[bench]'.
    """
    from fusewright.bench.published import published
    from fusewright.bench.report import write_results
    from fusewright.bench.sweep import bench as measure
    from fusewright.methods.written import listed

    if against is not None:
        published(against, suite)  # a table that is not there is refused before anything is made
    results = measure(
        suite, None if methods is None else listed(methods), out=out, tune=tune, seeds=seeds,
        limit=limit, pool=pool, data=data, subsets=_numbers(subsets), draws=draws, jobs=jobs,
        variants=None if variants is None else [None if v == "plain" else v
                                                for v in listed(variants)],
        corruptions=corruptions, joint=joint, mixed_stream=mixed_stream,
        transductive=transductive, device=device, progress=not json,
    )  # fmt: skip
    written = write_results(results, out, against=against)
    if json:
        print_json(_json(results, written))
    else:
        _print(results, written)
    if results.facts["failed"]:
        raise typer.Exit(1)


def _numbers(text: str | None) -> list[int]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"numbers separated by commas are expected, found {text!r}",
                                 param_hint="--subsets")  # fmt: skip
    return [int(part) for part in parts]


def _print(results: Results, written: list[Path]) -> None:
    from fusewright.bench.sweep.tables import tables
    from fusewright.cli._errors import say

    print_tables(tables(results))
    for row, problem in results.facts["failed"].items():
        say(f"failed, {row}", problem)
    left = results.facts["left out"]
    if left:
        print("\nnot run:", "; ".join(f"{name} ({why})" for name, why in left.items()))
    print("\n" + "\n".join(map(str, written)))


def _json(results: Results, written: list[Path]) -> dict[str, object]:
    rows = [
        {"row": c.row, "requirement": c.requirement, "seed": c.seed, "experts": c.experts,
         "axes": c.axes, "method": c.method, "costs": c.costs, "note": c.note,
         "tasks": {task: {name: o.shown for name, o in each.items()}
                   for task, each in c.outcomes.items()}}
        for c in results.cells
    ]  # fmt: skip
    return {"suite": results.suite, "cells": rows, "facts": results.facts,
            "files": [str(path) for path in written]}  # fmt: skip

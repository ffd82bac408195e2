"""``fusewright demo``, and ``schema`` for editors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fusewright.cli._print import print_json
from fusewright.cli._shared import Json, add

_WIDE = 160  # columns where there is no terminal to fit


def register(app: typer.Typer) -> None:
    """Add ``demo``."""
    add(app, demo, "fusewright demo", "fusewright demo -o out/demo --json")
    add(app, schema, "fusewright schema > recipe.schema.json")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")] = Path(
        "out/demo"
    ),
    json: Json = False,
) -> None:
    """Train small models, merge them with every method that gives a plain model, compare.

    A base and experts are trained on real images of digits, and merged on disk. Needs the
    extra: pip install 'fusewright\\[demo]'.
    """
    from rich.console import Console

    from fusewright.bench.demo import run_demo

    board = run_demo(out, progress=not json)
    if json:
        print_json(board.to_json())
        return
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    console.print(*board.tables(console.width), sep="\n\n")
    print(f"\n{out}/report.html\n{out}/leaderboard.json\n{out}/models/\n{out}/merged/")


def schema(json: Json = False) -> None:
    """Print the JSON schema of recipes.

    Editors complete and check recipes with it: put
    "# yaml-language-server: $schema=recipe.schema.json" on a recipe's first line.
    """
    from fusewright.engine import recipe_schema

    print_json(recipe_schema())

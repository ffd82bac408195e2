"""All commands under one name."""

from __future__ import annotations

from typing import Annotated

import typer

from fusewright import __version__
from fusewright.cli import bench, compare, demo, finetune, look, merge, methods, suite
from fusewright.cli._errors import Commands

app = typer.Typer(
    name="fusewright",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback as Python prints it: it is meant to be copied
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fusewright {__version__}")
        raise typer.Exit


@app.callback(epilog="Each command's --help shows examples. Start with: fusewright demo")
def _fusewright(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One model that knows what many know: merge trained networks on disk, safely."""


for module in (merge, look, methods, suite, finetune, bench, compare, demo):
    module.register(app)

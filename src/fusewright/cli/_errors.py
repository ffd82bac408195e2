"""How a command fails: its text on stderr, or one JSON object, and an exit code."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from fusewright.cli._shared import wants_json
from fusewright.errors import FusewrightError, FusewrightWarning

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, unwound as Ctrl-C is, so that everything is closed in order."""


class Commands(TyperGroup):
    """The command group: turns refusals and interruptions of any command into exit codes.

    Anything else keeps its traceback: it is a fault of fusewright, and the traceback is its report.
    """

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", FusewrightWarning)
            warnings.showwarning = _show_warning(warnings.showwarning)
            try:
                return super().invoke(ctx)
            except FusewrightError as error:
                report(error, as_json=wants_json(ctx))
                raise typer.Exit(error.exit_code) from error
            except KeyboardInterrupt as error:
                say("interrupted", str(error))
                code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
                raise typer.Exit(code) from error


def report(error: FusewrightError, as_json: bool) -> None:
    """Print a refusal: a JSON object on stdout, or its text on stderr."""
    if as_json:
        from fusewright.cli._print import print_json

        print_json({"error": error_object(error)})
    else:
        say("error", str(error))


def error_object(error: FusewrightError) -> dict[str, Any]:
    """A refusal as ``--json`` prints it."""
    parts = ("where", "expected", "found", "fix")
    told = {part: getattr(error, part) for part in parts}
    return {
        "kind": type(error).__name__,
        "problem": error.problem,
        **{part: str(value) for part, value in told.items() if value is not None},
        "exit_code": error.exit_code,
    }


def say(label: str, text: str = "") -> None:
    """``label: text`` on stderr, the label in red where that can be seen."""
    from rich.console import Console
    from rich.text import Text

    line = Text(f"{label}:" if text else label, style="bold red")
    Console(stderr=True, soft_wrap=True).print(line + Text(f" {text}" if text else ""))


def _show_warning(usual: Any) -> Any:
    def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
        if issubclass(category, FusewrightWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    return show

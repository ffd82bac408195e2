"""What several commands take, and how their help shows examples."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import typer

DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def add(
    app: typer.Typer, command: Callable[..., None], *examples: str, name: str | None = None
) -> None:
    """Register a command: its docstring, paragraphs re-flowed, is its help; examples follow."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    help_ = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    epilog = "\n\n".join(["Examples:", *(f"$ {escape(example)}" for example in examples)])
    app.command(name, help=help_, epilog=epilog)(command)


def escape(text: str) -> str:
    """Text as help shows it verbatim, brackets too."""
    return text.replace("[", "\\[")


def method_names(incomplete: str) -> list[str]:
    """Names of methods that begin so: for the shell's completion."""
    from fusewright.methods.registry import registry

    return [name for name in registry() if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Devices that begin so: for completion."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def dtypes(incomplete: str) -> list[str]:
    """Dtypes that begin so: for completion."""
    return [name for name in DTYPES if name.startswith(incomplete)]


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.find_root().meta["fusewright.json"] = value
    return value


def wants_json(context: typer.Context) -> bool:
    """Whether the command that runs (or failed) was given ``--json``."""
    return bool(context.find_root().meta.get("fusewright.json"))


Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_remember_json, is_eager=True,
        help="Print one JSON object, errors too.",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="How many threads (all cores); it does not change the result."),
]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory for tensors, such as 512MiB.")]
Models = Annotated[
    list[str],
    typer.Argument(help="Folders, files, Hub ids (org/name@revision) or adapters."),
]
Folder = Annotated[Path, typer.Argument(help="A folder that fusewright merged.", file_okay=False)]

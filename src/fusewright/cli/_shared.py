"""What several commands take, and how their help shows examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEVICES = ("cpu", "cuda", "mps")
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def examples(*commands: str) -> str:
    """An epilog with one example a line."""
    return "\n\n".join(["Examples:", *(f"$ {command}" for command in commands)])


def method_names(incomplete: str) -> list[str]:
    """Names of methods that begin so: for the shell's completion."""
    from fusewright.methods.registry import registry

    return [name for name in registry() if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    return [name for name in DEVICES if name.startswith(incomplete)]


def dtypes(incomplete: str) -> list[str]:
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
    typer.Option(min=1, help="How many threads; the result does not depend on it.  [all cores]"),
]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Memory for tensors, such as 512MiB.")]
Models = Annotated[
    list[str],
    typer.Argument(help="Folders, files, Hub ids (org/name@revision) or adapters."),
]
Folder = Annotated[Path, typer.Argument(help="A folder that fusewright merged.", file_okay=False)]

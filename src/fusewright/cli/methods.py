"""``fusewright methods``: all of them, or one with its parameters."""

from __future__ import annotations

from typing import Annotated

import typer

from fusewright.cli._print import print_json, print_tables
from fusewright.cli._shared import Json, add, method_names


def register(app: typer.Typer) -> None:
    """Add ``methods``."""
    add(app, methods, "fusewright methods", "fusewright methods ties", "fusewright methods --json")


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method.", autocompletion=method_names)
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of all, for documentation.")
    ] = False,
    json: Json = False,
) -> None:
    """List all methods, or show one: its paper, what it needs, its parameters."""
    from fusewright.cli import _cards
    from fusewright.methods.registry import method_class, registry

    chosen = {name: method_class(name)} if name else registry()
    if json:
        found = {key: _cards.to_json(method) for key, method in chosen.items()}
        print_json(found[name] if name else found)
    elif markdown:
        print(_cards.markdown(chosen))
    elif name:
        show_card(name)
    else:
        show_all()


def show_all() -> None:
    """Print a table of all methods."""
    from fusewright.cli._cards import COLUMNS, row
    from fusewright.engine import Table
    from fusewright.methods.registry import registry

    rows = tuple(row(method) for method in registry().values())
    print_tables([Table("Methods", COLUMNS, rows)])


def show_card(name: str) -> None:
    """Print what is known of one method."""
    from fusewright.cli._cards import to_json
    from fusewright.engine import Table
    from fusewright.methods.registry import method_class

    card = to_json(method_class(name))
    facts = [
        (key, card[key]) for key in ("kind", "paper", "base", "data", "output", "cost") if card[key]
    ]
    columns = ("name", "default", "type", "may vary by")
    print(f"{name}: {card['title']}\n\n{card['doc']}\n")
    print_tables(
        [
            Table("Card", ("", ""), tuple(facts)),
            Table("Parameters", columns, tuple(map(_parameter, card["parameters"]))),
            Table("Profiles", ("name", "changes"), tuple(map(_profile, card["profiles"].items()))),
            Table("Identities not claimed", ("", ""), tuple(card["not_claimed"].items())),
        ]
    )


_REACH = {"global": "-", "tensor": "layer, tensor", "expert": "expert, layer, tensor"}


def _parameter(parameter: dict[str, object]) -> tuple[str, ...]:
    default = parameter["default"]
    text = str(default).lower() if isinstance(default, bool) else str(default)
    reach = _REACH[str(parameter["reach"])]
    return str(parameter["name"]), text, str(parameter["type"]), reach


def _profile(item: tuple[str, dict[str, object]]) -> tuple[str, str]:
    name, values = item
    return name, ", ".join(f"{key}: {value}" for key, value in values.items())

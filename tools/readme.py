"""Write the table of methods into the README, between its markers: ``make readme``."""

from __future__ import annotations

import re
from pathlib import Path

from fusewright.cli._cards import markdown
from fusewright.methods.registry import registry

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- methods -->\n).*?(\n<!-- /methods -->)", re.DOTALL)


def table() -> str:
    """The methods of this package; those of others that happen to be installed are theirs."""
    own = {k: m for k, m in registry().items() if m.__module__.startswith("fusewright.")}
    return markdown(own)


def updated(text: str) -> str:
    return BLOCK.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")

"""Licences, as the front matter of model cards states them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fusewright.errors import WeightsError
from fusewright.layout.compare.finding import Finding, worst_first

_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
#: Words in identifiers of licences that restrict use or derived models.
_RESTRICTED = re.compile(r"\bnc\b|\bnd\b|non-?commercial|research|llama|gemma|rail|other", re.I)


def licence(directory: Path) -> str | None:
    """The ``license:`` of the directory's README.md (``license_name`` where it is "other").

    None if there is no card or it states none; several are joined by "; ". Raises WeightsError if
    the front matter is not YAML.
    """
    card = Path(directory) / "README.md"
    if not card.is_file():
        return None
    found = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    matter = _parsed(found[1], card) if found else {}
    stated = matter.get("license")
    if stated == "other" and matter.get("license_name"):
        stated = matter["license_name"]
    if isinstance(stated, list):
        return "; ".join(map(str, stated)) or None
    return None if stated is None else str(stated)


def licences(directories: Iterable[Path]) -> dict[Path, str | None]:
    """The licence that each model directory states, in the order given."""
    return {Path(directory): licence(Path(directory)) for directory in directories}


def compare_licences(directories: Iterable[Path]) -> list[Finding]:
    """Models without a licence, with a restricting one, or with different ones."""
    findings: list[Finding] = []
    stated: set[str] = set()
    for directory in map(Path, directories):
        try:
            found = licence(directory)
        except WeightsError as error:
            findings.append(Finding("warning", str(directory), error.problem, error.fix or ""))
            continue
        if found is None:
            findings.append(
                Finding("warning", str(directory), "no licence is stated", "ask its authors")
            )
            continue
        stated.add(found)
        if _RESTRICTED.search(found):
            message = f"the licence {found} may restrict use or derived models"
            findings.append(Finding("warning", str(directory), message, "read its terms"))
    if len(stated) > 1:
        message = f"the models have different licences: {', '.join(sorted(stated))}"
        findings.append(Finding("info", "license", message, "the merge must satisfy all of them"))
    return worst_first(findings)


def _parsed(text: str, card: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WeightsError(
            "the model card's front matter is not YAML", where=card, found=error,
            fix="correct the lines between --- at the top of README.md",
        ) from error  # fmt: skip
    return content if isinstance(content, dict) else {}

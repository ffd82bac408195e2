"""One thing that a comparison found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
_ORDER = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Finding:
    """``subject`` is the config key, tensor or file; ``fix`` what to do ("" if nothing)."""

    severity: Severity
    subject: str
    message: str
    fix: str = ""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings by severity; equally severe ones keep their order."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))

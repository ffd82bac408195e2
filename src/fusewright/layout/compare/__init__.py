"""Will these merge, and should they? Answered from headers, configs, tokenizers and model cards.

Pure and without torch; nothing here reads a weight. Every comparison returns findings, worst
first: an *error* stops a merge or makes it meaningless, a *warning* may make it worse than its
author thinks, *info* is worth knowing.
"""

from __future__ import annotations

from fusewright.layout.compare.configs import compare_configs
from fusewright.layout.compare.finding import Finding, Severity, worst_first
from fusewright.layout.compare.licences import compare_licences, licence, licences
from fusewright.layout.compare.shapes import compare_shapes
from fusewright.layout.compare.vocabularies import compare_vocabularies

__all__ = [
    "Finding",
    "Severity",
    "compare_configs",
    "compare_licences",
    "compare_shapes",
    "compare_vocabularies",
    "licence",
    "licences",
    "worst_first",
]

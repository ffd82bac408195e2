"""Will these models merge, and should they?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusewright.engine import _check_headers as headers
from fusewright.engine._check_numbers import compare_numbers
from fusewright.engine._descent import Descent, Verdict, descent
from fusewright.engine._models import Ref, match, names_of
from fusewright.engine.options import parse_size
from fusewright.engine.progress import Listener
from fusewright.engine.tables import Table
from fusewright.errors import WeightsError
from fusewright.layout.compare import Finding, worst_first
from fusewright.weights import Weights, canonical, open_weights

__all__ = ["Checkup", "Descent", "ExpertCheck", "Verdict", "check_models", "descent"]


@dataclass(frozen=True)
class ExpertCheck:
    """What was found about one expert; ``descent`` is None if nothing could be compared."""

    name: str
    findings: tuple[Finding, ...]
    descent: Descent | None


@dataclass(frozen=True)
class Checkup:
    """``general`` findings are about the base, or several models; ``cosines`` are those of task
    vectors; ``full`` says whether every element was read, or a sample."""

    base: str
    experts: tuple[ExpertCheck, ...]
    general: tuple[Finding, ...]
    cosines: Mapping[str, Mapping[str, float | None]]
    full: bool

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All, worst first; subjects begin with the expert's name."""
        return tuple(worst_first([*self.general, *_named(self.experts)]))

    @property
    def ok(self) -> bool:
        """Whether nothing that was found stops a merge or makes it meaningless."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers; None where a number does not apply."""
        return {
            "ok": self.ok,
            "base": self.base,
            "full": self.full,
            "experts": [asdict(expert) for expert in self.experts],
            "general": [asdict(finding) for finding in self.general],
            "cosines": {key: dict(row) for key, row in self.cosines.items()},
        }

    def tables(self) -> list[Table]:
        """The verdict, the evidence of descent, and every finding with what to do."""
        found = self.findings
        severities = [one.severity for one in found]
        counts = [severities.count(kind) for kind in ("error", "warning", "info")]
        verdict = "no" if counts[0] else "yes, but see the warnings" if counts[1] else "yes"
        evidence = "every element" if self.full else "a sample"
        descents = [(expert.name, expert.descent) for expert in self.experts if expert.descent]
        return [
            Table("Will these merge?", ("answer", "errors", "warnings", "infos"),
                  ((verdict, *counts),)),
            Table(
                f"Descent from {self.base} (matrices, {evidence})",
                ("expert", "descends", "‖τ‖/‖θ0‖", "cos(θ, θ0)", "elements"),
                tuple((name, d.verdict, d.relative_norm, d.cosine, d.elements)
                      for name, d in descents),
            ),
            Table("Findings", ("severity", "subject", "what was found", "what to do"),
                  tuple((f.severity, f.subject, f.message, f.fix) for f in found)),
        ]  # fmt: skip


def check_models(
    base: Ref,
    experts: Mapping[str, Ref] | Sequence[Ref],
    *,
    full: bool = False,
    threads: int = 2,
    memory: int | str = 2**30,
    progress: Listener | None = None,
) -> Checkup:
    """Compare experts with the base that they are to be merged over.

    Names, shapes, dtypes and tied heads; token ids; configs; an adapter's declared base;
    licences; and numbers: descent from the base (see :func:`descent`), NaN and infinities,
    experts that are the base or each other. Numbers are from a sample of whole blocks, 8 MiB a
    model, or with ``full`` from every element under ``memory`` bytes. An expert that cannot be
    opened is a finding. Raises WeightsError if the base cannot be.
    """
    with ExitStack() as stack:
        origin = _open(stack, base, None)
        found: dict[str, list[Finding]] = {}
        usable: dict[str, Weights] = {}
        for name, ref in _by_name(experts).items():
            try:
                usable[name] = _open(stack, ref, origin)
                found[name] = headers.compare_headers(origin, usable[name])
            except WeightsError as error:
                usable.pop(name, None)
                found[name] = [headers.from_error(error)]
        general = headers.licence_findings([origin, *usable.values()])
        matched = match(canonical(origin), {k: canonical(w) for k, w in usable.items()})
        numbers = compare_numbers(
            matched, full=full, threads=threads, memory=parse_size(memory), progress=progress
        )
        checked = tuple(
            ExpertCheck(name, tuple(worst_first([*first, *numbers.findings.get(name, ())])),
                        numbers.descents.get(name))
            for name, first in found.items()
        )  # fmt: skip
        everything = tuple(worst_first([*general, *numbers.general]))
        return Checkup(origin.label, checked, everything, numbers.cosines, numbers.full)


def _open(stack: ExitStack, ref: Ref, base: Weights | None) -> Weights:
    weights = open_weights(ref, base=base)
    if weights is not ref:
        stack.callback(weights.close)
    return weights


def _by_name(experts: Mapping[str, Ref] | Sequence[Ref]) -> dict[str, Ref]:
    if isinstance(experts, Mapping):
        return dict(experts)
    labels = [str(r) if isinstance(r, str | Path) else type(r).__name__ for r in experts]
    return dict(zip(names_of(labels), experts, strict=True))


def _named(experts: Iterable[ExpertCheck]) -> Iterator[Finding]:
    for expert in experts:
        for finding in expert.findings:
            yield replace(finding, subject=f"{expert.name}: {finding.subject}")

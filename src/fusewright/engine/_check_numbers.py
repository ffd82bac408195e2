"""What the numbers say about a merge: descent, NaN, copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusewright.engine._descent import ALIKE, CLOSE, UNLIKE, Descent, judged, matrices
from fusewright.engine._models import Matched
from fusewright.engine._pairs import Pairs, all_spans, compare, sampled_spans
from fusewright.engine.progress import Listener
from fusewright.layout.compare import Finding

SAMPLE = 8 * 2**20
"""Bytes of each model, unless all is read."""
COPY = 0.999
"""Task vectors with a cosine above this are one expert twice: independent ones are near 0, and
checkpoints of one run, thousands of steps apart, already differ by more than its 2.6°."""

_REPAIR = "train or download it again; --allow-nonfinite merges it as it is"


@dataclass(frozen=True)
class Numbers:
    """Findings by expert and in general, descents, and cosines of task vectors."""

    findings: Mapping[str, list[Finding]]
    general: list[Finding]
    descents: Mapping[str, Descent]
    cosines: Mapping[str, Mapping[str, float | None]]
    full: bool


def compare_numbers(
    matched: Matched, *, full: bool, threads: int, memory: int, progress: Listener | None
) -> Numbers:
    """Read a sample, or everything; ``full`` of the result says whether it was everything."""
    experts = list(matched.experts)
    sources = [source for source in matched.sources() if source.is_float]
    n = len(experts)
    spans = (
        all_spans(sources, n, threads, memory)
        if full
        else sampled_spans(sources, SAMPLE * (n + 1))
    )
    found = compare(
        matched.base, tuple(matched.experts.values()), spans, threads=threads, progress=progress
    )
    shapes = {s.name: info.shape for s in sources if (info := matched.base_info(s.name))}
    chosen = [s.name for s in matrices(sources, shapes) if s.name in found]
    weighty = Pairs.total([found[name] for name in chosen], n)
    whole = Pairs.total(list(found.values()), n)
    everything = sum(s.stop - s.start for s in spans) == sum(s.numel for s in sources)
    descents = {key: judged(weighty, t) for t, key in enumerate(experts)}
    return Numbers(
        {key: _of_expert(t, descents[key], whole, found, everything)
         for t, key in enumerate(experts)},
        [*_of_base(found), *_copies(experts, whole)],
        descents,
        {a: {b: whole.cosine(i, j) for j, b in enumerate(experts)} for i, a in enumerate(experts)},
        everything,
    )  # fmt: skip


def _of_expert(
    t: int, descent: Descent, whole: Pairs, found: Mapping[str, Pairs], everything: bool
) -> list[Finding]:
    findings = _nonfinite({name: int(pairs.bad[t + 1]) for name, pairs in found.items()})
    if not whole.elements[t]:
        message, fix = "no tensor could be compared", "choose models of one architecture and size"
        return [*findings, Finding("warning", "weights", message, fix)]
    if not whole.changed[t]:
        seen = "" if everything else f" in a sample of {whole.elements[t]} elements"
        findings.append(
            Finding(
                "warning", "weights", f"identical to the base{seen}: it adds nothing to a merge",
                "leave it out, or look for the fine-tuned weights"
                + ("" if everything else " (--full compares every element)"),
            )
        )  # fmt: skip
    elif descent.verdict != "yes":
        findings.append(_stranger(descent))
    return findings


def _stranger(descent: Descent) -> Finding:
    word = {"no": "does not descend", "doubtful": "may not descend"}[descent.verdict]
    numbers = f"‖τ‖/‖θ0‖ = {_shown(descent.relative_norm)}, cosine {_shown(descent.cosine)}"
    expected = f"descendants have up to {CLOSE} and at least {ALIKE}"
    if descent.verdict == "no":
        expected += f", strangers a cosine below {UNLIKE}"
    return Finding(
        "warning", "descent", f"descends: {descent.verdict}: it {word} from the base: {numbers} "
        f"over {descent.elements} elements of matrices ({expected})",
        "give the base that it was fine-tuned from, or leave it out",
    )  # fmt: skip


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _of_base(found: Mapping[str, Pairs]) -> list[Finding]:
    return [
        Finding(one.severity, f"base: {one.subject}", one.message, one.fix)
        for one in _nonfinite({name: int(pairs.bad[0]) for name, pairs in found.items()})
    ]


def _nonfinite(bad: Mapping[str, int]) -> list[Finding]:
    names = [name for name, count in bad.items() if count]
    if not names:
        return []
    subject = names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
    count = sum(bad.values())
    return [Finding("error", subject, f"{count} values are NaN or infinite", _REPAIR)]


def _copies(experts: list[str], whole: Pairs) -> list[Finding]:
    findings = []
    for j, b in enumerate(experts):
        for i, a in enumerate(experts[:j]):
            cosine = whole.cosine(i, j)
            if cosine is not None and cosine > COPY:
                message = (
                    f"their task vectors point the same way: cosine {cosine:.4f}, "
                    f"norms {whole.norm(i):.4g} and {whole.norm(j):.4g}"
                )
                fix = "leave one out, or give each half the weight"
                findings.append(Finding("info", f"{a}, {b}", message, fix))
    return findings

"""What headers, configs, tokenizers and model cards say about a merge."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fusewright.engine._models import Matched, match
from fusewright.engine.inspect import differences
from fusewright.errors import FusewrightError, WeightsError
from fusewright.layout.compare import (
    Finding,
    compare_configs,
    compare_licences,
    compare_shapes,
    compare_vocabularies,
)
from fusewright.weights import Weights, align, canonical
from fusewright.weights.adapter import AdapterWeights

_ALIKE = "merge models of one architecture, or convert one of them"


def compare_headers(base: Weights, expert: Weights) -> list[Finding]:
    """Findings about one expert. Raises WeightsError if its names are ambiguous."""
    matched = match(canonical(base), {"": canonical(expert)})
    return [
        *_shapes(matched),
        *_dtypes(matched),
        *_ties(matched),
        *_vocabularies(base, expert),
        *compare_configs(base.config, expert.config),
        *_declared_base(base, expert),
    ]


def from_error(error: FusewrightError) -> Finding:
    """A refusal as a finding."""
    said = [error.problem]
    said += [f"expected {error.expected}"] if error.expected is not None else []
    said += [f"found {error.found}"] if error.found is not None else []
    return Finding("error", str(error.where), "; ".join(said), error.fix or "")


def licence_findings(models: Iterable[Weights]) -> list[Finding]:
    """About the licences of those models that have a directory, each once."""
    return compare_licences(dict.fromkeys(where for one in models if (where := folder(one))))


def folder(weights: Weights) -> Path | None:
    """The directory of a model's own files: an adapter's, not its base's."""
    adapter = _adapter(weights)
    return weights.root if adapter is None else adapter.adapter_root


def _shapes(matched: Matched) -> list[Finding]:
    """After the rules for prefixes, tied heads and buffers, as in a merge."""
    (aligned,) = matched.alignment.experts.values()
    (weights,) = matched.experts.values()
    base = {n: i.shape for n in matched.alignment.names if (i := matched.base_info(n))}
    expert = {name: weights[own].shape for name, own in aligned.names.items()}
    # Whatever is absent or extra by another rule than our "all is optional" is as it should be.
    for name, reason in aligned.absent.items():
        if not reason.startswith("optional"):
            base.pop(name, None)
    extra = [own for own, reason in aligned.skipped.items() if reason.startswith("optional")]
    return compare_shapes(base, expert | {own: weights[own].shape for own in extra})


def _dtypes(matched: Matched) -> list[Finding]:
    findings = []
    kinds: dict[tuple[str, str], list[str]] = {}
    for one in differences(matched):
        if one.kind == "dtype" and one.base is not None and one.found is not None:
            pair = one.base.split()[0], one.found.split()[0]
            kinds.setdefault(pair, []).append(one.tensor)
    for (mine, theirs), names in kinds.items():
        bad = ("float" in mine) != ("float" in theirs)
        where = names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
        findings.append(
            Finding(
                "error" if bad else "info", where, f"{mine} in the base, {theirs} in the expert",
                _ALIKE if bad else "computed exactly in float32; --out-dtype chooses the result's",
            )
        )  # fmt: skip
    return findings


def _ties(matched: Matched) -> list[Finding]:
    try:
        align(matched.base, matched.experts, matched.layout.tied, optional=("*",))
    except WeightsError as error:
        return [from_error(error)]
    return []


def _vocabularies(base: Weights, expert: Weights) -> list[Finding]:
    mine, theirs = folder(base), folder(expert)
    if mine is None or theirs is None:
        return []
    try:
        found = compare_vocabularies(mine, theirs)
    except WeightsError as error:
        return [from_error(error)]
    # An adapter without a tokenizer uses its base's.
    silent = _adapter(expert) is not None
    return [one for one in found if not (silent and one.subject == "tokenizer")]


def _declared_base(base: Weights, expert: Weights) -> list[Finding]:
    adapter = _adapter(expert)
    if adapter is None:
        return []
    declared = adapter.base_model
    if not declared:
        return [Finding("info", "adapter_config.json", "the adapter declares no base",
                        "make sure that it was trained on this one")]  # fmt: skip
    if _same_model(declared, base):
        return []
    return [
        Finding(
            "warning", "base_model_name_or_path",
            f"the adapter declares the base {declared}, the one given is {base.label}",
            f"fusewright check {declared} {expert.label}",
        )
    ]  # fmt: skip


def _same_model(declared: str, base: Weights) -> bool:
    """The same place, or the same name wherever it is (a Hub model that was downloaded)."""
    known = {base.label, str(base.config.get("_name_or_path") or "")}
    if base.root is not None:
        known.add(str(Path(base.root).resolve()))
        declared = str(Path(declared).resolve()) if Path(declared).exists() else declared
    return _leaf(declared) in {_leaf(name) for name in known if name}


def _leaf(name: str) -> str:
    """The last part of a path or Hub id, without a revision and in lower case."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return last.partition("@")[0].lower()


def _adapter(weights: Weights) -> AdapterWeights | None:
    """The adapter under views that rename or dequantise."""
    seen: Weights | None = weights
    while seen is not None and not isinstance(seen, AdapterWeights):
        seen = getattr(seen, "inner", None)
    return seen

"""Two tokenizers: whether the same token is the same row in both models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusewright.errors import WeightsError
from fusewright.layout.compare.finding import Finding, Severity, worst_first

_EXAMPLES = 5
_ALIGN = "rows of embeddings and head mean different tokens: align the vocabularies"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids, as stated by ``source``; digests of what cannot be compared by id."""

    ids: Mapping[str, int]
    source: str
    merges: str = ""
    models: Mapping[str, str] = field(default_factory=dict)


def compare_vocabularies(base_dir: Path, expert_dir: Path) -> list[Finding]:
    """Tokens whose ids disagree, tokens that only one has, other merges or SentencePiece models.

    Reads tokenizer.json, else vocab.json or vocab.txt with added_tokens.json; SentencePiece files
    are compared by their bytes. Raises WeightsError where one of them is not what it should be.
    """
    base, expert = read_vocabulary(base_dir), read_vocabulary(expert_dir)
    if base is None or expert is None:
        return _without(base, expert)
    findings = _by_ids(base.ids, expert.ids)
    if base.merges and expert.merges and base.merges != expert.merges:
        findings.append(
            Finding("warning", "merges", "the tokenizers split text differently", "keep the base's")
        )
    for name in sorted(base.models.keys() & expert.models.keys()):
        if base.models[name] != expert.models[name]:
            severity: Severity = "warning" if base.ids and expert.ids else "error"
            findings.append(
                Finding(severity, name, "SentencePiece models differ", "compare their pieces")
            )
    return worst_first(findings)


def _without(base: Vocabulary | None, expert: Vocabulary | None) -> list[Finding]:
    if base is None and expert is None:
        return []
    side = "base" if base is None else "expert"
    message = f"the {side} has no tokenizer: its token ids cannot be compared"
    fix = "put the tokenizer that it was trained with beside its weights"
    return [Finding("warning" if side == "base" else "info", "tokenizer", message, fix)]


def _by_ids(base: Mapping[str, int], expert: Mapping[str, int]) -> list[Finding]:
    if not base or not expert:
        return []
    taken = {index: token for token, index in base.items()}
    moved = [token for token in base if expert.get(token, base[token]) != base[token]]
    lost = [token for token in base if token not in expert]
    new = [token for token in expert if token not in base]
    replaced = [token for token in new if expert[token] in taken]
    added = [token for token in new if expert[token] not in taken]
    if len(lost) <= len(replaced):
        lost = []  # already told: other tokens stand in their rows
    return [
        *_told("error", "{n} tokens have other ids: {shown}", _ALIGN,
               [f"{t!r} {base[t]} -> {expert[t]}" for t in moved]),
        *_told("error", "{n} ids have other tokens: {shown}", _ALIGN,
               [f"{expert[t]}: {taken[expert[t]]!r} -> {t!r}" for t in replaced]),
        *_told("warning", "the expert adds {n} tokens: {shown}",
               "the base's tokenizer is written: prompts must not need these tokens",
               [f"{t!r} {expert[t]}" for t in added]),
        *_told("warning", "the expert lacks {n} tokens: {shown}",
               "its rows for them, if any, were not trained", [f"{t!r} {base[t]}" for t in lost]),
    ]  # fmt: skip


def _told(severity: Severity, message: str, fix: str, cases: list[str]) -> list[Finding]:
    """One finding with the number of cases and the first of them; none if there are none."""
    if not cases:
        return []
    shown = ", ".join(cases[:_EXAMPLES]) + (", ..." if len(cases) > _EXAMPLES else "")
    return [Finding(severity, "token ids", message.format(n=len(cases), shown=shown), fix)]


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The token ids that a model directory states; None if it has no tokenizer."""
    models = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("*.model"))
    }
    path = directory / "tokenizer.json"
    if path.is_file():
        return _from_tokenizer_json(path, models)
    added = directory / "added_tokens.json"
    extra = _ids(added, _json(added)) if added.is_file() else {}
    if (path := directory / "vocab.json").is_file():
        return Vocabulary(_ids(path, _json(path)) | extra, path.name, _merges(directory), models)
    if (path := directory / "vocab.txt").is_file():
        tokens = _text(path).removesuffix("\n").split("\n")
        return Vocabulary(dict(zip(tokens, range(len(tokens)), strict=True)) | extra, path.name,
                          models=models)  # fmt: skip
    return Vocabulary(extra, "", models=models) if models or extra else None


def _from_tokenizer_json(path: Path, models: Mapping[str, str]) -> Vocabulary:
    content = _json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise _malformed(path, 'an object with "model"', type(content).__name__)
    vocab = model.get("vocab", {})
    try:
        if isinstance(vocab, list):  # Unigram: [token, score] in the order of ids
            vocab = {token: index for index, (token, _) in enumerate(vocab)}
        ids = _ids(path, vocab)
        ids |= {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(
            path, "pieces, and added_tokens with content and id", repr(error)
        ) from error
    pairs = model.get("merges") or ()
    rules = [" ".join(pair) if isinstance(pair, list) else str(pair) for pair in pairs]
    return Vocabulary(ids, path.name, _digest("\n".join(rules)) if rules else "", models)


def _merges(directory: Path) -> str:
    path = directory / "merges.txt"
    if not path.is_file():
        return ""
    rules = [line for line in _text(path).split("\n") if line and not line.startswith("#version")]
    return _digest("\n".join(rules))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ids(path: Path, content: object) -> dict[str, int]:
    if isinstance(content, dict) and all(type(index) is int for index in content.values()):
        return dict(content)
    raise _malformed(path, "an object from token to id", type(content).__name__)


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "JSON", error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(path, "a readable text file in UTF-8", error) from error


def _malformed(path: Path, expected: str, found: object) -> WeightsError:
    return WeightsError(
        "a tokenizer file cannot be read", where=path, expected=expected, found=found,
        fix="fetch the model's tokenizer files again",
    )  # fmt: skip

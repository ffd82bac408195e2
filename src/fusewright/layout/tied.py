"""Tensors that are one in the model: input embeddings, output head, and some biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from fusewright.layout.config import sections
from fusewright.layout.names import canonical_order
from fusewright.layout.spec import Role

Shape = tuple[int, ...]
Groups = tuple[tuple[str, ...], ...]

_LANGUAGE_MODEL = re.compile(r"CausalLM|LMHead|MaskedLM|ConditionalGeneration")


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the output head to the input embedding.

    The outermost statement counts. A config that says nothing means yes, as in transformers,
    whose older versions wrote only what differed from that; no config at all means no.
    """
    for _, section in sections(config):
        if isinstance(section.get("tie_word_embeddings"), bool):
            return bool(section["tie_word_embeddings"])
    return "model_type" in config


def find_tied(
    shapes: Mapping[str, Shape],
    roles: Mapping[str, Role],
    vocabulary: Mapping[str, bool],
    config: Mapping[str, Any],
) -> tuple[Groups, list[str]]:
    """Groups of names that share storage in the model, the stored one first; and notes.

    An encoder-decoder's ``shared`` embedding is both its ``embed_tokens`` whatever the config
    says; heads join if it ties them. ``x.decoder.bias`` is ``x.bias``, as in BERT's family.
    """
    names = canonical_order(n for n in shapes if vocabulary[n] or n.endswith(".decoder.bias"))
    embeddings = [n for n in names if roles[n] is Role.EMBEDDING and vocabulary[n]]
    groups = {name: [name] for name in embeddings}
    for stored in [n for n in embeddings if n.split(".")[-2:-1] == ["shared"]]:
        for other in embeddings:
            if other.endswith("embed_tokens.weight") and shapes[other] == shapes[stored]:
                groups[stored] += groups.pop(other, [])
    notes: list[str] = []
    heads = [n for n in names if roles[n] is Role.HEAD and len(shapes[n]) == 2 and vocabulary[n]]
    if ties_embeddings(config):
        for head in heads:
            if partner := _partner(head, groups, shapes):
                groups[partner].append(head)
        if embeddings and not heads and _LANGUAGE_MODEL.search(str(config.get("architectures"))):
            notes.append(f"no output head is stored: {next(iter(groups))} serves as one")
    biases = [
        (name.replace(".decoder.bias", ".bias"), name)
        for name in names
        if name.endswith(".decoder.bias")
        and shapes.get(name.replace(".decoder.bias", ".bias")) == shapes[name]
    ]
    tied = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    return tied + tuple(biases), notes


def _partner(head: str, groups: Mapping[str, list[str]], shapes: Mapping[str, Shape]) -> str | None:
    """The stored embedding of the head's shape; of several, the one whose name is nearest."""
    same = [stored for stored in groups if shapes[stored] == shapes[head]]
    return max(same, key=lambda stored: _shared(stored, head), default=None)


def _shared(one: str, other: str) -> int:
    """How many components two names have in common from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

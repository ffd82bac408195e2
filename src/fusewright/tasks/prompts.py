"""Prompts that are run once, and gone on from by the key-value cache that a model makes of them."""

from __future__ import annotations

from typing import Any

from fusewright.tasks.errors import DataError


def prompted(model: Any, **prompt: Any) -> tuple[Any, Any]:
    """What a model answers to a prompt, and the cache to go on from. Raises DataError if it keeps
    none."""
    found = model(**prompt, use_cache=True)
    cache = getattr(found, "past_key_values", None)
    if cache is None:
        raise DataError(
            "the model keeps no key-value cache of a prompt", where=type(model).__name__,
            expected="past_key_values in its answer", fix="a causal model of transformers",
        )  # fmt: skip
    return found, cache

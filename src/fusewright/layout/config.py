"""A model's config, as a tree of sections: the top, ``text_config``, ``vision_config`` …"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and its nested configs, outermost first, each with its dotted path."""
    yield "", config
    for key, value in config.items():
        if isinstance(value, Mapping) and (key.endswith("config") or "model_type" in value):
            for path, section in sections(value):
                yield f"{key}.{path}".rstrip("."), section


def sections_for(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Sections, those about the tensor's own tower (vision, audio, text) first."""
    for tower, words in (("vision", ("vis", "image")), ("audio", ("audio",)), ("text", ("text",))):
        if any(word in name for word in words):
            return [s for _, s in sorted(sections(config), key=lambda item: tower not in item[0])]
    return [section for _, section in sections(config)]


def integer(section: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """The first of the keys that states a positive integer in this section."""
    for key in keys:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def integers(config: Mapping[str, Any], keys: Sequence[str]) -> set[int]:
    """What any section states under any of the keys."""
    found = (integer(section, (key,)) for _, section in sections(config) for key in keys)
    return {value for value in found if value is not None}


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model's config says that an encoder reads what a decoder answers."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

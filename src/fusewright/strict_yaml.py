"""YAML as every file and option of the house is read: what it says is there to see."""

from __future__ import annotations

from typing import Any

import yaml


class StrictYAML(yaml.SafeLoader):
    """YAML without anchors, aliases, tags and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed",
                                              event.start_mark)  # fmt: skip
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"tags are not allowed: {event.tag}",
                                              event.start_mark)  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for k, (at, _) in zip(keys, node.value, strict=True):
            if keys.count(k) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {k!r} is given twice", at.start_mark
                )
        return super().construct_mapping(node, deep)

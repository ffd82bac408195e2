"""The names that a Hugging Face model gives its tensors once loaded, where they are not the file's.

transformers (from 5.0) loads checkpoints of older layouts into modules with newer names, and saves
them under the older ones again. An adapter names modules, so over such a base its names are not
the file's. transformers itself knows the renaming; it is asked only when names do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def module_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Module's name to file's name, for tensors that are renamed and not otherwise changed.

    {} if transformers is not installed, does not know the config's architecture, or has no
    renaming for it. The model is built without data, and from transformers' own code only.
    """
    model = _skeleton(config)
    if model is None:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 does not rename
        return {}
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if not isinstance(step, WeightRenaming)]
    found = {}
    for name in names:
        new, converted = rename_source_key(name, renamings, converters)
        if converted is None:
            found[new] = name
    return found


def _skeleton(config: Mapping[str, Any]) -> Any:
    """The architecture that the config names, on the meta device; None if it is not known."""
    architectures = config.get("architectures")
    try:
        import torch
        import transformers
    except ImportError:
        return None
    if not isinstance(architectures, list) or not architectures:
        return None
    cls: Any = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None
    try:
        settings: Any = cls.config_class  # type: ignore[attr-defined]
        with torch.device("meta"):
            return cls(settings.from_dict(dict(config)))
    except Exception:  # a config is data: it may ask for anything, and then renames nothing
        return None

"""How a suite's pictures are prepared: as it says, else as the base's own config does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fusewright.bench.suite_file import SuiteError
from fusewright.bench.suite_tasks import taken
from fusewright.engine.libraries import OPEN_CLIP, TRANSFORMERS, known_config

if TYPE_CHECKING:
    from fusewright.bench.suite import Suite
    from fusewright.tasks.images import ImagePreparation

_SIZES = ("img_size", "force_image_size")
"""Arguments of timm's and OpenCLIP's ``create_model`` that change the pictures' size."""


def preparation(suite: Suite, said: Any) -> ImagePreparation:
    """``said`` in the task's options, the base's ``preprocessor_config.json``, or its config in
    the words of the library that opens it.

    Raises SuiteError if nothing says it, DataError for what is not done here.
    """
    from fusewright.tasks.images import ImagePreparation

    if said is not None:
        return ImagePreparation(**taken(said))
    path = suite.base / "preprocessor_config.json"
    if path.is_file():
        return ImagePreparation.read(json.loads(path.read_text("utf-8")))
    found = _of_library(suite)
    if found is None:
        raise SuiteError(
            "nothing says how pictures are prepared", where=path,
            fix="tasks: {NAME: {options: {preparation: {size: 32, ...}}}}",
        )  # fmt: skip
    return found


def _of_library(suite: Suite) -> ImagePreparation | None:
    from fusewright.tasks.image_configs import from_open_clip, from_timm

    opens = suite.spec.opens
    if opens.library == TRANSFORMERS:
        return None
    config = known_config(suite.base, opens.library, opens.named)
    size = next((opens.arguments[key] for key in _SIZES if key in opens.arguments), None)
    read = from_open_clip if opens.library == OPEN_CLIP else from_timm
    return read(config, size) if config else None

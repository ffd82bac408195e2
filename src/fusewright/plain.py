"""Values as JSON can say them."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value

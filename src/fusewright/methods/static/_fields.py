"""The kinds of numbers that methods' parameters are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""The kept fraction, in (0, 1]."""
Scope = Literal["model", "tensor"]
"""Over what an order statistic or a majority is found."""

"""Where a batch holds pictures, and how a model's values follow from raw pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Values are (raw - mean) / std of raw pixels in [0, 1], (n, channels, height, width).

    ``key`` is their name in a batch; None where the batch is the tensor itself. ``mean`` and
    ``std`` have one number for each channel, or one for all. Changes of pictures are bounded in
    raw pixels, and this is what knows them.

    Raises DataError if a batch has no such pictures.
    """

    key: str | None = "pixel_values"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def raw(self, batch: Any) -> Tensor:
        """A batch's raw pixels (n, channels, height, width)."""
        values = self._values(batch)
        return values * _channels(self.std, values) + _channels(self.mean, values)

    def changed(self, batch: Any, raw: Tensor) -> Any:
        """The batch with other raw pixels; gradients flow to them."""
        values = (raw - _channels(self.mean, raw)) / _channels(self.std, raw)
        return values if self.key is None else {**batch, self.key: values}

    def _values(self, batch: Any) -> Tensor:
        from torch import Tensor

        held = isinstance(batch, Mapping) and self.key in batch
        values = batch if self.key is None else batch[self.key] if held else None
        if not isinstance(values, Tensor) or values.dim() != 4 or not values.is_floating_point():
            raise DataError(
                "a batch does not hold pictures where they are said to be", where=f"{self.key!r}",
                expected="a floating-point tensor (n, channels, height, width)",
                found=sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__,
                fix='Pictures(key="pixel_values", mean=..., std=...) as they were prepared',
            )  # fmt: skip
        return values


def _channels(numbers: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(numbers).view(1, -1, 1, 1)

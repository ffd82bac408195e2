"""Raw bytes to numbers and back: decode exactly, compute wide, round once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusewright.errors import NumericError
from fusewright.weights import DType


@dataclass(frozen=True)
class Finite:
    """What may pass: NaN and infinity in the inputs, and overflow on narrowing."""

    allow_nonfinite: bool = False
    allow_overflow: bool = False


def decode(raw: Tensor, stored: DType, dtype: torch.dtype) -> Tensor:
    """Bytes (n·itemsize,) as numbers (n,). May share memory with ``raw``."""
    return raw.view(stored.torch).to(dtype)


def check_input(x: Tensor, where: str, rule: Finite) -> None:
    """Refuse NaN and infinity in what was read."""
    if rule.allow_nonfinite or x.numel() == 0 or _all_finite(x):
        return
    bad = int((~x.isfinite()).sum())
    raise NumericError(
        f"{bad} values are NaN or infinite", where=where, expected="finite weights",
        fix="repair the checkpoint, or pass --allow-nonfinite (in Python: allow_nonfinite=True)",
    )  # fmt: skip


def encode(x: Tensor, stored: DType, where: str, rule: Finite) -> Tensor:
    """Numbers (n,) as bytes in the storage dtype, rounded once to nearest even.

    Overflow is counted before the cast (fp8 would saturate or turn to NaN, fp16 to infinity).
    """
    target = stored.torch
    narrowed = x.to(target)
    if x.numel():
        _check_output(x, target, where, rule)
    return narrowed.contiguous().view(-1).view(torch.uint8)


def narrowed(x: Tensor, dtype: torch.dtype, where: str, rule: Finite) -> Tensor:
    """A tensor in another dtype, by the same rule."""
    return encode(x.detach().reshape(-1), DType.of(dtype), where, rule).view(dtype).view(x.shape)


def _check_output(x: Tensor, target: torch.dtype, where: str, rule: Finite) -> None:
    low, high = torch.aminmax(x)
    limit = overflow_limit(target)
    if float(low) > -limit and float(high) < limit:
        return
    bad = int((~x.isfinite()).sum())
    if bad and not rule.allow_nonfinite:
        raise NumericError(
            f"{bad} merged values are NaN or infinite", where=where,
            fix="check scale and weights, or pass --allow-nonfinite",
        )  # fmt: skip
    over = int((x.isfinite() & (x.abs() >= limit)).sum())
    if over and not rule.allow_overflow:
        raise NumericError(
            f"{over} merged values overflow {target}", where=where,
            expected=f"below {limit:g}", found=f"{float(x[x.isfinite()].abs().max()):g}",
            fix="--out-dtype bfloat16 or float32, or pass --allow-overflow",
        )  # fmt: skip


def overflow_limit(dtype: torch.dtype) -> float:
    """The magnitude from which rounding to nearest leaves the dtype's finite range."""
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        return float("inf")
    # Half a step above the largest finite number; eps is relative to the power of two below it.
    top = 2.0 ** (len(bin(int(info.max))) - 3)
    return float(info.max) + top * float(info.eps) / 2


def _all_finite(x: Tensor) -> bool:
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))

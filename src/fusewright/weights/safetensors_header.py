"""The proof that a safetensors header says the truth about its file.

The format (https://github.com/huggingface/safetensors#format): eight bytes, N, little-endian
unsigned; N bytes of a JSON object from tensor name to ``dtype``, ``shape`` and ``data_offsets``
(counted from the end of the header), with an optional ``__metadata__`` of strings; then the data,
covered by the tensors without overlap, hole or rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import WeightsError
from .json_text import LARGEST, parse_object
from .spec import DType, TensorInfo

_DTYPES = {dtype.code: dtype for dtype in DType}
_MOST_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and where its bytes begin, counted from the start of the file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A proven header: every tensor's place, and the file's free-form metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_size: int, where: object) -> int:
    """N, from the file's first eight bytes. Raises WeightsError if it cannot be true."""
    if file_size < 8 or len(prefix) < 8:
        raise WeightsError(
            "truncated: too short for a safetensors file",
            where=where, expected=">= 8 bytes", found=f"{file_size} bytes", fix=_AGAIN,
        )  # fmt: skip
    length = int.from_bytes(prefix[:8], "little")
    if length > LARGEST:
        raise WeightsError(
            "header length is beyond the format's bound (is this a safetensors file?)",
            where=where, expected=f"<= {LARGEST} bytes", found=f"{length} bytes",
        )  # fmt: skip
    if 8 + length > file_size:
        raise WeightsError(
            "header length goes beyond the end of the file",
            where=where, expected=f"<= {file_size - 8} bytes", found=f"{length} bytes", fix=_AGAIN,
        )  # fmt: skip
    return length


def prove_header(text: bytes, file_size: int, where: object) -> Header:
    """Parse the N bytes of JSON and prove them against the file's size.

    Raises WeightsError for: text that is not a JSON object with unique keys; an unknown dtype; a
    shape that is not a list of non-negative integers, or whose product is beyond 2^63 - 1;
    offsets that disagree with dtype and shape, overlap, leave a hole, or do not end with the file.
    """
    if not text.startswith(b"{"):
        raise WeightsError("header is not a JSON object", where=where, found=repr(text[:16]))
    table = parse_object(text, where)
    metadata = _metadata(table.pop("__metadata__", {}), where)
    begin = 8 + len(text)
    spans = [_span(name, value, f"{where}: {name}") for name, value in table.items()]
    _prove_cover(spans, file_size - begin, where)
    return Header({info.name: Entry(info, begin + start) for info, start in spans}, metadata)


def _metadata(value: object, where: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise WeightsError(
            "header's __metadata__ is not a map of strings", where=where, found=repr(value)[:80]
        )
    return value


def _span(name: str, value: Any, where: str) -> tuple[TensorInfo, int]:
    if any("\ud800" <= char <= "\udfff" for char in name):  # a lone surrogate is no UTF-8
        raise WeightsError("tensor name is not valid text", where=repr(where))
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(
            "tensor is not described as the format asks", where=where,
            expected="dtype, shape, data_offsets",
            found=", ".join(map(str, value)) if isinstance(value, dict) else repr(value)[:80],
        )  # fmt: skip
    info = TensorInfo(name, _dtype(value["dtype"], where), _shape(value["shape"], where))
    return info, _start(value["data_offsets"], info, where)


def _dtype(code: object, where: str) -> DType:
    if not isinstance(code, str) or code not in _DTYPES:
        raise WeightsError(
            "unknown dtype", where=where, expected=", ".join(_DTYPES), found=repr(code)[:80]
        )
    return _DTYPES[code]


def _shape(shape: object, where: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise WeightsError(
            "shape is not a list of non-negative integers", where=where, found=repr(shape)[:80]
        )
    product = 1
    for size in shape:  # like checked_mul: an intermediate overflow counts, even before a zero
        product *= size
        if product > _MOST_ELEMENTS:
            raise WeightsError(
                "shape's product overflows", where=where,
                expected=f"<= {_MOST_ELEMENTS} elements", found=repr(shape)[:80],
            )  # fmt: skip
    return tuple(shape)


def _start(offsets: object, info: TensorInfo, where: str) -> int:
    good = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
    if not good or offsets[1] - offsets[0] != info.nbytes:  # type: ignore[index]
        raise WeightsError(
            "data offsets disagree with dtype and shape", where=where,
            expected=f"[b, b + {info.nbytes}] for {info.dtype.code} {list(info.shape)}",
            found=repr(offsets)[:80],
        )  # fmt: skip
    start: int = offsets[0]  # type: ignore[index]
    return start


def _prove_cover(spans: list[tuple[TensorInfo, int]], data_size: int, where: object) -> None:
    spans.sort(key=lambda span: (span[1], span[0].nbytes))
    end, before = 0, "the header"
    for info, start in spans:
        if start != end:
            raise WeightsError(
                "tensors overlap" if start < end else "hole between tensors",
                where=f"{where}: {before}, {info.name}",
                expected=f"'{info.name}' begins at {end}", found=f"begins at {start}",
            )  # fmt: skip
        end, before = start + info.nbytes, info.name
    if end != data_size:
        truncated = end > data_size
        raise WeightsError(
            "truncated: tensors go beyond the end of the file" if truncated
            else "trailing bytes after the last tensor",
            where=where, expected=f"{end} bytes of data", found=f"{data_size} bytes",
            fix=_AGAIN if truncated else None,
        )  # fmt: skip


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_AGAIN = "copy or download the file again"

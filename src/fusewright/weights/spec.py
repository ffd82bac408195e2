"""What the rest of the house knows of a checkpoint: names, shapes, dtypes, ranges of bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """A storage dtype: (safetensors code, torch name, bytes an element, kind)."""

    F64 = ("F64", "float64", 8, "float")
    F32 = ("F32", "float32", 4, "float")
    F16 = ("F16", "float16", 2, "float")
    BF16 = ("BF16", "bfloat16", 2, "float")
    F8_E4M3 = ("F8_E4M3", "float8_e4m3fn", 1, "float")
    F8_E5M2 = ("F8_E5M2", "float8_e5m2", 1, "float")
    I64 = ("I64", "int64", 8, "int")
    I32 = ("I32", "int32", 4, "int")
    I16 = ("I16", "int16", 2, "int")
    I8 = ("I8", "int8", 1, "int")
    U64 = ("U64", "uint64", 8, "int")
    U32 = ("U32", "uint32", 4, "int")
    U16 = ("U16", "uint16", 2, "int")
    U8 = ("U8", "uint8", 1, "int")
    BOOL = ("BOOL", "bool", 1, "bool")

    def __init__(self, code: str, torch_name: str, itemsize: int, kind: str) -> None:
        self.code, self.torch_name, self.itemsize, self.kind = code, torch_name, itemsize, kind

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @classmethod
    def of(cls, name: object) -> DType:
        """The dtype of a safetensors code, a torch dtype or its name (``bf16``, ``fp32`` … too)."""
        text = str(name).removeprefix("torch.")
        text = _ALIASES.get(text.lower(), text)
        for dtype in cls:
            if text in (dtype.code, dtype.torch_name):
                return dtype
        raise KeyError(text)


_ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32",
    "float": "float32", "fp64": "float64", "double": "float64",
    "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2", "float8_e4m3": "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's name, storage dtype and shape, known from headers alone."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class LowRank:
    """A task vector kept as factors: ``scale * up @ down``, reshaped to the tensor's shape.

    ``up`` is (rows, r), ``down`` (r, cols) with rows·cols = numel; float32 (float64 if the adapter
    is float64). Orientation (Conv1D, embeddings, convolution) is already folded into the factors.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float


@dataclass(frozen=True)
class FileIdentity:
    """What tells that a file is still the one that was opened."""

    path: Path
    size: int
    mtime_ns: int
    inode: int


class Weights(Mapping[str, TensorInfo], ABC):
    """A read-only mapping from tensor name to :class:`TensorInfo`, with reads of element ranges.

    Opening one proves it. ``label`` is what the user called it; ``root`` the directory that holds
    its config and tokenizer (None for bare files and memory); ``config`` its parsed config.json
    ({} if none); ``notes`` says, a sentence each, what was recognised and mended (a stripped
    prefix, an absent tied head, a buffer that is recomputed). Thread-safe: ``read`` may be called
    by many threads at once.
    """

    label: str
    root: Path | None = None
    config: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()

    _infos: Mapping[str, TensorInfo]
    """Every tensor by name; a reader that keeps them otherwise overrides the three below."""

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @abstractmethod
    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """Fill ``out`` (writable bytes) with elements [start, stop) of the flattened tensor, in
        its storage dtype, little-endian. Raises WeightsError on a short or failed read."""

    def delta(self, name: str) -> LowRank | float | None:
        """The tensor's difference from the base it was opened over, if known without reading:
        a LowRank, ``0.0`` for an untouched tensor, or None (subtract to find out)."""
        return None

    def has_delta(self, name: str) -> bool:
        """Whether :meth:`delta` knows the difference; told without reading any factors."""
        return False

    def identities(self) -> tuple[FileIdentity, ...]:
        """The files behind this, as they were when opened (empty for memory)."""
        return ()

    def close(self) -> None:
        """Close the files; memory has none."""

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class IOCount:
    """Bytes and calls since the start: what tests assert and reports print."""

    bytes_read: int = 0
    bytes_written: int = 0
    largest_read: int = 0
    extra: dict[str, int] = field(default_factory=dict)

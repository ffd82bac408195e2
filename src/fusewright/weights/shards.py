"""Where each tensor of an output will lie: safetensors files, laid out before any computing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import OutputError
from .spec import TensorInfo

ALIGNMENT = 64
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its first bytes (length and JSON header, padded), where its
    tensors lie (absolute byte offset) and its whole size in bytes."""

    file: str
    header: bytes
    tensors: dict[str, tuple[TensorInfo, int]]
    size: int


def plan_shards(
    tensors: Sequence[TensorInfo],
    shard_size: int,
    metadata: Mapping[str, str],
    stem: str = "model",
) -> tuple[Shard, ...]:
    """Divide ``tensors``, in their order, over files of at most ``shard_size`` bytes of data.

    A larger tensor gets a file of its own. Within a file wider dtypes come first, because stock
    loaders view a tensor in place and need it aligned to its elements. Data begins on a 64-byte
    boundary. Raises OutputError for names that the format cannot hold and for headers over its
    limit, ValueError for a ``shard_size`` that is not positive.
    """
    if shard_size <= 0:
        raise ValueError(f"shard_size must be positive, not {shard_size}")
    _check_names(tensors)
    groups = list(_groups(tensors, shard_size)) or [[]]
    return tuple(
        _shard(_file_name(stem, number, len(groups)), group, metadata)
        for number, group in enumerate(groups, 1)
    )


def index_json(shards: Sequence[Shard]) -> bytes | None:
    """The Hugging Face index of several shards; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(info.nbytes for shard in shards for info, _ in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def index_name(shards: Sequence[Shard]) -> str:
    """The file name that loaders look for: ``model.safetensors.index.json``."""
    stem = shards[0].file.removesuffix(".safetensors")
    if len(shards) > 1:
        stem = stem.removesuffix(f"-00001-of-{len(shards):05d}")
    return f"{stem}.safetensors.index.json"


def _check_names(tensors: Sequence[TensorInfo]) -> None:
    seen: set[str] = set()
    for info in tensors:
        if info.name in seen or info.name == "__metadata__":
            raise OutputError(
                "A safetensors file cannot hold this tensor name.",
                where=info.name,
                expected="every name once, and none called __metadata__",
                fix="rename the tensor in the input",
            )
        seen.add(info.name)


def _groups(tensors: Sequence[TensorInfo], shard_size: int) -> Iterator[list[TensorInfo]]:
    group: list[TensorInfo] = []
    filled = 0
    for info in tensors:
        if group and filled + info.nbytes > shard_size:
            yield group
            group, filled = [], 0
        group.append(info)
        filled += info.nbytes
    if group:
        yield group


def _file_name(stem: str, number: int, count: int) -> str:
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _shard(file: str, group: list[TensorInfo], metadata: Mapping[str, str]) -> Shard:
    group = sorted(group, key=lambda info: -info.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for info in group:
        offsets[info.name], end = end, end + info.nbytes
        header[info.name] = {
            "dtype": info.dtype.code,
            "shape": list(info.shape),
            "data_offsets": [offsets[info.name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _LARGEST_HEADER:
        raise OutputError(
            "The header of one file would be larger than safetensors allows.",
            where=file,
            expected=f"at most {_LARGEST_HEADER} bytes",
            found=f"{len(text)} bytes",
            fix="use a smaller --shard-size",
        )
    prefix = len(text).to_bytes(8, "little") + text
    placed = {info.name: (info, len(prefix) + offsets[info.name]) for info in group}
    return Shard(file, prefix, placed, len(prefix) + end)

"""Is a published output still what was published? Every byte is hashed again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from .digest import content_digest, hash_range, tensor_digest
from .publish import manifest_checksum
from .spec import DType, TensorInfo
from .target import MANIFEST, is_safe_name

_CHUNK = 8 << 20


@dataclass(frozen=True)
class VerifyReport:
    """What differs from the manifest: files by name, and the tensors inside changed files.

    ``content_digest`` is what the tensors hash to now, None if one cannot be read.
    """

    out: Path
    expected_digest: str
    content_digest: str | None
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    bytes: int = 0

    @property
    def ok(self) -> bool:
        differs = self.missing or self.changed or self.extra or self.tensors
        return not differs and self.content_digest == self.expected_digest


Heard = Callable[[str, int, int], None]
"""Called with (tensor, bytes hashed by now, bytes of all tensors) after each tensor, in order."""


def verify(out: str | Path, threads: int = 1, heard: Heard | None = None) -> VerifyReport:
    """Hash a published output again and compare it with its manifest.

    Raises WeightsError where there is no manifest, or where it is itself damaged.
    """
    out = Path(out)
    manifest = read_manifest(out)
    output = manifest["output"]
    files: Mapping[str, Any] = output["files"]
    present = _files_in(out)
    found = {name: _size(out, name) for name in files if name in present}
    changed = {name for name, size in found.items() if size != files[name]["size"]}
    with ThreadPoolExecutor(threads) as pool:
        whole = [name for name in found if "sha256" in files[name]]
        hashes = pool.map(lambda name: _file_digest(out / name), whole)
        changed |= {n for n, h in zip(whole, hashes, strict=True) if h != files[n]["sha256"]}
        shards = {name: _header(out / name) for name in found if "header" in files[name]}
        changed |= {n for n, h in shards.items() if sha256(h).hexdigest() != files[n]["header"]}
        entries = output["tensors"]
        names = list(entries)
        hashed = pool.map(lambda name: _tensor(out, name, entries[name]["file"], shards), names)
        digests = dict(_counted(zip(names, hashed, strict=True), entries, heard))
    wrong = [name for name in names if digests[name] != entries[name]["digest"]]
    changed |= {entries[name]["file"] for name in wrong} & set(found)
    readable = {name: digest for name, digest in digests.items() if digest is not None}
    return VerifyReport(
        out=out,
        expected_digest=output["content_digest"],
        content_digest=content_digest(readable) if len(readable) == len(names) else None,
        missing=tuple(sorted(set(files) - set(found))),
        changed=tuple(sorted(changed)),
        extra=tuple(sorted(present - set(files) - {MANIFEST})),
        tensors=tuple(wrong),
        bytes=sum(found.values()),
    )


def _counted(
    digests: Iterable[tuple[str, str | None]],
    entries: Mapping[str, Any],
    heard: Heard | None,
) -> Iterator[tuple[str, str | None]]:
    sizes = {n: DType.of(e["dtype"]).itemsize * math.prod(e["shape"]) for n, e in entries.items()}
    done, total = 0, sum(sizes.values())
    for name, digest in digests:
        done += sizes[name]
        if heard is not None:
            heard(name, done, total)
        yield name, digest


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a published output. Raises WeightsError if it is absent or damaged."""
    path = out / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        intact = manifest["checksum"] == manifest_checksum(manifest)
        output = manifest["output"]
        names = [*output["files"], *(tensor["file"] for tensor in output["tensors"].values())]
        for entry in output["files"].values():
            entry["header" if "header" in entry else "sha256"], entry["size"]
        for tensor in output["tensors"].values():
            tensor["digest"]
        output["content_digest"]
    except FileNotFoundError as error:
        raise WeightsError(
            "This folder was not published by fusewright.", where=out, expected=MANIFEST
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not intact:
        raise _damaged(path, "contents that do not match its checksum")
    if unsafe := [name for name in names if not is_safe_name(name)]:
        raise _damaged(path, f"a file name that leaves the folder: {unsafe[0]!r}")
    return manifest


def _damaged(path: Path, found: str) -> WeightsError:
    return WeightsError(
        "The manifest is damaged.",
        where=path,
        expected="JSON as it was published",
        found=found,
        fix="merge again, with --overwrite",
    )


def _files_in(out: Path) -> set[str]:
    return {
        (Path(folder) / name).relative_to(out).as_posix()
        for folder, _, names in os.walk(out)
        for name in names
        if not (Path(folder) / name).is_symlink()
    }


def _size(out: Path, name: str) -> int:
    return (out / name).stat().st_size


def _file_digest(path: Path) -> str:
    hasher = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _header(path: Path) -> bytes:
    """A safetensors file's length and header, or as much as is there."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        return prefix + file.read(min(int.from_bytes(prefix, "little"), 100_000_000))


def _tensor(out: Path, name: str, file: str, shards: Mapping[str, bytes]) -> str | None:
    """A tensor's digest as its file is now; None where the file does not tell."""
    header = shards.get(file)
    if header is None:
        return None
    try:
        place = json.loads(header[8:])[name]
        info = TensorInfo(name, DType.of(place["dtype"]), tuple(place["shape"]))
        begin, end = place["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    if begin < 0 or end - begin != info.nbytes:
        return None
    fd = os.open(out / file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        leaves = hash_range(fd, len(header) + begin, info.nbytes, info.dtype.itemsize)
    finally:
        os.close(fd)
    return tensor_digest(leaves, info)

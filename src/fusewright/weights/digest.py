"""Content digests: trees over canonical blocks, the same for every sharding and chunk size.

A tensor's leaves are the XXH3-128 hashes of its canonical blocks (65,536 elements, counted from
its start); its digest is SHA-256 over its leaves, dtype and shape; a model's is SHA-256 over its
tensors' by name. Such digests tell models apart and find damage. They are no proof against
somebody who wants two models to look the same: a hash that is would cost more than the merge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256

from xxhash import xxh3_128_digest

from .spec import TensorInfo

BLOCK = 65536
LEAF = 16
READ = 64  # blocks read at once when a file is hashed

_TENSOR = b"fusewright 2 tensor\0"
_CONTENT = b"fusewright 2 content\0"


def block_digests(data: memoryview, itemsize: int) -> bytes:
    """16 bytes for each canonical block of ``data``, which starts on a block's boundary."""
    data, step = data.cast("B"), BLOCK * itemsize
    return b"".join(xxh3_128_digest(data[at : at + step]) for at in range(0, len(data), step))


def tensor_digest(leaves: bytes, info: TensorInfo) -> str:
    """The root over a whole tensor's leaves, with its dtype and shape; 64 hex digits."""
    kind = json.dumps([info.dtype.code, list(info.shape)]).encode()
    return sha256(_TENSOR + kind + b"\0" + leaves).hexdigest()


def content_digest(tensors: Mapping[str, str]) -> str:
    """The digest of a model from its tensors' digests: the same for every sharding and order."""
    pairs = json.dumps(sorted(tensors.items()), ensure_ascii=True).encode()
    return sha256(_CONTENT + pairs).hexdigest()


def hash_range(fd: int, offset: int, nbytes: int, itemsize: int) -> bytes:
    """The leaves of ``nbytes`` of an open file, from a block's boundary on. What is not there
    (a file too short) is left out of the hash, so that the leaves do not match."""
    leaves, step = [], READ * BLOCK * itemsize
    buffer = memoryview(bytearray(min(step, nbytes)))
    for at in range(0, nbytes, step):
        want = buffer[: min(step, nbytes - at)]
        got = read_into(fd, offset + at, want)
        leaves.append(block_digests(want[:got], itemsize))
        if got < len(want):
            break
    return b"".join(leaves)


def read_into(fd: int, offset: int, out: memoryview) -> int:
    """Fill ``out`` from ``offset`` on; fewer bytes only where the file ends."""
    done = 0
    while done < len(out):
        got = os.preadv(fd, [out[done:]], offset + done)
        if not got:
            break
        done += got
    return done


def count_blocks(nbytes: int, itemsize: int) -> int:
    """How many canonical blocks so many bytes are."""
    return -(-nbytes // (BLOCK * itemsize))


class Leaves:
    """The leaves of a model's tensors, gathered in any order; knows which are still missing."""

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        self.infos = {info.name: info for info in tensors}
        self._leaves: dict[str, bytearray] = {}
        self._known: dict[str, bytearray] = {}
        for name, info in self.infos.items():
            blocks = count_blocks(info.nbytes, info.dtype.itemsize)
            self._leaves[name], self._known[name] = bytearray(LEAF * blocks), bytearray(blocks)

    def check(self, name: str, start: int, stop: int, leaves: bytes) -> int:
        """The first block of the byte range [start, stop) of a tensor, whose leaves these are.
        Raises ValueError for a range that is not of whole canonical blocks."""
        info = self.infos[name]
        step = BLOCK * info.dtype.itemsize
        whole = start % step == 0 and (stop % step == 0 or stop == info.nbytes)
        if not (whole and 0 <= start <= stop <= info.nbytes):
            raise ValueError(f"{name}: bytes {start}:{stop} are not whole canonical blocks")
        if len(leaves) != LEAF * count_blocks(stop - start, info.dtype.itemsize):
            raise ValueError(f"{name}: {len(leaves)} bytes of digests for bytes {start}:{stop}")
        return start // step

    def put(self, name: str, start: int, stop: int, leaves: bytes) -> None:
        """Take the leaves of the byte range [start, stop) of a tensor. Raises as :meth:`check`."""
        first, count = self.check(name, start, stop, leaves), len(leaves) // LEAF
        self._leaves[name][LEAF * first : LEAF * (first + count)] = leaves
        self._known[name][first : first + count] = b"\1" * count

    def missing(self) -> list[str]:
        """The tensors of which not every block has been put."""
        return [name for name, known in self._known.items() if not all(known)]

    def digests(self) -> dict[str, str]:
        return {
            name: tensor_digest(bytes(self._leaves[name]), info)
            for name, info in self.infos.items()
        }

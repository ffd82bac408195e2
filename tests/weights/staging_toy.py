"""A small, deterministic run that uses Staging as an engine would; also a script, to be killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusewright.weights.digest import BLOCK, block_digests
from fusewright.weights.shards import Shard, plan_shards
from fusewright.weights.sink import Sink
from fusewright.weights.spec import DType, TensorInfo
from fusewright.weights.staging import Staging

TENSORS = (
    TensorInfo("flag", DType.BOOL, ()),
    TensorInfo("a.weight", DType.BF16, (3, 50_000)),
    TensorInfo("nothing", DType.F16, (0, 4)),
    TensorInfo("b", DType.F32, (70_000,)),
    TensorInfo("count", DType.I64, ()),
)
FILES = {"config.json": b'{"toy": true}', "extra/notes.txt": b"hello"}
MANIFEST = {"schema": 1, "recipe": "toy"}


def shards(shard_size: int = 400_000) -> tuple[Shard, ...]:
    return plan_shards(TENSORS, shard_size, {"format": "pt"})


def tasks() -> Iterator[tuple[str, TensorInfo, int, int]]:
    """(task, tensor, start byte, stop byte), one canonical block each."""
    for info in TENSORS:
        step = BLOCK * info.dtype.itemsize
        for at in range(0, info.nbytes, step):
            yield f"{info.name}@{at}", info, at, min(at + step, info.nbytes)


TASKS = tuple(tasks())
DATA_BYTES = sum(stop - start for _, _, start, stop in TASKS)


def compute(info: TensorInfo, start: int, stop: int, scale: float) -> memoryview:
    """Bytes that depend on the tensor, the place and a solved statistic."""
    index = np.arange(start, stop, dtype=np.uint64)
    mixed = (index * np.uint64(2_654_435_761) >> np.uint64(9)) + np.uint64(len(info.name))
    if info.dtype is DType.BOOL:
        mixed &= np.uint64(1)
    return memoryview((mixed + np.uint64(int(scale * 10))).astype(np.uint8)[: stop - start])


def work(sink: Sink, threads: int = 1) -> list[str]:
    """Do what is not finished; the tasks that were done, in order."""
    finished = sink.finished(threads)
    if "scale" not in sink.noted():
        sink.note("scale", 0.2)
    scale, done = sink.noted()["scale"], []
    for task, info, start, stop in TASKS:
        if task not in finished:
            data = compute(info, start, stop, scale)
            half = len(data) // 2
            sink.write(info.name, start, data[:half])
            sink.write(info.name, start + half, data[half:])
            leaves = block_digests(data, info.dtype.itemsize)
            sink.commit(task, [(info.name, start, stop, leaves)], {"count": stop - start})
            done.append(task)
    return done


def run(
    out: Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    durable: bool = True,
    plan: str = "plan-1",
    shard_size: int = 400_000,
) -> list[str]:
    """The whole run; which tasks it did (the others were found finished)."""
    with Staging.open(
        out, plan, shards(shard_size), overwrite=overwrite, inputs=inputs, durable=durable
    ) as staging:
        done = work(staging)
        for name, data in FILES.items():
            staging.add_file(name, data)
        staging.publish(MANIFEST)
    return done


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    import os
    import signal

    from staging_disk import FaultyDisk

    from fusewright.weights import _fs

    out, mode, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if mode == "kill":
        disk = FaultyDisk(at=at, die=lambda: os.kill(os.getpid(), signal.SIGKILL))
        _fs.fs = disk
        run(out)
    elif mode == "hold":
        with Staging.open(out, "plan-1", shards(), overwrite=False, inputs=[]):
            print("ready", flush=True)
            sys.stdin.read()

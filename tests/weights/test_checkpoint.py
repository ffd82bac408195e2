"""What a killed run goes on from: whole or not there, and a refusal where a disk fails."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from staging_disk import FaultyDisk, Killed

from fusewright.errors import OutputError
from fusewright.weights import _fs
from fusewright.weights.checkpoint import read_checkpoint, write_checkpoint

OLD = {"at": torch.arange(3000.0), "done": 1, "best": None, "losses": [0.5]}
NEW = {"at": torch.arange(9000.0), "done": 2, "best": {"a": torch.ones(2)}, "losses": [0.5, 0.25]}


def same(found: object, held: object) -> bool:
    return repr(found) == repr(held) and found["at"].equal(held["at"])  # type: ignore[index]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "one.pt"
    for held in (OLD, NEW):
        write_checkpoint(path, held)
        assert same(read_checkpoint(path), held)
    assert os.listdir(path.parent) == ["one.pt"]


def _steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write_checkpoint(path, OLD)
    disk = FaultyDisk()
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "fs", disk)
        write_checkpoint(path, NEW)
    return disk.steps


@pytest.mark.parametrize("how", ["before", "half"])
def test_killed_at_any_step_the_earlier_one_or_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "one.pt"
    steps = _steps(path, monkeypatch)
    assert steps[-2:] == ["fsync", "rename"] and "append" in steps
    for at in range(len(steps)):
        write_checkpoint(path, OLD)
        dying = FaultyDisk(at, how)
        with monkeypatch.context() as patch:
            patch.setattr(_fs, "fs", dying)
            with pytest.raises((Killed, RuntimeError)):  # torch makes the latter of the former
                write_checkpoint(path, NEW)
        dying.bury()
        assert same(read_checkpoint(path), OLD)
    write_checkpoint(path, NEW)  # over what the last one left half written
    assert same(read_checkpoint(path), NEW)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("op", ["open", "append", "fsync", "rename"])
@pytest.mark.parametrize("late", [0, 3])
def test_a_disk_that_fails_is_a_refusal_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, code: int, late: int
) -> None:
    path = tmp_path / "one.pt"
    write_checkpoint(path, OLD)
    first = late if op == "append" else 0
    failing = FaultyDisk(refuse=lambda o, count: code if o == op and count >= first else 0)
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "fs", failing)
        with pytest.raises(OutputError, match="Writing the checkpoint failed") as refusal:
            write_checkpoint(path, NEW)
    assert ("the disk is full" in str(refusal.value)) == (code == errno.ENOSPC)
    assert refusal.value.found == errno.errorcode[code] and refusal.value.where == path
    assert os.listdir(tmp_path) == ["one.pt"] and same(read_checkpoint(path), OLD)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "fs", FaultyDisk(most=1000))
    write_checkpoint(tmp_path / "one.pt", NEW)
    assert same(read_checkpoint(tmp_path / "one.pt"), NEW)


def test_a_file_larger_than_the_system_allows_is_a_refusal(tmp_path: Path) -> None:
    run = (
        "import sys, torch; from pathlib import Path\n"
        "from fusewright.weights.checkpoint import write_checkpoint\n"
        "write_checkpoint(Path(sys.argv[1]), {'at': torch.zeros(9000)})"
    )
    found = subprocess.run(
        [sys.executable, "-c", run, tmp_path / "one.pt"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)), check=False,
    )  # fmt: skip
    assert "OutputError: Writing the checkpoint failed: File too large" in found.stderr
    assert not os.listdir(tmp_path)


def test_a_place_that_can_be_no_folder_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "one.pt", tmp_path / "file" / "deep" / "one.pt"):
        with pytest.raises(OutputError, match="Writing the checkpoint failed"):
            write_checkpoint(path, OLD)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("spoil", [
    lambda data: b"", lambda data: b"hello", lambda data: data[:10], lambda data: data[:-1],
    lambda data: data[: len(data) // 2], lambda data: data[1:],
    lambda data: data[:6000] + bytes([data[6000] ^ 1]) + data[6001:],
])  # fmt: skip
def test_one_that_is_not_whole_is_named_with_what_to_remove(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "one.pt"
    write_checkpoint(path, OLD)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OutputError, match="is damaged") as refusal:
        read_checkpoint(path)
    assert refusal.value.where == path and f"rm '{path}'" in (refusal.value.fix or "")


def test_a_file_of_something_else_is_not_executed(tmp_path: Path) -> None:
    torch.save({"at": os.system}, tmp_path / "one.pt")
    with pytest.raises(OutputError, match="no checkpoint of fusewright"):
        read_checkpoint(tmp_path / "one.pt")


def test_one_that_cannot_be_opened_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "one.pt").mkdir()
    with pytest.raises(OutputError, match="Reading the checkpoint failed"):
        read_checkpoint(tmp_path / "one.pt")

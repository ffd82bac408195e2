"""Killed, cut off from power, out of space: the output is whole or absent, and work is kept."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import staging_toy as toy
from staging_disk import FaultyDisk, Killed, RebuiltDisk, RecordingDisk

from fusewright.errors import OutputError
from fusewright.weights import _fs
from fusewright.weights.digest import BLOCK
from fusewright.weights.journal import read_journal
from fusewright.weights.lock import FolderLock
from fusewright.weights.publish import recover
from fusewright.weights.shards import plan_shards
from fusewright.weights.staging import Staging
from fusewright.weights.target import staging_folder
from fusewright.weights.verify import verify

OLD = {"config.json": b"the old one", "model.safetensors": b"old weights"}
HERE = Path(__file__).parent


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Set ``_fs.fs`` through this; it is put back afterwards."""
    monkeypatch.setattr(_fs, "fs", FaultyDisk())
    yield monkeypatch


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    toy.run(out)
    return toy.snapshot(out)


def _old_output(out: Path) -> None:
    out.mkdir(parents=True)
    for name, data in OLD.items():
        (out / name).write_bytes(data)


def _steps(
    monkeypatch: pytest.MonkeyPatch, root: Path, overwrite: bool, exchanges: bool
) -> list[str]:
    root.mkdir()
    if overwrite:
        _old_output(root / "out")
    disk = FaultyDisk(exchanges=exchanges)
    monkeypatch.setattr(_fs, "fs", disk)
    toy.run(root / "out", overwrite=overwrite)
    return disk.steps


@pytest.mark.parametrize("how", ["before", "half"])
@pytest.mark.parametrize(("overwrite", "exchanges"), [(False, True), (True, True), (True, False)])
def test_killed_at_any_step_the_output_is_whole_and_the_run_resumes(
    disk: pytest.MonkeyPatch,
    tmp_path: Path,
    expected: dict[str, bytes],
    how: str,
    overwrite: bool,
    exchanges: bool,
) -> None:
    steps = _steps(disk, tmp_path / "count", overwrite, exchanges)
    assert len(steps) > 50
    for at, op in enumerate(steps):
        if how == "half" and op not in ("pwrite", "append"):
            continue
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        if overwrite:
            _old_output(out)
        dying = FaultyDisk(at, how, exchanges=exchanges)
        disk.setattr(_fs, "fs", dying)
        with pytest.raises(Killed):
            toy.run(out, overwrite=overwrite)
        dying.bury()
        _check_and_rerun(disk, out, expected, overwrite, exchanges, f"{how} {at}")


def _check_and_rerun(
    disk: pytest.MonkeyPatch,
    out: Path,
    expected: dict[str, bytes],
    overwrite: bool,
    exchanges: bool,
    where: str,
) -> None:
    """What the dead run left, then the run that follows it."""
    if overwrite and not exchanges:
        disk.setattr(_fs, "fs", FaultyDisk(exchanges=False))
        recover(out)  # between two renames the output has neither name
    found = toy.snapshot(out) if out.exists() else None
    assert found in ((OLD, expected) if overwrite else (None, expected)), where
    journal = read_journal(staging_folder(out) / "journal")
    kept = set(journal.tasks) if journal and found != expected else set()
    again = FaultyDisk(exchanges=exchanges)
    disk.setattr(_fs, "fs", again)
    if found == expected and not overwrite:
        recover(out)
    else:
        done = toy.run(out, overwrite=overwrite)
        assert set(done) == {task for task, *_ in toy.TASKS} - kept, where
        redone = sum(stop - start for task, _, start, stop in toy.TASKS if task in done)
        headers = sum(len(shard.header) for shard in toy.shards())
        small = sum(len(data) for name, data in expected.items() if "json" in name or "txt" in name)
        assert again.written == redone + headers + small, where
    assert toy.snapshot(out) == expected, where
    assert os.listdir(out.parent) == ["out"], where


def test_a_task_committed_before_the_kill_is_never_done_again(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    appends = 0
    for at in range(200):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        dying = FaultyDisk(at)
        disk.setattr(_fs, "fs", dying)
        try:
            toy.run(out)
            break
        except Killed:
            dying.bury()
        if "rename" in dying.steps[:at]:
            continue
        # header and note come first; the last append is the one that was cut short, if it was
        appends = max(0, dying.steps[:at].count("append") - 2)
        disk.setattr(_fs, "fs", FaultyDisk())
        if dying.steps[-1] == "append" or "fsync" not in dying.steps:
            assert len(toy.run(out)) == len(toy.TASKS) - appends, at
    assert appends >= len(toy.TASKS)


@pytest.mark.parametrize("at", [3, 14, 25, 31, 44, 60])
def test_a_process_killed_by_a_signal_leaves_what_the_next_resumes(
    tmp_path: Path, expected: dict[str, bytes], at: int
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, HERE / "staging_toy.py", out, "kill", str(at)])
    assert killed.returncode == -9
    assert not out.exists() or toy.snapshot(out) == expected
    if out.exists():
        recover(out)
    else:
        toy.run(out)
    assert toy.snapshot(out) == expected
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("overwrite", "exchanges"), [(False, True), (True, True), (True, False)])
def test_after_a_power_cut_unsynced_writes_may_be_lost_or_torn(
    disk: pytest.MonkeyPatch,
    tmp_path: Path,
    expected: dict[str, bytes],
    overwrite: bool,
    exchanges: bool,
) -> None:
    recording = _record(disk, tmp_path, overwrite=overwrite, exchanges=exchanges)
    outcomes = set()
    for cut in range(len(recording.log) + 1):
        for seed in range(3):
            root = tmp_path / f"{cut}-{seed}"
            root.mkdir()
            alias = recording.after_power_cut(cut, 1000 * seed + cut).make(root)
            disk.setattr(_fs, "fs", RebuiltDisk(alias, exchanges=exchanges))
            out = root / "out"
            recover(out)
            found = toy.snapshot(out) if out.exists() else None
            assert found in ((OLD, expected) if overwrite else (None, expected)), (cut, seed)
            if found == expected:
                outcomes.add("published")
                assert verify(out).ok
            if overwrite or found is None:
                done = toy.run(out, overwrite=overwrite)
                outcomes.add("resumed" if len(done) < len(toy.TASKS) else "begun again")
            assert toy.snapshot(out) == expected, (cut, seed)
            assert os.listdir(root) == ["out"]
    assert outcomes == {"published", "resumed", "begun again"}


def _record(
    disk: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    overwrite: bool,
    exchanges: bool,
    durable: bool = True,
) -> RecordingDisk:
    root = tmp_path / "recorded"
    root.mkdir()
    if overwrite:
        _old_output(root / "out")
    recording = RecordingDisk(root, exchanges=exchanges)
    disk.setattr(_fs, "fs", recording)
    toy.run(root / "out", overwrite=overwrite, durable=durable)
    return recording


def test_the_replay_finds_a_run_that_does_not_sync(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    recording = _record(disk, tmp_path, overwrite=False, exchanges=True, durable=False)
    broken = 0
    for seed in range(10):
        root = tmp_path / str(seed)
        root.mkdir()
        recording.after_power_cut(len(recording.log), seed).make(root)
        broken += (root / "out").exists() and toy.snapshot(root / "out") != expected
    assert broken


@pytest.mark.parametrize("exchanges", [True, False])
def test_everything_published_was_synced_before_the_rename(
    disk: pytest.MonkeyPatch, tmp_path: Path, exchanges: bool
) -> None:
    log = _record(disk, tmp_path, overwrite=True, exchanges=exchanges).log
    step = next(at for at, op in enumerate(log) if op[0] in ("rename", "exchange"))
    for at, op in enumerate(log[:step]):
        if op[0] == "write":
            assert ("fsync", op[1]) in log[at:step]
        if op[0] in ("create", "mkdir") and "/new" in op[1]:
            assert ("fsync_folder", str(Path(op[1]).parent)) in log[at:step]
    assert ("fsync_folder", ".") in log[step:]
    manifest = next(op[2] for op in log if op[0] == "create" and op[1].endswith("fusewright.json"))
    data = [at for at, op in enumerate(log) if op[0] == "write" and len(op[3]) > BLOCK]
    begun = next(at for at, op in enumerate(log) if op[0] == "write" and op[1] == manifest)
    for at in data:
        assert ("fsync", log[at][1]) in log[at:begun]


def test_a_full_disk_is_refused_before_anything_is_written(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = FaultyDisk()
    full.free = lambda path: 1000  # type: ignore[method-assign]
    disk.setattr(_fs, "fs", full)
    needed = int(sum(shard.size for shard in toy.shards()) * 1.01) + 1
    with pytest.raises(OutputError, match=f"{needed - 1000:,} bytes are missing"):
        toy.run(tmp_path / "deep" / "out")
    assert not os.listdir(tmp_path) and not full.steps


def test_a_resume_needs_only_the_space_that_is_not_yet_taken(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    dying = FaultyDisk(40)
    disk.setattr(_fs, "fs", dying)
    with pytest.raises(Killed):
        toy.run(out)
    dying.bury()
    taken = sum(path.stat().st_blocks * 512 for path in (staging_folder(out) / "new").iterdir())
    needed = int(sum(shard.size for shard in toy.shards()) * 1.01) + 1
    tight = FaultyDisk()
    tight.free = lambda path: needed - taken  # type: ignore[method-assign]
    disk.setattr(_fs, "fs", tight)
    toy.run(out)
    assert toy.snapshot(out) == expected


def test_a_disk_that_cannot_reserve_the_output_is_left_as_it_was(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse = FaultyDisk(refuse=lambda op, count: errno.ENOSPC if op == "reserve" else 0)
    disk.setattr(_fs, "fs", refuse)
    with pytest.raises(OutputError, match="the disk is full"):
        toy.run(tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_nothing_is_said_to_be_kept_where_nothing_was_finished(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse = FaultyDisk(refuse=lambda op, count: errno.EFBIG if op == "reserve" else 0)
    disk.setattr(_fs, "fs", refuse)
    with pytest.raises(OutputError) as refusal:
        toy.run(tmp_path / "out")
    assert refusal.value.fix == "run the same command again"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("op", ["pwrite", "append", "fsync", "fsync_folder", "rename", "open"])
def test_a_disk_that_fails_midway_says_how_to_resume(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes], op: str, code: int
) -> None:
    out, first = tmp_path / "out", {"pwrite": 8, "append": 5, "open": 4}.get(op, 0)
    failing = FaultyDisk(refuse=lambda o, count: code if o == op and count >= first else 0)
    disk.setattr(_fs, "fs", failing)
    with pytest.raises(OutputError) as refusal:
        toy.run(out)
    assert "run the same command again" in (refusal.value.fix or "")
    assert refusal.value.found == errno.errorcode[code]
    assert not out.exists()
    failing.bury()
    disk.setattr(_fs, "fs", FaultyDisk())
    toy.run(out)
    assert toy.snapshot(out) == expected


def test_after_a_failed_fsync_nothing_read_back_is_trusted(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    disk.setattr(_fs, "fs", FaultyDisk(refuse=lambda op, _: errno.EIO if op == "fsync" else 0))
    with pytest.raises(OutputError):
        toy.run(out)
    disk.setattr(_fs, "fs", FaultyDisk())
    assert len(toy.run(out)) == len(toy.TASKS)


def test_a_second_rename_that_fails_puts_the_old_output_back(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _old_output(out)
    failing = FaultyDisk(
        exchanges=False,
        refuse=lambda op, count: errno.EIO if (op, count) == ("rename", 1) else 0,
    )
    disk.setattr(_fs, "fs", failing)
    with pytest.raises(OutputError):
        toy.run(out, overwrite=True)
    assert toy.snapshot(out) == OLD


def test_what_was_replaced_is_never_written_into(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Killed after the exchange, the old files lie where staged ones did, perhaps linked from
    elsewhere; then the new output is taken away, and the run is repeated."""
    out, kept = tmp_path / "out", tmp_path / "kept.safetensors"
    _old_output(out)
    (out / toy.shards()[0].file).write_bytes(b"of another model")
    os.link(out / toy.shards()[0].file, kept)
    recording = FaultyDisk()
    disk.setattr(_fs, "fs", recording)
    _old_output(tmp_path / "count")
    toy.run(tmp_path / "count", overwrite=True)
    dying = FaultyDisk(recording.steps.index("exchange") + 1)
    disk.setattr(_fs, "fs", dying)
    with pytest.raises(Killed):
        toy.run(out, overwrite=True)
    dying.bury()
    out.rename(tmp_path / "taken")
    disk.setattr(_fs, "fs", FaultyDisk())
    toy.run(out)
    assert kept.read_bytes() == b"of another model"
    assert toy.snapshot(out) == expected == toy.snapshot(tmp_path / "taken")


@pytest.mark.parametrize("journal_intact", [True, False])
def test_between_two_renames_recovery_finishes_or_else_undoes(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes], journal_intact: bool
) -> None:
    out = tmp_path / "out"
    _old_output(out)
    dying = FaultyDisk(exchanges=False)
    refuse = iter([lambda: None, dying.kill])
    disk.setattr(dying, "rename", lambda a, b: (next(refuse)(), FaultyDisk.rename(dying, a, b)))
    disk.setattr(_fs, "fs", dying)
    with pytest.raises(Killed):
        toy.run(out, overwrite=True)
    dying.bury()
    assert not out.exists()
    if not journal_intact:
        (staging_folder(out) / "journal").write_bytes(b"nonsense")
    disk.setattr(_fs, "fs", FaultyDisk())
    recover(out)
    assert toy.snapshot(out) == (expected if journal_intact else OLD)
    assert staging_folder(out).exists() != journal_intact


def test_an_old_output_that_could_not_be_put_back_is_not_cleared_away(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _old_output(out)
    refuse = FaultyDisk(
        exchanges=False,
        refuse=lambda op, count: errno.EIO if op == "rename" and count >= 1 else 0,
    )
    disk.setattr(_fs, "fs", refuse)
    empty = plan_shards([], 100, {})
    with (
        pytest.raises(OutputError),
        Staging.open(out, "plan-1", empty, overwrite=True, inputs=[]) as staging,
    ):
        staging.publish({})
    assert toy.snapshot(staging_folder(out) / "old") == OLD


def test_short_writes_are_continued(
    disk: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    disk.setattr(_fs, "fs", FaultyDisk(most=777))
    toy.run(tmp_path / "out")
    assert toy.snapshot(tmp_path / "out") == expected


def test_a_disk_that_writes_nothing_is_an_error_not_a_loop(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk.setattr(_fs, "fs", FaultyDisk(most=0))
    with pytest.raises(OutputError, match="EIO"):
        toy.run(tmp_path / "out")


def test_a_second_run_on_one_output_is_refused_and_named(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, HERE / "staging_toy.py", out, "hold", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match=f"process {other.pid}\n"):
            toy.run(out)
        with pytest.raises(OutputError, match="Another run"):
            recover(out)
        other.kill()
    toy.run(out)
    assert toy.snapshot(out) == expected


def test_a_lock_file_that_its_holder_has_just_removed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, real = FolderLock.acquire(tmp_path / "staging"), fcntl.flock
    passed = iter([first.release])

    def flock(fd: int, how: int) -> None:
        next(passed, lambda: None)()  # the first leaves between our open and our flock
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = FolderLock.acquire(tmp_path / "staging")
    with pytest.raises(OutputError, match="Another run"):
        FolderLock.acquire(tmp_path / "staging")
    second.release()
    assert not os.listdir(tmp_path)


def test_a_folder_that_can_never_be_made_is_refused_and_not_tried_for_ever(
    disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tries = iter(range(3))

    def refuse(op: str, count: int) -> int:
        if op == "mkdir":  # as /proc answers, and some file systems over a network
            next(tries)
            return errno.ENOENT
        return 0

    disk.setattr(_fs, "fs", FaultyDisk(refuse=refuse))
    with pytest.raises(OutputError, match="Preparing the output failed"):
        FolderLock.acquire(tmp_path / "staging")


# -- the journal -----------------------------------------------------------------------------


def _stopped(out: Path) -> Path:
    """A run that finished its tasks and was not published; its journal."""
    with Staging.open(out, "plan-1", toy.shards(), overwrite=False, inputs=[]) as staging:
        toy.work(staging)
    return staging_folder(out) / "journal"


@pytest.mark.parametrize("line", range(2 + len(toy.TASKS)))
def test_a_damaged_line_costs_that_line_only(
    tmp_path: Path, expected: dict[str, bytes], line: int
) -> None:
    journal = _stopped(tmp_path / "out")
    lines = journal.read_bytes().split(b"\n")
    middle = len(lines[line]) // 2
    lines[line] = lines[line][:middle] + b"\0" + lines[line][middle + 1 :]
    journal.write_bytes(b"\n".join(lines))
    done = toy.run(tmp_path / "out")
    # without its first line nothing can be believed; the second is the note
    assert len(done) == (len(toy.TASKS) if line == 0 else 0 if line == 1 else 1)
    assert toy.snapshot(tmp_path / "out") == expected


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_done_again(
    tmp_path: Path, expected: dict[str, bytes], cut: int
) -> None:
    journal = _stopped(tmp_path / "out")
    journal.write_bytes(journal.read_bytes()[:-cut])
    torn = _stopped(tmp_path / "out")  # what is appended after it is found again
    assert len(read_journal(torn).tasks) == len(toy.TASKS)  # type: ignore[union-attr]
    assert toy.run(tmp_path / "out") == []
    assert toy.snapshot(tmp_path / "out") == expected


def test_a_line_of_another_plan_never_counts(tmp_path: Path) -> None:
    journal = _stopped(tmp_path / "out")
    other = tmp_path / "other"
    with Staging.open(other, "plan-2", toy.shards(), overwrite=False, inputs=[]) as staging:
        toy.work(staging)
    mixed = journal.read_bytes().split(b"\n")[:2]
    mixed += (staging_folder(other) / "journal").read_bytes().split(b"\n")[2:]
    journal.write_bytes(b"\n".join(mixed))
    assert len(toy.run(tmp_path / "out")) == len(toy.TASKS)


@pytest.mark.parametrize(("plan", "shard_size"), [("plan-2", 400_000), ("plan-1", 100_000)])
def test_staged_work_of_another_plan_is_refused_or_discarded(
    tmp_path: Path, plan: str, shard_size: int
) -> None:
    out = tmp_path / "out"
    before = _stopped(out).read_bytes()
    with pytest.raises(OutputError, match="--overwrite") as refusal:
        toy.run(out, plan=plan, shard_size=shard_size)
    assert "plan-1" in str(refusal.value)
    assert (staging_folder(out) / "journal").read_bytes() == before
    done = toy.run(out, plan=plan, shard_size=shard_size, overwrite=True)
    assert len(done) == len(toy.TASKS) and verify(out).ok


def test_a_block_that_changed_on_disk_is_done_again(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    _stopped(tmp_path / "out")
    shard = next(shard for shard in toy.shards() if "b" in shard.tensors)
    path = staging_folder(tmp_path / "out") / "new" / shard.file
    data = bytearray(path.read_bytes())
    data[shard.tensors["b"][1] + 5] ^= 1
    path.write_bytes(data)
    assert toy.run(tmp_path / "out") == ["b@0"]
    assert toy.snapshot(tmp_path / "out") == expected


@pytest.mark.parametrize("size", [0, 1000, 10_000_000])
def test_a_shard_of_the_wrong_size_is_mended(
    tmp_path: Path, expected: dict[str, bytes], size: int
) -> None:
    _stopped(tmp_path / "out")
    os.truncate(staging_folder(tmp_path / "out") / "new" / toy.shards()[0].file, size)
    toy.run(tmp_path / "out")
    assert toy.snapshot(tmp_path / "out") == expected


def test_files_of_an_earlier_attempt_are_not_published(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with Staging.open(out, "plan-1", toy.shards(), overwrite=False, inputs=[]) as staging:
        toy.work(staging)
        staging.add_file("stray.json", b"{}")
    toy.run(out)
    assert toy.snapshot(out) == expected

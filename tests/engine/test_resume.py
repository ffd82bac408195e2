"""A run that was killed goes on where it stopped, and the result is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, SHAPES, expert, models, on_disk, read, same, saved

import fusewright as fw
from fusewright.engine import verify
from fusewright.errors import FusewrightError, NumericError, OutputError
from fusewright.weights.staging import Staging


class Killed(BaseException):
    """Stands for a process that ends: nothing may handle it."""


def killed(calls: int, method: str, given: Any, out: Path, what: str = "commit") -> None:
    """A merge that ends at the call ``calls + 1`` of a method of Staging."""
    with pytest.MonkeyPatch.context() as patch:
        real, seen = getattr(Staging, what), []

        def counted(self: Staging, *args: Any, **named: Any) -> Any:
            seen.append(what)
            if len(seen) > calls:
                raise Killed
            return real(self, *args, **named)

        patch.setattr(Staging, what, counted)
        with pytest.raises(Killed):
            fw.merge(METHODS[method], **given, out=out, threads=1)
    assert not out.exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", [0, 2, 5])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, method: str, calls: int
) -> None:
    given = on_disk(tmp_path)
    whole = fw.merge(METHODS[method], **given, out=tmp_path / "whole", durable=False)
    killed(calls, method, given, tmp_path / "out")
    resumed = fw.merge(METHODS[method], **given, out=tmp_path / "out", threads=2)
    assert resumed.report["resumed_tasks"] == calls
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))
    assert resumed.report["inputs"] == whole.report["inputs"]
    assert resumed.report["solved"] == whole.report["solved"]
    verify(tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "slerp", "lines"])
@pytest.mark.parametrize(
    ("what", "calls"), [("note", 0), ("note", 1), ("add_file", 0), ("add_file", 1), ("publish", 0)]
)
def test_so_does_one_killed_between_its_other_steps(
    tmp_path: Path, method: str, what: str, calls: int
) -> None:
    given = on_disk(tmp_path)
    fw.merge(METHODS[method], **given, out=tmp_path / "whole", durable=False)
    killed(calls, method, given, tmp_path / "out", what)
    fw.merge(METHODS[method], **given, out=tmp_path / "out")
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))


def test_a_resume_reads_only_what_was_not_finished(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.mlp.weight": (100, 100) for i in range(4)}
    given = on_disk(tmp_path, shapes=shapes)
    killed(3, "task_arithmetic", given, tmp_path / "out")
    report = fw.merge(METHODS["task_arithmetic"], **given, out=tmp_path / "out").report
    assert report["resumed_tasks"] == 3 and report["tasks"] == 4
    assert report["bytes_read"] == 3 * 100 * 100 * 2
    assert report["bytes_written"] == 100 * 100 * 2


def test_statistics_over_the_model_are_not_found_again(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.mlp.weight": (100, 100) for i in range(4)}
    given = on_disk(tmp_path, shapes=shapes)
    killed(3, "ties", given, tmp_path / "out")
    report = fw.merge(METHODS["ties"], **given, out=tmp_path / "out").report
    assert report["bytes_read"] == 3 * 100 * 100 * 2


def test_statistics_of_a_tensor_are_not_found_again(tmp_path: Path) -> None:
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": SHAPES["layers.0.mlp.weight"]})
    killed(1, "ties per tensor", given, tmp_path / "out")
    report = fw.merge(METHODS["ties per tensor"], **given, out=tmp_path / "out").report
    assert report["resumed_tasks"] == 1
    assert report["bytes_read"] == 3 * 2 * (300_000 - 4 * 65_536)


def test_a_tensor_whose_statistic_was_lost_is_measured_whole(
    tmp_path: Path
) -> None:
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": SHAPES["layers.0.mlp.weight"]})
    fw.merge(METHODS["slerp"], **given, out=tmp_path / "whole")
    killed(1, "slerp", given, tmp_path / "out")
    journal = next(tmp_path.rglob("journal*"))
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(line for line in lines if b'"kind":"note"' not in line))
    fw.merge(METHODS["slerp"], **given, out=tmp_path / "out")
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))


def test_damaged_staged_blocks_are_made_again(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    fw.merge(METHODS["linear"], **given, out=tmp_path / "whole")
    killed(5, "linear", given, tmp_path / "out")
    staged = next((tmp_path / ".out.fusewright").rglob("*.safetensors"))
    with staged.open("r+b") as file:
        file.seek(staged.stat().st_size - 300_000)
        file.write(b"\x55" * 64)
    report = fw.merge(METHODS["linear"], **given, out=tmp_path / "out").report
    assert report["resumed_tasks"] < 5
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))


def test_an_input_that_changed_since_is_another_plan(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    killed(2, "linear", given, tmp_path / "out")
    saved(expert(read(given["base"]), 7), given["experts"]["a"])
    os.utime(given["experts"]["a"] / "model.safetensors", (1, 1))
    with pytest.raises(OutputError):
        fw.merge(METHODS["linear"], **given, out=tmp_path / "out")


def test_other_models_in_memory_are_another_plan(tmp_path: Path) -> None:
    origin, experts = models()
    given = {"base": origin, "experts": experts}
    killed(2, "linear", given, tmp_path / "out")
    other = {"base": origin, "experts": {**experts, "b": expert(origin, 9)}}
    with pytest.raises(OutputError):
        fw.merge(METHODS["linear"], **other, out=tmp_path / "out")
    assert fw.merge(METHODS["linear"], **given, out=tmp_path / "out").report["resumed_tasks"] == 2


def test_an_input_that_changes_during_the_run_is_not_published(tmp_path: Path) -> None:
    given = on_disk(tmp_path)

    def touch(progress: Any) -> None:
        os.utime(given["experts"]["a"] / "model.safetensors", (1, 1))

    with pytest.raises(OutputError, match="changed while it was read"):
        fw.merge("linear", **given, out=tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_listener_that_fails_ends_the_run(tmp_path: Path) -> None:
    given = on_disk(tmp_path)

    def fail(progress: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fw.merge("linear", **given, out=tmp_path / "out", progress=fail, threads=2)
    assert not (tmp_path / "out").exists()
    assert fw.merge("linear", **given, out=tmp_path / "out").path


def test_one_bad_unit_stops_every_thread(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    broken = read(given["experts"]["a"])
    broken["layers.1.norm.weight"][0] = float("nan")
    saved(broken, given["experts"]["a"])
    with pytest.raises(NumericError):
        fw.merge("ties", **given, out=tmp_path / "out", threads=4)
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, os, signal
import fusewright as fw
from pathlib import Path
here = Path(sys.argv[1])
def die(progress):
    if progress.done > 20_000:
        os.kill(os.getpid(), signal.SIGKILL)
fw.merge(fw.Ties(density=0.3, scope="tensor"), base=here / "base",
         experts={"a": here / "a", "b": here / "b"}, out=here / "out", progress=die, threads=2)
"""


def test_a_process_killed_outright_leaves_a_resumable_folder(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    fw.merge(METHODS["ties per tensor"], **given, out=tmp_path / "whole")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    fw.merge(METHODS["ties per tensor"], **given, out=tmp_path / "out")
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))


def test_another_recipe_beside_staged_work_is_refused(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    killed(2, "linear", given, tmp_path / "out")
    with pytest.raises(FusewrightError):
        fw.merge(fw.Linear(weight={"a": 9.0}), **given, out=tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_resume_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    given = on_disk(tmp_path, dtype)
    fw.merge(METHODS["metagpt"], **given, out=tmp_path / "whole")
    killed(3, "metagpt", given, tmp_path / "out")
    fw.merge(METHODS["metagpt"], **given, out=tmp_path / "out")
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))

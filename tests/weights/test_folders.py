"""What stands where a folder is to be made is named, and stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusewright.bench.pools import parts
from fusewright.bench.sweep.store import Store
from fusewright.errors import OutputError
from fusewright.weights.folders import make_folder


@pytest.fixture(params=["file", "link"])
def taken(tmp_path: Path, request) -> Path:
    at = tmp_path / "taken"
    if request.param == "file":
        at.write_text("mine")
    else:
        at.symlink_to(tmp_path / "nowhere")
    return at


def pool(at: Path) -> None:
    with parts.pool(at, {}):
        pass


@pytest.mark.parametrize("make", [make_folder, pool, lambda at: Store(at).lock()])
def test_a_file_or_a_link_to_nowhere_in_the_way_is_named(taken: Path, make) -> None:
    with pytest.raises(OutputError, match=r"folder failed[\s\S]*taken[\s\S]*choose another"):
        make(taken)
    assert taken.is_symlink() or taken.read_text() == "mine"


def test_folders_above_are_made_and_what_is_there_stays(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "kept").touch()
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "kept").exists()

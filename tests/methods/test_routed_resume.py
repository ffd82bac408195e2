"""A routed fit that was killed goes on to the same end when the same merge is asked for again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from learned_toys import Killed, stop_at
from routed_toys import base_of, experts_of, sides, vit

import fusewright as fw
from fusewright.methods.routed import (
    EWEMoE,
    ParetoSet,
    RankOneMoE,
    RepresentationSurgery,
    WEMoE,
)

QUICK = {"steps": 8, "batch": 6, "every": 2, "rate": 1e-2}
ADAMERGING = {"adamerging": {**QUICK, "guard": 0}}
METHODS = {  # (method, the step it is killed after, the step it then goes on from)
    "wemoe": (WEMoE(**QUICK, guard=0), 5, 4),
    "e_wemoe": (EWEMoE(**QUICK, guard=0, objective="matching"), 5, 4),
    "rank_one_moe": (RankOneMoE(**QUICK, guard=0, rank=2, top=3), 5, 4),
    "pwe_moe": (ParetoSet(**QUICK, objective="entropy"), 5, 4),
    "twin": (fw.Twin(epochs=4, batch=20, rate=1e-2), 13, 10),  # five batches an epoch, dropout
    "surgery": (RepresentationSurgery(steps=80, rank=4, rate=1e-2), 60, 50),
    "surgery of a learned merge": (RepresentationSurgery(merger=ADAMERGING, steps=80), 60, 50),
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Models as folders, and data."""
    folder, base = tmp_path_factory.mktemp("models"), base_of(vit)
    for name, model in {"base": base, **experts_of(base)}.items():
        model.save_pretrained(folder / name)
    return {"base": folder / "base", "experts": {n: folder / n for n in "ab"}, "data": sides(vit)}


def alike(one: Path, two: Path) -> bool:
    first, second = fw.load(one).state_dict(), fw.load(two).state_dict()
    return first.keys() == second.keys() and all(t.equal(second[n]) for n, t in first.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_fit_goes_on_to_the_same_end(name: str, given, tmp_path) -> None:
    (method, killed, kept), seen = METHODS[name], []
    fw.merge(method, **given, out=tmp_path / "whole")
    with pytest.raises(Killed):
        fw.merge(method, **given, out=tmp_path / "out", progress=stop_at(killed))
    assert not (tmp_path / "out").exists() and list((tmp_path / ".out.fit").glob("*.pt"))
    fw.merge(method, **given, out=tmp_path / "out", progress=seen.append)
    steps = [now for now in seen if now.unit == "steps"]
    assert steps[0].done == kept + 1 and steps[0].resumed
    assert alike(tmp_path / "whole", tmp_path / "out")
    assert not list(tmp_path.glob(".*.fit"))


def test_of_other_data_it_begins_again(given, tmp_path) -> None:
    method, killed, _ = METHODS["twin"]
    with pytest.raises(Killed):
        fw.merge(method, **given, out=tmp_path / "out", progress=stop_at(killed))
    other = {**given, "data": sides(vit, 9)}
    seen = []
    fw.merge(method, **other, out=tmp_path / "out", progress=seen.append)
    assert next(now.done for now in seen if now.unit == "steps") == 1


def test_the_merge_below_a_surgery_goes_on_too(given, tmp_path, monkeypatch) -> None:
    """Killed in the learned merge itself, which tells nobody of its steps."""
    from fusewright.methods.learned import _fitting

    made, plain = [], _fitting.Fitting.gradients

    def counted(self, merge, number, *more):
        made.append(number)
        if len(made) == 6:
            raise Killed
        return plain(self, merge, number, *more)

    monkeypatch.setattr(_fitting.Fitting, "gradients", counted)
    method = METHODS["surgery of a learned merge"][0]
    with pytest.raises(Killed):
        fw.merge(method, **given, out=tmp_path / "out")
    fw.merge(method, **given, out=tmp_path / "out")
    assert made == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert not list(tmp_path.glob(".*.fit"))


OUTRIGHT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from routed_toys import sides, vit
import fusewright as fw
from fusewright.methods.routed import WEMoE
def die(now):
    if now.unit == "steps" and now.done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
at = Path(sys.argv[2])
fw.merge(WEMoE(steps=8, batch=6, every=2, rate=1e-2, guard=0), base=at / "base",
         experts={n: at / n for n in "ab"}, data=sides(vit), out=sys.argv[3], progress=die)
"""


def test_a_process_killed_outright_is_gone_on_with(given, tmp_path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", OUTRIGHT, str(Path(__file__).parent),
               str(given["base"].parent), str(tmp_path / "out")]  # fmt: skip
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    seen, (method, _, kept) = [], METHODS["wemoe"]
    fw.merge(method, **given, out=tmp_path / "out", progress=seen.append)
    fw.merge(method, **given, out=tmp_path / "whole")
    assert next(now.done for now in seen if now.unit == "steps") == kept + 1
    assert alike(tmp_path / "whole", tmp_path / "out")

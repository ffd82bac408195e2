"""Several processes fit what one fits; each asks about its own tasks, and the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from routed_toys import base_of, experts_of, sides, vit

import fusewright as fw
from fusewright.methods.learned import ANP, AWM, DAM, SAU, AdaMerging, Concrete, ProDistill
from fusewright.methods.learned.processes import Processes
from fusewright.methods.routed import RepresentationSurgery, Twin, WEMoE
from fusewright.tasks.adaptation import adaptation
from fusewright.tasks.pictures import Pictures

QUICK: dict[str, Any] = {"steps": 6, "batch": 6, "every": 2, "guard": 12}
METHODS = {
    "adamerging": AdaMerging(**QUICK, rate=1e-2),
    "combined": AdaMerging(**QUICK, rate=1e-2, combine="mgda"),
    "concrete": Concrete(**QUICK, rate=1e-1, form="adamerging", weight_steps=3),
    "anp": ANP(**QUICK, rate=1e-2),
    "dam": DAM(**QUICK, rate=1e-1),
    "dam, aimed": DAM(**QUICK, rate=1e-1, aim="toward", detection=False),
    "awm": AWM(**QUICK, rate=1e-2),
    "prodistill": ProDistill(steps=6, batch=6, inputs=12, every=2),
    "sau": SAU(**QUICK, rate=1e-2, attack_steps=2),
    "wemoe": WEMoE(**QUICK, rate=1e-2),
    "twin": Twin(epochs=2, rate=1e-2, batch=8),
    "surgery": RepresentationSurgery(steps=6, rate=1e-2, batch=6),
}
FEATURES = ("twin", "surgery")


def merged(folder: Path, out: Path) -> dict[str, int]:
    """Merge by every method; how often each task was asked while gradients were wanted, or to learn
    from features alone."""
    asked, under_way = {"a": 0, "b": 0}, ""

    def head(task: str) -> Any:
        def answer(model: Any, batch: Any) -> torch.Tensor:
            asked[task] += torch.is_grad_enabled() or under_way in FEATURES
            return model(pixel_values=batch["pixel_values"]).logits

        return answer

    heads = {n: head(n) for n in "ab"}
    data = adaptation(sides(vit), heads, Pictures(mean=(0.5,), std=(0.5,)))
    for under_way, method in METHODS.items():
        fw.merge(method, base=folder / "base", experts={n: folder / n for n in "ab"}, data=data,
                 out=out / under_way)  # fmt: skip
    return asked


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], list[Any]]:
    """Of models and merges; what was asked by one process, and by each of two."""
    folder, base = tmp_path_factory.mktemp("processes"), base_of(vit)
    for name, model in {"base": base, **experts_of(base)}.items():
        model.save_pretrained(folder / name)
    alone = merged(folder, folder / "one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    place = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", *launch, __file__, str(folder)], check=True,
                   env={**os.environ, **place}, timeout=300, capture_output=True)  # fmt: skip
    each = [json.loads((folder / f"asked-{rank}.json").read_text()) for rank in range(2)]
    return folder, alone, each


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_does(name: str, folders: Any) -> None:
    folder = folders[0]
    one, two = (fw.load(folder / which / name).state_dict() for which in ("one", "two"))
    base = fw.load(folder / "base").state_dict()
    assert one.keys() == two.keys() and any(n not in base or not t.equal(base[n])
                                            for n, t in one.items())  # fmt: skip
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-4, atol=1e-5, msg=tensor)


def test_each_asks_about_its_own_tasks(folders: Any) -> None:
    _, alone, (first, second) = folders
    assert first == {"a": alone["a"], "b": 0} and second == {"a": 0, "b": alone["b"]}


def test_nothing_is_left_beside_the_output(folders: Any) -> None:
    assert sorted(p.name for p in (folders[0] / "two").iterdir()) == sorted(METHODS)


def test_tasks_are_dealt_in_turn_and_found_in_order() -> None:
    tasks = ["a", "b", "c", "d", "e"]
    assert [Processes(n, 3).mine(tasks) for n in range(3)] == [["a", "d"], ["b", "e"], ["c"]]
    assert Processes().mine(tasks) == tasks
    assert list(Processes().gathered({"b": 1, "a": 2}, ["a", "b"]).items()) == [("a", 2), ("b", 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    found = merged(place, place / "two")
    (place / f"asked-{os.environ['RANK']}.json").write_text(json.dumps(found))

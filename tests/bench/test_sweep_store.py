"""Cells on disk: what was found is what is read; nothing half-written counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusewright.bench.results import Cell, Results
from fusewright.bench.sweep.store import Store, load_results, save_results
from fusewright.errors import FusewrightError, OutputError
from fusewright.tasks.outcomes import Outcomes

pytest.importorskip("pyarrow")


def outcomes(items=4, **columns):
    score = np.linspace(0, 1, items)
    return Outcomes("accuracy", score, np.ones(items), columns)


def cell(**found):
    by_task = {task: {"clean": o} for task, o in found.items()} or {"a": {"clean": outcomes()}}
    return Cell("ties", "TIES", "none", "toy", 0, ("a", "b"), by_task, {"size": "small"},
                {"ties": {"density": 0.2}}, {"seconds": 1.5}, "a note")  # fmt: skip


def same(one: Cell, other: Cell) -> bool:
    for name in Cell.__dataclass_fields__:
        if name != "outcomes":
            assert getattr(one, name) == getattr(other, name), name
    assert {t: list(c) for t, c in one.outcomes.items()} == {
        t: list(c) for t, c in other.outcomes.items()
    }
    for task, each in one.outcomes.items():
        for condition, a in each.items():
            b = other.outcomes[task][condition]
            assert a.metric == b.metric and a.columns.keys() == b.columns.keys()
            pairs = [(a.score, b.score), (a.weight, b.weight)]
            pairs += [(a.columns[name], b.columns[name]) for name in a.columns]
            for x, y in pairs:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
    return True


KINDS = (np.int64, np.float32, np.float64, np.bool_, "U5")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_outcomes_of_any_kinds_come_back_as_they_were(tmp_path_factory, data):
    found = {}
    for task in data.draw(st.sets(st.sampled_from("abc"), min_size=1)):
        items = data.draw(st.integers(1, 5))
        names = data.draw(st.sets(st.sampled_from(["label", "loss", "prediction"])))
        columns = {}
        for name in names:
            dtype = np.dtype(data.draw(st.sampled_from(KINDS)))
            text = st.text("xyz", max_size=5) if dtype.kind == "U" else None
            columns[name] = data.draw(hnp.arrays(dtype, items, elements=text))
        found[task] = outcomes(items, **columns)
    store = Store(tmp_path_factory.mktemp("store"))
    store.lock().release()
    store.folder.joinpath("cells").mkdir(parents=True, exist_ok=True)
    store.save("k", cell(**found))
    assert same(store.load("k"), cell(**found))


@pytest.fixture
def store(tmp_path):
    (tmp_path / "cells").mkdir()
    found = Store(tmp_path)
    found.save("k", cell(), [{"parameters": {}, "value": 1.0}])
    return found


def test_conditions_stay_in_order(store):
    many = Cell("r", "R", "none", "toy", 0, (), {
        "a": {"clean": outcomes(3), "fog": outcomes(3, loss=np.arange(3.0))},
    })  # fmt: skip
    store.save("many", many)
    assert same(store.load("many"), many)


def test_trials_are_kept(store):
    assert store.trials("k") == [{"parameters": {}, "value": 1.0}]


def test_a_cell_without_its_json_is_not_finished(store):
    (store.folder / "cells" / "k.json").unlink()
    assert not store.is_finished("k")


@pytest.mark.parametrize("name", ["k.json", "k.parquet"])
def test_a_truncated_cell_is_not_finished_and_not_loaded(store, name):
    path = store.folder / "cells" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert not store.is_finished("k")
    with pytest.raises(FusewrightError, match="missing or damaged"):
        store.load("k")


def test_outcomes_of_another_cell_are_noticed(store):
    store.save("other", cell(a=outcomes(9)))
    (store.folder / "cells" / "other.parquet").replace(store.folder / "cells" / "k.parquet")
    assert not store.is_finished("k")


def test_nothing_is_left_beside_the_cells(store):
    assert {p.name for p in (store.folder / "cells").iterdir()} == {"k.json", "k.parquet"}


def test_results_come_back(store):
    said = Results("toy", "Toys", {"a": "?"}, ("a",), ("b",), (cell(),), {"trials": 3})
    save_results(store.folder, said, ["k"])
    found = load_results(store.folder)
    assert same(found.cells[0], cell())
    assert (found.suite, found.merged, found.unseen, found.facts) == (
        "toy", ("a",), ("b",), {"trials": 3},
    )  # fmt: skip


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FusewrightError, match="holds no results"):
        load_results(tmp_path)


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    lock = Store(tmp_path).lock()
    with pytest.raises(OutputError, match="Another run"):
        Store(tmp_path).lock()
    lock.release()
    Store(tmp_path).lock().release()

"""Every routed method on every kind of model: in a fresh process it answers the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routed_toys import (
    INPUTS,
    answer,
    base_of,
    clip,
    elsewhere,
    experts_of,
    loud,
    said,
    saved,
    sides,
)

import fusewright as fw
from fusewright.methods.routed import (
    METHODS,
    EWEMoE,
    ParetoSet,
    RankOneMoE,
    RepresentationSurgery,
    Smile,
    WEMoE,
)

TASK, PREFERENCE = {"set_task": "b"}, {"set_preference": [0.25, 0.75]}
QUICK = {"steps": 2, "batch": 3, "guard": 0}
ALL = {
    "smile": (Smile(rank=4, gate=2), {}),
    "wemoe": (WEMoE(**QUICK), {}),
    "e_wemoe": (EWEMoE(**QUICK), {}),
    "rank_one_moe": (RankOneMoE(**QUICK, rank=3, top=2), {}),
    "twin": (fw.Twin(mask_rate=0.5, epochs=2, rate=5e-3), {}),
    "emr": (fw.EMR(), TASK),
    "tall": (fw.Tall(), TASK),
    "surgery": (RepresentationSurgery(rank=4, steps=5, rate=1e-2), TASK),
    "pwe_moe": (ParetoSet(**QUICK, modules="all", objective="entropy"), PREFERENCE),
}


GROUPS = [("smile", "wemoe", "e_wemoe"), ("rank_one_moe", "twin", "surgery"),
          ("emr", "tall", "pwe_moe")]  # fmt: skip


def test_none_is_left_out() -> None:
    assert {method.name for method in METHODS} == set(ALL) == {n for names in GROUPS for n in names}


def built(method: Any, make: Any) -> Any:
    """A model whose routers tell inputs apart plainly."""
    base = base_of(make)
    head = torch.ones(4, 8) if make is clip else said
    made = fw.merge(method, base=base, experts=experts_of(base), data=sides(make, 2),
                    heads=dict.fromkeys("ab", head))  # fmt: skip
    if isinstance(method, WEMoE):
        loud(made.module())
    return made


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_all_are_saved_and_loaded_in_another_process(names: tuple[str, ...], tmp_path) -> None:
    asked, expected = [], {}
    for name in names:
        method, told = ALL[name]
        for make in INPUTS:
            made = built(method, make)
            if told is TASK:
                made.set_task("a")  # which is no part of what is saved
            folder = saved(made, make, tmp_path, f"{make.__name__}-{name}")
            asked.append((folder, INPUTS[make], told))
            for call, value in told.items():
                getattr(made.module(), call)(value)
            expected[folder.name] = answer(made.module(), make)
            before = answer(base_of(make), make)
            assert not torch.allclose(expected[folder.name], before, atol=1e-4), folder.name
    found = elsewhere(tmp_path, asked)
    for (name, one), two in zip(expected.items(), found, strict=True):
        assert torch.allclose(two, one, rtol=1e-5, atol=1e-6), name

"""Representation Surgery on tiny models of every kind."""

from __future__ import annotations

import pytest
import torch
from routed_toys import (
    IDS,
    INPUTS,
    MODELS,
    answer,
    base_of,
    clip,
    experts_of,
    gpt2,
    llama,
    saved,
    sides,
    t5,
    vit,
)
from torch.nn.functional import pad

import fusewright as fw
from fusewright.errors import PlanError
from fusewright.methods.routed import RepresentationSurgery

QUICK = RepresentationSurgery(rank=4, steps=60, rate=1e-2)


def built(make, method=QUICK):
    base = base_of(make)
    heads = dict.fromkeys("ab", torch.ones(4, 8)) if make is clip else None
    return fw.merge(method, base=base, experts=experts_of(base), data=sides(make, 3), heads=heads)


@MODELS
def test_features_come_nearer_to_the_experts(make) -> None:
    made = built(make)
    found = made.report["fitted"]
    assert all(found["after"][task] < 0.97 * found["before"][task] for task in ("a", "b")), found
    said = {}
    for task in ("a", "b"):
        made.set_task(task)
        said[task] = answer(made.module(), make)
    assert not torch.allclose(said["a"], said["b"], atol=1e-4)


@MODELS
def test_before_the_first_step_it_is_the_merge(make) -> None:
    made, base = built(make, RepresentationSurgery(steps=0)), base_of(make)
    made.set_task("b")
    plain = fw.merge(fw.TaskArithmetic(scale=0.3), base=base, experts=experts_of(base)).module()
    torch.testing.assert_close(answer(made.module(), make), answer(plain, make))


@pytest.mark.parametrize("make", [vit, clip], ids=["vit", "clip"])
def test_it_is_saved_and_loaded(make, tmp_path) -> None:
    made = built(make)
    model = fw.load(saved(made, make, tmp_path))
    with pytest.raises(PlanError, match="told the task"):
        model(**INPUTS[make])
    for told in (model, made.module()):
        told.set_task("b")
    assert answer(model, make).equal(answer(made.module(), make))


@pytest.mark.parametrize("make", [gpt2, llama, t5], ids=["gpt2", "llama", "t5"])
def test_padding_is_no_feature(make) -> None:
    short = {"input_ids": IDS[:, :3], "attention_mask": torch.ones(3, 3, dtype=torch.long)}
    padded = {name: pad(tensor, (0, 9)) for name, tensor in short.items()}
    if make is t5:
        for batch in (short, padded):
            batch |= {f"decoder_{name}": tensor for name, tensor in batch.items()}
    base = base_of(make)
    found = [fw.merge(RepresentationSurgery(steps=0), base=base, experts=experts_of(base),
                      data={"a": [batch], "b": [batch]}).report["fitted"]["before"]
             for batch in (short, padded)]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_is_wrong_is_said() -> None:
    made = built(vit)
    with pytest.raises(PlanError, match="does not know this task"):
        made.set_task("c")
    with pytest.raises(PlanError, match="no place for a correction"):
        made.unload()
    base = base_of(vit)
    with pytest.raises(PlanError, match=r"data of an expert's task[\s\S]*b"):
        fw.merge(QUICK, base=base, experts=experts_of(base), data={"a": sides(vit)["a"]})
    with pytest.raises(fw.FusewrightError, match="there is no method"):
        RepresentationSurgery(merger="tie")

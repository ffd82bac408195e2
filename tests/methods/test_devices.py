"""Methods that learn run where they are told, and what comes out is on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learned_toys import QUICK, data, experts, network

import fusewright as fw
from devices import accelerator, needs_accelerator
from fusewright.devices import checked
from fusewright.errors import RecipeError
from fusewright.methods.learned import AdaMerging, AdaRank, Concrete, FWMerging, ProDistill
from fusewright.methods.routed import EMR, RepresentationSurgery, Smile, Tall, Twin, WEMoE
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse
from fusewright.modules.vectors import TaskVectors
from fusewright.tasks.adaptation import Question
from fusewright.tasks.placement import moved

META = torch.device("meta")
LEARNERS: dict[str, Any] = {
    "adamerging": AdaMerging(**QUICK), "plus": AdaMerging.profile("plus", **QUICK),
    "concrete": Concrete(**QUICK), "directions": Concrete(**QUICK, mask="rank"),
    "ranks": AdaRank(**QUICK, density=0.5),
    "frank wolfe": FWMerging(steps=2, batch=16, rows=16, objective="entropy"),
    "prodistill": ProDistill(steps=4, inputs=32),
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "emr": EMR(), "tall": Tall(), "smile": Smile(), "wemoe": WEMoE(**QUICK), "twin": Twin(epochs=2),
    "surgery": RepresentationSurgery(steps=3),
}  # fmt: skip


@pytest.mark.parametrize("name", ["cuda:99", "meta", "no such device", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(RecipeError, match="no such device"):
        checked(name)
    base = network()
    with pytest.raises(RecipeError, match="no such device"):
        fw.merge("average", base=base, experts=experts(base), device=name)
    with pytest.raises(RecipeError, match="no such device"):
        fw.suite("digits", device=name)


def test_batches_are_moved_whatever_they_are() -> None:
    one = torch.ones(2)
    found = moved({"a": [one, (one, "text")], "labels": torch.ones(2, dtype=torch.int64)}, META)
    assert found["a"][0].device == found["a"][1][0].device == found["labels"].device == META
    assert found["a"][1][1] == "text" and isinstance(found["a"][1], tuple)
    wide = moved({"a": one, "b": one.long()}, torch.device("cpu"), torch.float64)
    assert wide["a"].dtype == torch.float64 and wide["b"].dtype == torch.int64


def test_questions_bring_their_batches() -> None:
    question = Question("a", lambda model, batch: batch, lambda size, seed: [torch.ones(size)])
    assert next(question.on(META).stream(3, 0)).device == META
    assert next(question.stream(3, 0)).device.type == "cpu"


@pytest.mark.parametrize("delta", [
    Dense(torch.ones(2, 3)), Factors(torch.ones(2, 1), torch.ones(1, 3), torch.Size((2, 3))),
    Sparse.at(torch.ones(2, 3), torch.tensor([1, 4])),
], ids=lambda d: type(d).__name__)  # fmt: skip
def test_task_vectors_are_brought_when_they_are_read(delta: Delta) -> None:
    vectors = TaskVectors(("a",), {"w": torch.ones(2, 3)}, lambda expert, name: delta)
    found = vectors.on(META)
    assert found.base["w"].device == META
    assert all(t.device == META for t in found.read("a", "w").tensors)
    assert type(found.read("a", "w")) is type(delta)
    assert found.read("a", "w").shape == (2, 3)
    assert vectors.on(torch.device("cpu")) is vectors


@needs_accelerator
@pytest.mark.parametrize("method", LEARNERS.values(), ids=LEARNERS)
def test_a_fit_is_the_same_on_a_device(method: Any) -> None:
    base = network()
    given = {"base": base, "experts": experts(base), "data": data()}
    there = fw.merge(method, **given, device=accelerator()).state_dict()
    for name, tensor in fw.merge(method, **given).state_dict().items():
        assert there[name].device.type == "cpu"
        torch.testing.assert_close(there[name], tensor, rtol=1e-4, atol=1e-4)


@needs_accelerator
@pytest.mark.parametrize("method", ROUTED.values(), ids=ROUTED)
def test_a_routed_model_answers_the_same(method: Any) -> None:
    from routed_toys import base_of, experts_of, images, vit

    base = base_of(vit)
    given = {"base": base, "experts": experts_of(base), "data": images()}
    here, there = (fw.merge(method, **given, device=d).module() for d in ("cpu", accelerator()))
    assert all(t.device.type == "cpu" for t in there.state_dict().values())
    for model in (here, there):
        if hasattr(model, "set_task"):
            model.set_task("b")
    with torch.no_grad():
        answers = [model(**images()["b"][0]).logits for model in (here, there)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)

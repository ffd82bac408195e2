"""Promises of methods that run models: what they learn, and what they route."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightError, PlanError, RecipeError, WeightsError
from fusewright.methods.contract import Method, Program, Routed
from fusewright.testing._identities import close
from fusewright.testing._network import (
    STEPS,
    Problem,
    answers,
    built,
    network,
    problem,
    problem_for,
)
from fusewright.testing._promise import promise
from fusewright.testing._robust import same_bytes


def runs_models(cls: type[Method]) -> bool:
    """Whether it is a Program or Routed."""
    return issubclass(cls, Program | Routed)


def _learns(cls: type[Method]) -> bool:
    return runs_models(cls) and cls.card.data != "none"


def _descends(cls: type[Method]) -> bool:
    return _learns(cls) and any(word in cls.model_fields for word in STEPS)


def _routes(cls: type[Method]) -> bool:
    return issubclass(cls, Routed)


def _programs(cls: type[Method]) -> bool:
    return issubclass(cls, Program) and not issubclass(cls, Routed)


def _merges_one(cls: type[Method]) -> bool:
    return runs_models(cls) and cls.card.experts[0] == 1


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), f"{sorted(found.keys() ^ expected.keys())[:3]} differ"
    for name, tensor in expected.items():
        try:
            same_bytes(found[name], tensor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@promise("quick", runs_models)
def repeated(method: Method) -> None:
    """The same seed gives the same bytes, whatever torch's own generator says; the report is plain
    JSON."""
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            merged = built(method, problem_for(type(method)))
        json.dumps(merged.report)
        found.append(merged.state_dict())
    _same(*found)


@promise("quick", runs_models)
def models_unchanged(method: Method) -> None:
    """Base, experts and data are read, never written, not by the model that was made either."""
    given = problem_for(type(method))
    before = copy.deepcopy(given)
    merged = built(method, given)
    answers(merged.module(), given.pictures, next(iter(given.experts)))
    for now, then in zip(_tensors(given), _tensors(before), strict=True):
        _same(now, then)


def _tensors(given: Problem) -> Iterator[Mapping[str, Tensor]]:
    for model in (given.base, *given.experts.values()):
        yield model.state_dict()
    for batches in given.batches.values():
        yield from batches
    yield {"pictures": given.pictures}


@promise("quick", runs_models, identity=True)
def nothing_changed(method: Method) -> None:
    """Experts equal to the base answer as the base does, or are refused."""
    given = problem_for(type(method))
    for expert in given.experts.values():
        expert.load_state_dict(given.base.state_dict())
    try:
        made = built(method, given).module()
    except FusewrightError:
        return
    for task in given.experts:
        close(answers(made, given.pictures, task), answers(given.base, given.pictures))


@promise("quick", _merges_one)
def one_model(method: Method) -> None:
    """One expert is enough."""
    given = problem(1)
    found = answers(built(method, given).module(), given.pictures, *given.experts)
    assert torch.isfinite(found).all(), "the answers are not finite"


@promise("quick", runs_models)
def narrow(method: Method) -> None:
    """A base in bfloat16 stays one, and its answers are finite."""
    given = problem_for(type(method), dtype=torch.bfloat16)
    made = built(method, given).module()
    for name, tensor in made.state_dict().items():
        kept = name not in given.base.state_dict() or tensor.dtype == torch.bfloat16
        assert kept, f"{name} became {tensor.dtype}"
    for task in given.experts:
        found = answers(made, given.pictures, task)
        assert found.dtype == torch.bfloat16, f"the answers became {found.dtype}"
        assert torch.isfinite(found).all(), "the answers are not finite"


@promise("quick", runs_models)
def told(method: Method) -> None:
    """Whether the task must be told is as the card says; untold, or of an unknown one, such a model
    refuses to answer."""
    given, told = problem_for(type(method)), method.card.task_id
    made = built(method, given).module()
    assert hasattr(made, "set_task") == told, f"card.task_id is {told}"
    if told:
        with _refused(FusewrightError, "it answers without the task"):
            answers(made, given.pictures)
        with _refused(FusewrightError, "it takes a task that there is not"):
            answers(made, given.pictures, "no such task")


@promise("quick", _learns)
def missing_data(method: Method) -> None:
    """Without data, or with none of one expert's task, it is refused, and says so."""
    given = problem_for(type(method))
    first = next(iter(given.batches))
    fewer = {task: batches for task, batches in given.batches.items() if task != first}
    for data in (None, fewer):
        with _refused(FusewrightError, f"it learned from data of {sorted(data or {})}"):
            built(method, given, data=data, evaluate=None)


@promise("quick", _descends)
def no_steps(method: Method) -> None:
    """Without a step nothing is learned: other inputs give the same bytes."""
    still = {word: 0 for word in STEPS if word in type(method).model_fields}
    try:
        idle = type(method)(**{**dict(method), **still})
    except RecipeError:  # it takes one step at least
        return
    given, other = (problem_for(type(method), seed=seed) for seed in (0, 1))
    found = (built(idle, each).state_dict() for each in (given, given.with_inputs_of(other)))
    _same(*found)


@promise("quick", _programs)
def streamed(method: Method) -> None:
    """Executed into a folder, the bytes are those of a merge in memory."""
    from fusewright.engine.state import read_state

    given = problem_for(type(method))
    with TemporaryDirectory() as folder:
        built(method, given, out=Path(folder) / "out")
        _same(read_state(Path(folder) / "out"), built(method, given).state_dict())


@promise("quick", _routes)
def saved(method: Method) -> None:
    """What is saved opens again with the same bytes and the same answers."""
    from fusewright.engine.state import load, read_state

    given = problem_for(type(method))
    merged = built(method, given)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        merged.save(out)
        _same(read_state(out), merged.state_dict())
        again = load(out, module=network(seed=1))
        for task in given.experts:
            found = (answers(made, given.pictures, task) for made in (again, merged.module()))
            same_bytes(*found)


@promise("quick", _routes)
def another_base(method: Method) -> None:
    """What is saved is refused over a base of other widths or depth."""
    from fusewright.engine.state import load

    with TemporaryDirectory() as folder:
        built(method, problem_for(type(method))).save(Path(folder) / "out")
        for other in (network(width=6), network(depth=1), network(depth=3)):
            with _refused(WeightsError, "it opened over another base"):
                load(Path(folder) / "out", module=other)


@promise("quick", _routes, identity=True)
def each_alone(method: Method) -> None:
    """An input's answer does not depend on what else is in its batch."""
    given = problem_for(type(method))
    made, task = built(method, given).module(), next(iter(given.experts))
    alone = [answers(made, picture[None], task) for picture in given.pictures]
    close(torch.cat(alone), answers(made, given.pictures, task))


@promise("quick", _routes)
def unloaded(method: Method) -> None:
    """Where one can be had, the plain model is of the base's tensors, and answers an input as the
    routed model did."""
    given = problem_for(type(method))
    merged, picture, task = built(method, given), given.pictures[:1], next(iter(given.experts))
    expected = answers(merged.module(), picture, task)
    plain = _plain(merged, picture)
    if plain is not None:
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (plain, given.base)]
        assert shapes[0] == shapes[1], "its tensors are not those of the base"
        close(answers(plain, picture), expected)


def _plain(merged: Any, inputs: Tensor) -> nn.Module | None:
    """The unloaded model: of what was told last, else of an input; None if neither is offered."""
    for given in ((), (inputs,)):
        try:
            found: nn.Module = merged.unload(*given).module()
        except PlanError:
            continue
        return found
    return None


@contextmanager
def _refused(kind: type[FusewrightError], otherwise: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(otherwise)

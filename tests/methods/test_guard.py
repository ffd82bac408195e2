"""What a guard measures: agreement with each task's own expert, and how often one class is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fusewright.errors import FusewrightWarning
from fusewright.methods.learned._guard import Agreement, first_batches
from fusewright.modules.deltas import Dense
from fusewright.modules.vectors import TaskVectors
from fusewright.tasks.adaptation import Question, adaptation

CLASSES, ROWS, SIZE = 3, 20, 8


class Says(nn.Module):
    """The class that is nearest to its shift of the input's class."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(CLASSES).roll(shift, dims=1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table[rows[:, 0].long()]


def agreement(
    inputs: torch.Tensor, rows: int = ROWS, shift: int = 1, size: int = SIZE
) -> Agreement:
    """Of experts "a", which says the input's class, and "b", which says the next."""
    base = Says(2)
    wanted = {"a": Says(0).table.detach(), "b": Says(shift).table.detach()}
    vectors = TaskVectors(("a", "b"), {"table": base.table.detach()},
                          lambda e, n: Dense(wanted[e] - base.table.detach()))  # fmt: skip
    batches = list(inputs.float()[:, None].split(size))
    questions = adaptation({"a": batches, "b": batches}).questions
    return Agreement(base, vectors, questions, SIZE, rows, 0)


INPUTS = torch.arange(24) % 4 % CLASSES  # class 0 half of the time


def test_it_is_the_share_of_items_that_the_own_expert_answers_alike() -> None:
    found = agreement(INPUTS)
    for shift, shares in ((0, (1, 0)), (1, (0, 1)), (2, (0, 0))):
        measured = found.measured(Says(shift))
        assert tuple(measured[task]["agreement"] for task in "ab") == shares
    half = Says(0)
    with torch.no_grad():
        half.table[0] = half.table[1]  # of class 0 it says 1, as "b" does
    measured = found.measured(half)
    assert measured["a"]["agreement"] == measured["b"]["agreement"] == 0.5
    assert measured["a"]["most_predicted"] == 0.75
    assert measured["a"]["expert_most_predicted"] == 0.5


@pytest.mark.parametrize(("rows", "asked"), [(1, 8), (8, 8), (9, 16), (ROWS, 24)])
def test_as_many_batches_are_asked_as_hold_the_rows(rows: int, asked: int) -> None:
    found = agreement(INPUTS, rows)
    for answers in found.asked.values():
        assert sum(len(said) for _, said in answers) == asked


@pytest.mark.parametrize("size", [1, 3, 8, 30])
def test_rows_are_counted_whatever_size_batches_were_given_in(size: int) -> None:
    found = agreement(INPUTS, size=size)
    looked = {1: 20, 3: 21, 8: 24, 30: 24}[size]
    assert {len(torch.cat([x for x, _ in each])) for each in found.asked.values()} == {looked}
    assert {of["inputs"] for of in found.measured(Says(0)).values()} == {looked}


def test_batches_that_were_given_are_looked_at_once() -> None:
    assert {len(each) for each in agreement(INPUTS, rows=100).asked.values()} == {3}


@pytest.mark.parametrize(("rows", "sizes"), [(8, [8]), (20, [8, 8, 5]), (32, [8, 8, 5, 8])])
def test_batches_of_the_size_that_was_asked_for_are_counted_whole(rows, sizes) -> None:
    """The last of an epoch, too; an epoch follows the other."""
    def epoch(size: int, seed: int):
        return iter(torch.arange(21).split(size))

    found = first_batches(Question("a", lambda model, batch: batch, epoch), SIZE, rows, 0)
    assert [len(batch) for batch in found] == sizes


def test_the_warning_says_how_many_inputs_there_were() -> None:
    with pytest.warns(FusewrightWarning, match=r"one class \(of the first 5\)"):
        agreement(torch.zeros(5), rows=128, size=2)


def test_only_experts_that_say_one_class_of_several_inputs_are_told_of() -> None:
    with pytest.warns(FusewrightWarning, match=r"all inputs of a, b with one class"):
        agreement(torch.zeros(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreement(torch.zeros(1), rows=1)  # of one input nobody says more
        agreement(torch.tensor([0] * 7 + [1]), rows=8)

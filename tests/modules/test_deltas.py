"""Task vectors of one tensor: every form says the same as the whole tensor."""

from __future__ import annotations

import pytest
import torch

from fusewright.modules.deltas import Dense, Factors, Sparse, leading

SHAPE = (7, 5)


def rank_two() -> Factors:
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(7, 2, generator=draw), torch.randn(2, 5, generator=draw)
    return Factors(up, down, torch.Size(SHAPE))


def few() -> Sparse:
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return Sparse.largest(whole, 0.3)


FORMS = {
    "dense": Dense(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))),
    "sparse": few(), "factors": rank_two(), "nothing": Sparse.largest(torch.zeros(SHAPE), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_whole_tensor(form: str) -> None:
    delta, draw = FORMS[form], torch.Generator().manual_seed(3)
    whole = delta.dense()
    assert whole.shape == delta.shape == SHAPE
    gradient = torch.randn(SHAPE, generator=draw)
    torch.testing.assert_close(delta.dot(gradient), (gradient * whole).sum())
    inputs = torch.randn(2, 3, 5, generator=draw)
    torch.testing.assert_close(delta.apply(inputs), inputs @ whole.T)
    torch.testing.assert_close(delta.norm2(), whole.double().square().sum(), rtol=1e-6, atol=1e-12)


def test_the_largest_stay_and_of_equal_ones_the_first() -> None:
    whole = torch.tensor([[1.0, -3.0], [3.0, 2.0]])
    assert Sparse.largest(whole, 0.25).dense().tolist() == [[0, -3], [0, 0]]
    assert Sparse.largest(whole, 0.5).dense().tolist() == [[0, -3], [3, 0]]
    assert Sparse.largest(whole, 0.74).dense().tolist() == [[0, -3], [3, 0]]
    assert Sparse.largest(whole, 1.0).dense().equal(whole)


def test_sparse_tensors_take_eight_bytes_an_element() -> None:
    assert Sparse.largest(torch.randn(100, 100), 0.1).nbytes == 1000 * 8


def test_leading_triples_are_the_best_of_their_rank() -> None:
    whole = rank_two().dense()
    for delta in (Dense(whole), rank_two()):
        torch.testing.assert_close(leading(delta, 2).dense(), whole)
        values = torch.linalg.svdvals(whole)
        error = (leading(delta, 1).dense() - whole).square().sum()
        torch.testing.assert_close(error, values[1:].square().sum())
    assert leading(Dense(whole), 9).up.shape == (7, 5)
    assert leading(rank_two(), 9).up.shape == (7, 2)


def test_factors_are_of_any_shape() -> None:
    delta = Factors(rank_two().up, rank_two().down, torch.Size((7, 5, 1, 1)))
    whole = rank_two().dense()
    assert delta.dense().equal(whole[..., None, None])
    gradient = torch.randn(7, 5, 1, 1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(delta.dot(gradient), (gradient[..., 0, 0] * whole).sum())


def test_singular_values_go_up_and_sixteen_bits_are_decomposed_in_32() -> None:
    for delta in (Dense(rank_two().dense()), rank_two(), Dense(rank_two().dense().bfloat16())):
        found = leading(delta, 2)
        torch.testing.assert_close(found.down @ found.down.T, torch.eye(2))
        assert found.up.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_inputs_keep_their_dtype(form: str) -> None:
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).double()
    found = FORMS[form].apply(inputs)
    torch.testing.assert_close(found, inputs @ FORMS[form].dense().double().T)

"""Which linear maps a layer can take the place of, and what experts change of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.methods.routed._linears import matrices, part_of, routable, shifts
from fusewright.modules.architecture import describe_module
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse
from fusewright.modules.vectors import TaskVectors

hf = pytest.importorskip("transformers")


class Attention(nn.MultiheadAttention):
    """One that may do something else."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({
        "linear": nn.Linear(4, 6), "turned": hf.pytorch_utils.Conv1D(6, 4),
        "conv": nn.Conv2d(4, 6, (2, 3)), "flat": nn.Conv1d(4, 6, 3), "deep": nn.Conv3d(4, 6, 2),
        "groups": nn.Conv2d(4, 6, 3, groups=2), "back": nn.ConvTranspose2d(4, 6, 3),
        "attn": nn.MultiheadAttention(4, 2), "apart": nn.MultiheadAttention(4, 2, kdim=5, vdim=3),
        "bare": nn.MultiheadAttention(4, 2, bias=False), "other": Attention(4, 2),
        "table": nn.Embedding(9, 4), "norm": nn.LayerNorm(4),
    })  # fmt: skip


def test_these_can_be_routed() -> None:
    net = network()
    found = {x.module: x for x in routable(describe_module(net), net)}
    maps = ("q_proj", "k_proj", "v_proj", "out_proj")
    known = {f"{a}.{m}" for a in ("attn", "apart", "bare") for m in maps}
    assert set(found) == {"linear", "turned", "conv", "flat"} | known
    shapes = {path: (x.outputs, x.inputs) for path, x in found.items()}
    assert {shapes[f"attn.{m}"] for m in maps} == {(4, 4)}
    assert shapes["apart.k_proj"] == (4, 5) and shapes["apart.v_proj"] == (4, 3)
    assert found["bare.q_proj"].bias is None and found["apart.v_proj"].bias == "apart.in_proj_bias"
    for path, linear in found.items():
        part = part_of(linear, net)
        bias = getattr(part, "bias", None)
        assert (bias is None) == (linear.bias is None), path
        if bias is not None:
            known = net.state_dict()[linear.bias][slice(*linear.bias_rows)]
            assert known.equal(bias), path


def test_nothing_can_go_in_the_place_of_the_whole_model() -> None:
    net = nn.MultiheadAttention(4, 2)
    assert not routable(describe_module(net), net)


def deltas(shape: torch.Size) -> dict[str, Delta]:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=draw)
    up = torch.randn(shape[0], 2, generator=draw)
    down = torch.randn(2, shape[1:].numel(), generator=draw)
    return {"dense": Dense(whole), "factors": Factors(up, down, shape),
            "none": Sparse.largest(torch.zeros(shape), 0.0)}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "factors", "none"])
def test_changes_are_the_matrix_that_the_part_multiplies_with(kind: str) -> None:
    net = network()
    state = net.state_dict()
    vectors = TaskVectors(("a",), state, lambda _, name: deltas(state[name].shape)[kind])
    for linear in routable(describe_module(net), net):
        part, (found,) = part_of(linear, net), matrices(linear, vectors)
        assert found.dense().shape == found.shape, linear.module
        assert isinstance(found, {"dense": Dense, "factors": Factors, "none": Sparse}[kind])
        whole = deltas(state[linear.weight].shape)[kind].dense()[slice(*linear.rows)]
        expected = whole.T if linear.in_first else whole.flatten(1)
        torch.testing.assert_close(found.dense(), expected)
        weight: torch.Tensor = part.weight
        assert expected.numel() == weight.numel()


def test_changes_of_biases_are_those_of_the_map() -> None:
    net = network()
    state = net.state_dict()
    vectors = TaskVectors(("a", "b"), state, lambda _, name: Dense(2 * state[name]))
    for linear in routable(describe_module(net), net):
        found = shifts(linear, vectors)
        bias = getattr(part_of(linear, net), "bias", None)
        assert (found is None) == (bias is None)
        assert found is None or all(each.equal(2 * bias) for each in found)
        assert shifts(linear, vectors.select(lambda name: "bias" not in name)) is None

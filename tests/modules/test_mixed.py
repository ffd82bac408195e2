"""Linear maps mixed for every sample: all forms are one map, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules import mixed
from fusewright.modules.deltas import Dense, Factors, Sparse
from fusewright.modules.mixed import MixedLinear, cheapest
from fusewright.modules.mixture import Mixture
from fusewright.modules.routers import Router
from fusewright.modules.stacks import DenseStack, FactorStack, SparseStack, stacked

OUT, EXPERTS, IN, SAMPLES, TOKENS = 7, 3, 6, 4, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def forms() -> dict[str, list]:
    whole = [Dense(draw(OUT, IN, seed=t)) for t in range(EXPERTS)]
    low = [Factors(draw(OUT, 1 + t % 2, seed=t), draw(1 + t % 2, IN, seed=9 + t),
                   torch.Size((OUT, IN))) for t in range(EXPERTS)]  # fmt: skip
    return {"dense": [whole, 1.0], "sparse": [whole, 0.3], "factors": [low, 1.0]}


def layer(kind: str) -> tuple[MixedLinear, torch.Tensor]:
    """A layer, and its deltas (experts, out, in)."""
    deltas, density = forms()[kind]
    stack = stacked(deltas, density, torch.float64)
    assert stack.kind == kind
    kept = [Sparse.largest(d.dense(), density) if density < 1 else d for d in deltas]
    torch.manual_seed(1)
    mixture = Mixture(0, "here", Router(IN, EXPERTS, 0), "sample", None)
    made = MixedLinear(nn.Linear(IN, OUT).double(), stack, draw(EXPERTS, OUT, seed=5), mixture)
    return made, torch.stack([d.dense() for d in kept])


def plain(made: MixedLinear, deltas: torch.Tensor, x: torch.Tensor, w: torch.Tensor):
    weight = made.matrix + torch.einsum("nt,tri->nri", w, deltas)
    bias = made.base.bias + w @ made.shift
    return torch.einsum("nsi,nri->nsr", x, weight.expand(len(x), -1, -1)) + bias[:, None]


@pytest.mark.parametrize("block", [1, 3 * (EXPERTS + 1) * IN * 8, 1 << 20])
@pytest.mark.parametrize("form", ["weights", "outputs", "factors"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "factors"])
@pytest.mark.parametrize("rows", [1, SAMPLES])
def test_every_form_is_the_reference_in_value_and_gradient(
    kind: str, form: str, block: int, rows: int, monkeypatch
) -> None:
    if form == "factors" and kind != "factors":
        pytest.skip("there are no factors")
    monkeypatch.setattr(mixed, "_BLOCK", block)
    monkeypatch.setattr(mixed, "_ROWS", 1)
    monkeypatch.setattr(mixed, "cheapest", lambda *_: form)
    made, deltas = layer(kind)
    x, w = draw(SAMPLES, TOKENS, IN).requires_grad_(), draw(rows, EXPERTS, seed=2).requires_grad_()
    made.mixture.weights = w
    found, expected = made(x), plain(made, deltas, x, w)
    torch.testing.assert_close(found, expected)
    up = draw(SAMPLES, TOKENS, OUT, seed=3)
    for one, two in zip(torch.autograd.grad(found, (x, w), up),
                        torch.autograd.grad(expected, (x, w), up), strict=True):  # fmt: skip
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("form", ["weights", "outputs"])
def test_the_gradient_is_that_of_finite_differences(form: str, monkeypatch) -> None:
    monkeypatch.setattr(mixed, "_BLOCK", 2 * (EXPERTS + 1) * IN * 8)
    monkeypatch.setattr(mixed, "_ROWS", 1)
    made, _ = layer("dense")
    x, w = draw(2, 3, IN).requires_grad_(), draw(2, EXPERTS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: mixed._Mix.apply(x, w, made.matrix, made.stack, form), (x, w)
    )


def test_no_more_than_a_block_is_merged_at_once(monkeypatch) -> None:
    monkeypatch.setattr(mixed, "_BLOCK", 2 * (EXPERTS + 1) * IN * 8)
    monkeypatch.setattr(mixed, "_ROWS", 1)
    sizes = []
    of = mixed._merged
    monkeypatch.setattr(mixed, "_merged", lambda *a: sizes.append(of(*a).numel()) or of(*a))
    made, _ = layer("dense")
    x, w = draw(SAMPLES, TOKENS, IN).requires_grad_(), draw(SAMPLES, EXPERTS).requires_grad_()
    mixed._Mix.apply(x, w, made.matrix, made.stack, "weights").sum().backward()
    assert max(sizes) <= SAMPLES * 2 * IN < SAMPLES * OUT * IN


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 60), st.integers(0, 9), st.data())
def test_a_sparse_stack_gives_any_rows_back(outputs, experts, inputs, seed, data) -> None:
    density = data.draw(st.sampled_from([0.001, 0.02, 0.5, 0.9]))
    whole = [Dense(draw(outputs, inputs, seed=seed + t)) for t in range(experts)]
    stack = stacked(whole, density, torch.float64)
    assert isinstance(stack, SparseStack)
    start = data.draw(st.integers(0, outputs - 1))
    stop = data.draw(st.integers(start + 1, outputs))
    kept = torch.stack([Sparse.largest(d.dense(), density).dense() for d in whole])
    out = draw(experts, stop - start, inputs)
    stack.write(out, start)
    assert out.equal(kept[:, start:stop])
    base, weights = draw(outputs, inputs, seed=seed), draw(experts, seed=seed)
    expected = base + torch.einsum("t,tri->ri", weights, kept)
    torch.testing.assert_close(stack.combined(base, weights), expected)


def test_gaps_of_more_than_a_byte_are_bridged() -> None:
    for places, held in (([0, 255, 256, 511], 4), ([255], 1), ([256], 2), ([0, 256], 3),
                         ([254, 764, 1019], 4), ([511], 3), ([999], 4), ([], 0)):  # fmt: skip
        values = draw(len(places))
        stack = SparseStack.of(values, torch.tensor(places, dtype=torch.int64), (1, 1, 1020))
        assert len(stack.values) == held
        out = stack.whole(torch.float64)
        expected = torch.zeros(1020).double()
        expected[places] = values
        assert out.flatten().equal(expected)


def test_sixteen_bits_stay_and_are_summed_in_32() -> None:
    whole = [Dense(draw(OUT, IN, seed=t).float()) for t in range(EXPERTS)]
    for density in (1.0, 0.4):
        stack = stacked(whole, density, torch.bfloat16)
        assert stack.values.dtype == torch.bfloat16
        mixture = Mixture(0, "here", Router(IN, EXPERTS, 0), "sample", None)
        mixture.weights = draw(2, EXPERTS).float()
        base = nn.Linear(IN, OUT).bfloat16()
        x = draw(2, 3, IN).bfloat16()
        found = MixedLinear(base, stack, None, mixture)(x)
        assert found.dtype == torch.bfloat16
        deltas = stack.whole(torch.float32)
        weight = base.weight.float() + torch.einsum("nt,tri->nri", mixture.weights, deltas)
        expected = torch.einsum("nsi,nri->nsr", x.float(), weight) + base.bias.float()
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
        mixture.weights = mixture.weights[:1]  # one for all, and tokens enough to merge for
        alone = MixedLinear(base, stack, None, mixture)(x[:1].repeat(1, 99, 1))
        torch.testing.assert_close(alone[:, :3].float(), expected[:1], rtol=0.03, atol=0.03)


def test_one_w_for_many_tokens_is_merged_and_single_tokens_are_not() -> None:
    dense = DenseStack(torch.empty(8, 3072, 768))
    assert cheapest(64, 3200, dense) == cheapest(1, 3200, dense) == "weights"
    assert cheapest(64, 64, dense) == "outputs"
    low = FactorStack(torch.empty(8, 3072, 4), torch.empty(8, 4, 768))
    assert cheapest(64, 3200, low) == cheapest(1, 1, low) == "factors"


def test_other_samples_than_were_routed_are_refused() -> None:
    made, _ = layer("dense")
    with pytest.raises(PlanError, match="before its mixture"):
        made(draw(2, TOKENS, IN))
    made.mixture.weights = draw(SAMPLES, EXPERTS)
    with pytest.raises(PlanError, match="other samples"):
        made(draw(2, TOKENS, IN))
    made.mixture.weights = draw(2, EXPERTS)
    with pytest.raises(PlanError, match="other samples"):
        made(draw(SAMPLES, TOKENS, IN))


def test_a_copy_has_a_mixture_of_its_own() -> None:
    made, _ = layer("dense")
    made.mixture.weights = draw(1, EXPERTS).requires_grad_() * 2
    twin = copy.deepcopy(made)
    assert twin.mixture is not made.mixture and twin.mixture.weights is None


def test_padding_has_no_say_and_a_row_of_padding_is_no_number_over_nothing() -> None:
    for depth in (1, 2):
        router = Router(IN, EXPERTS, depth, start=0.3)
        tokens, mask = draw(2, TOKENS, IN).float(), torch.ones(2, TOKENS, dtype=torch.bool)
        mask[0, 2:], mask[1] = False, False
        found = router(tokens, mask)
        torch.testing.assert_close(found[:1], router(tokens[:1, :2]))
        torch.testing.assert_close(found[1], torch.full((EXPERTS,), 0.3))


def test_a_router_is_a_mean_over_tokens_of_what_it_says_of_each() -> None:
    router = Router(IN, EXPERTS, 2)
    tokens = draw(2, TOKENS, IN).float()
    each = torch.stack([router(tokens[:, s : s + 1]) for s in range(TOKENS)])
    torch.testing.assert_close(router(tokens), each.mean(dim=0))
    assert router(tokens).var(dim=0).max() > 0


def test_a_router_of_two_layers_is_its_formula_and_begins_without_hidden_biases() -> None:
    router = Router(IN, EXPERTS, 2, start=0.2, seed=3)
    assert not router.hidden.bias.any() and (router.bias == 0.2).all()
    assert router.weight.equal(Router(IN, EXPERTS, 2, seed=3).weight)
    wide = Router(300, 10, 1).weight.detach()
    assert float(wide.std()) == pytest.approx(0.01, rel=0.1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(draw(*parameter.shape).float())
    tokens = draw(2, TOKENS, IN).float()
    hidden = (tokens @ router.hidden.weight.T + router.hidden.bias).clamp(min=0)
    expected = (hidden @ router.weight.T + router.bias).mean(dim=1)
    torch.testing.assert_close(router(tokens), expected)
    torch.testing.assert_close(router(tokens.bfloat16()), router(tokens.bfloat16().float()))


def test_factors_of_other_ranks_are_padded_and_large_ones_made_whole() -> None:
    for rank, kind in ((2, "factors"), (3, "factors"), (4, "dense")):  # of 7 x 6: below 42 / 13
        low = [Factors(draw(OUT, k, seed=k), draw(k, IN, seed=9 + k), torch.Size((OUT, IN)))
               for k in (1, rank)]  # fmt: skip
        stack = stacked(low, 1.0, torch.float64)
        assert stack.kind == kind
        whole = torch.stack([delta.dense() for delta in low])
        torch.testing.assert_close(stack.whole(torch.float64), whole)
    mixed_forms = [low[0], Dense(whole[1])]
    assert stacked(mixed_forms, 1.0, torch.float64).kind == "dense"
    assert stacked(low[:1], 0.5, torch.float32).kind == "sparse"


def test_a_combined_stack_leaves_the_base_alone() -> None:
    for density in (1.0, 0.3):
        stack = stacked([Dense(draw(OUT, IN))], density, torch.float64)
        base = draw(OUT, IN, seed=1)
        stack.combined(base, torch.ones(1).double())
        assert base.equal(draw(OUT, IN, seed=1))


def test_a_transposed_layer_is_mixed_and_merged_as_it_is_stored() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(draw(IN, OUT)), nn.Parameter(draw(OUT))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    straight, deltas = layer("dense")
    made = MixedLinear(Conv1D(), straight.stack, straight.shift, straight.mixture)
    w, x = draw(2, EXPERTS, seed=2), draw(2, TOKENS, IN)
    made.mixture.weights = w
    torch.testing.assert_close(made(x), plain(made, deltas, x, w))
    for at in range(2):
        tensors = made.merged(w[at])
        assert tensors["weight"].shape == (IN, OUT)
        torch.testing.assert_close(made(x)[at], x[at] @ tensors["weight"] + tensors["bias"])
    straight.mixture.weights = w
    tensors = straight.merged(w[0])
    torch.testing.assert_close(
        straight(x)[0], nn.functional.linear(x[0], tensors["weight"], tensors["bias"])
    )


@pytest.mark.parametrize("form", ["weights", "outputs"])
@pytest.mark.parametrize("kind", ["sparse", "factors"])
def test_rows_that_are_not_held_are_made_a_panel_at_a_time(kind, form, monkeypatch) -> None:
    monkeypatch.setattr(mixed, "_PANEL", 3 * (EXPERTS + (form == "weights")) * IN * 8)
    monkeypatch.setattr(mixed, "_BLOCK", 2 * SAMPLES * IN * 8)
    monkeypatch.setattr(mixed, "_ROWS", 1)
    monkeypatch.setattr(mixed, "cheapest", lambda *_: form)
    made, deltas = layer(kind)
    sizes, write = [], made.stack.write
    monkeypatch.setattr(made.stack, "write", lambda out, start: (
        sizes.append(out.shape[1]), write(out, start)))  # fmt: skip
    x, w = draw(SAMPLES, TOKENS, IN).requires_grad_(), draw(SAMPLES, EXPERTS).requires_grad_()
    made.mixture.weights = w
    found, expected = made(x), plain(made, deltas, x, w)
    torch.testing.assert_close(found, expected)
    up = draw(SAMPLES, TOKENS, OUT, seed=3)
    for one, two in zip(torch.autograd.grad(found, (x, w), up),
                        torch.autograd.grad(expected, (x, w), up), strict=True):  # fmt: skip
        torch.testing.assert_close(one, two)
    assert sizes == [3, 3, 1] * 2
    assert DenseStack(torch.zeros(1, 2, 3).half()).holds(torch.float16)
    assert not DenseStack(torch.zeros(1, 2, 3).half()).holds(torch.float32)


@pytest.mark.parametrize("rows", [1, 2])
def test_what_sixteen_bits_would_lose_is_there_when_weights_are_mixed(rows, monkeypatch) -> None:
    """-512 + (1 + 2**-9) 512 is 1, of which a w in 16 bits leaves nothing."""
    monkeypatch.setattr(mixed, "cheapest", lambda *_: "weights")
    base = nn.Linear(2, 3).bfloat16()
    nn.init.constant_(base.weight, -512)
    nn.init.constant_(base.bias, -512)
    mixture = Mixture(0, "here", Router(2, 1, 0), "sample", None)
    mixture.weights = torch.full((rows, 1), 1 + 2**-9)
    stack = DenseStack(torch.full((1, 3, 2), 512.0).bfloat16())
    made = MixedLinear(base, stack, torch.full((1, 3), 512.0).bfloat16(), mixture)
    assert (made(torch.ones(2, 1, 2).bfloat16()) == 3).all()
    merged = made.merged(mixture.weights[0])
    assert (merged["weight"] == 1).all() and (merged["bias"] == 1).all()

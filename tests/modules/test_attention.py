"""An ``nn.MultiheadAttention`` taken apart is the same; what is replaced can be looked at only."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.attention import INWARD, OUTWARD, OpenAttention, Rows
from fusewright.modules.layer import put_in
from fusewright.modules.routed import RoutedLinear

WIDTH, HEADS, SAMPLES, QUERIES, KEYS = 8, 2, 3, 5, 4
KINDS = {
    "plain": {}, "samples first": {"batch_first": True}, "no bias": {"bias": False},
    "other keys": {"kdim": 4, "vdim": 6}, "own keys": {"add_bias_kv": True, "add_zero_attn": True},
}  # fmt: skip
PADDING = torch.tensor([[False] * 4, [False] * 3 + [True], [False, True, True, False]])
CAUSAL = torch.ones(QUERIES, KEYS).tril().logical_not()
EACH = torch.arange(SAMPLES * HEADS * QUERIES * KEYS).view(-1, QUERIES, KEYS) % 3 == 1
MASKS = {
    "none": {}, "padding": {"key_padding_mask": PADDING}, "causal": {"attn_mask": CAUSAL},
    "numbers": {"attn_mask": CAUSAL * -0.7}, "of each head": {"attn_mask": EACH},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "hint": {"attn_mask": CAUSAL, "is_causal": True},
    "hint and padding": {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "is_causal": True},
}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(**options) -> nn.MultiheadAttention:
    """Every parameter drawn, biases too."""
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed) / 2)
    return made


def inputs(base: nn.MultiheadAttention) -> list[torch.Tensor]:
    found = [draw(SAMPLES, length, width, seed=at) for at, (length, width) in enumerate(
        ((QUERIES, WIDTH), (KEYS, base.kdim), (KEYS, base.vdim)))]  # fmt: skip
    return found if base.batch_first else [x.transpose(0, 1) for x in found]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_torch_does(kind: str, mask: str) -> None:
    base = attention(**KINDS[kind])
    given, made = inputs(base), OpenAttention(base)
    for weights, average in ((False, True), (True, True), (True, False)):
        asked = {**MASKS[mask], "need_weights": weights, "average_attn_weights": average}
        expected, found = base(*given, **asked), made(*given, **asked)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [True, False])
def test_a_text_without_a_batch(weights: bool) -> None:
    base = attention()
    given = [x[:, 0] for x in inputs(base)]
    for mask in ({}, {"key_padding_mask": PADDING[1]}, {"attn_mask": EACH[:HEADS]}):
        asked = {**mask, "need_weights": weights}
        torch.testing.assert_close(OpenAttention(base)(*given, **asked), base(*given, **asked),
                                   rtol=1e-6, atol=1e-6)  # fmt: skip


def test_dropout_is_drawn_in_training_alone() -> None:
    base = attention(dropout=0.5)
    given, made = inputs(base), OpenAttention(base)
    assert made(*given)[0].equal(made(*given)[0])
    made.train()
    for weights in (True, False):
        one, two = (made(*given, need_weights=weights)[0] for _ in range(2))
        assert not torch.allclose(one, two)


def test_its_tensors_stay_those_of_the_attention() -> None:
    base = attention()
    made = OpenAttention(base)
    assert {n.removeprefix("base.") for n in made.state_dict()} == set(base.state_dict())
    assert (made.active, made.added, made.trained) == (0, 0, 0)
    with torch.no_grad():
        base.in_proj_weight.mul_(2)
    assert made.k_proj.weight.equal(base.in_proj_weight[WIDTH : 2 * WIDTH])
    twin, before = copy.deepcopy(made), base.in_proj_bias.clone()
    with torch.no_grad():
        twin.base.in_proj_bias.zero_()
    assert not twin.v_proj.bias.any() and base.in_proj_bias.equal(before)


def routed(base: nn.Module, outputs: int, width: int) -> RoutedLinear:
    up, down, gate = draw(2, outputs, 1), draw(2, 1, width, seed=1), draw(2, 1, width, seed=2)
    return RoutedLinear(base, up, down, gate, None)


class Block(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = attention(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", [*INWARD, OUTWARD])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_in_place_of_each_map_is_asked(name: str, learned: bool, first: bool) -> None:
    model = Block(batch_first=first)
    x = draw(SAMPLES, QUERIES, WIDTH)
    before = model(x)
    layers = {"attn": OpenAttention(model.attn),
              f"attn.{name}": routed(Rows(model.attn, name), WIDTH, WIDTH)}  # fmt: skip
    put_in(model, dict(reversed(layers.items())))
    calls: list[int] = []
    layers[f"attn.{name}"].register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(learned):
        found = model(x)
    assert calls == [1] and not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_an_attention_that_reads_a_layers_weights_is_stopped(training, learned) -> None:
    """It multiplies with its children's weights and never calls them."""
    for first in (True, False):
        model = Block(batch_first=first).train(training)
        put_in(model, {"attn.out_proj": routed(model.attn.out_proj, WIDTH, WIDTH)})
        with torch.set_grad_enabled(learned), pytest.raises(PlanError, match="leave its experts"):
            model(draw(SAMPLES, QUERIES, WIDTH))


def test_a_replaced_layers_weights_can_be_looked_at_and_not_computed_with() -> None:
    base = nn.Linear(WIDTH, 3).bfloat16()
    made, x = routed(base, 3, WIDTH), draw(2, WIDTH)
    weight = made.weight
    assert weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    assert weight.shape == weight.size() == (3, WIDTH) and weight.ndim == weight.dim() == 2
    assert weight.numel() == 24 and len(weight) == 3 and weight.is_floating_point()
    assert weight.requires_grad and isinstance(weight, torch.Tensor)
    assert x.to(weight.dtype).dtype is x.to(weight).dtype is torch.bfloat16
    assert type(x.type_as(weight)) is type(weight.new_zeros(2)) is torch.Tensor
    computed = [
        lambda: nn.functional.linear(x.bfloat16(), weight), lambda: x.bfloat16() @ weight.T,
        lambda: weight.data, lambda: weight + 1, lambda: weight.float(), lambda: weight.sum(),
        lambda: torch.stack([weight]), lambda: weight.copy_(weight), lambda: weight.to("cpu"),
        lambda: weight.tolist(), lambda: weight[0], lambda: torch.equal(weight, base.weight),
        lambda: nn.functional.embedding(torch.tensor([1]), weight), lambda: weight.detach(),
    ]  # fmt: skip
    for each in computed:
        with pytest.raises(PlanError, match=r"weights are read[\s\S]*to be called"):
            each()
    assert made.bias.shape == (3,) and made.in_features == WIDTH


def test_the_shares_of_a_wrong_hint_are_refused() -> None:
    base = attention()
    with pytest.raises(PlanError, match="is_causal"):
        OpenAttention(base)(*inputs(base), is_causal=True)


def test_every_kind_is_told_apart() -> None:
    """What the tests above compare does differ."""
    base = attention(batch_first=True)
    given = inputs(base)
    said = [base(*given, **mask)[0] for mask in MASKS.values() if "is_causal" not in mask]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(said, 2))

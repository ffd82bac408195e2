"""Other weights in a model: as if loaded, without a copy, and gone afterwards."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules import functional_call, with_weights


class Tied(nn.Module):
    """Embedding and head are one; a norm has buffers, one of them is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(words) + self.shift))


WORDS = torch.tensor([0, 3, 6])


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    net = Tied().eval()
    net.norm.running_mean.normal_()
    net.norm.weight.data.normal_()
    return net


def same(model: nn.Module, before: dict[str, Tensor], held: dict[str, int]) -> bool:
    now = dict(model.named_parameters(remove_duplicate=False))
    return {n: id(p) for n, p in now.items()} == held and all(
        torch.equal(model.state_dict()[k], v) for k, v in before.items()
    )


def test_as_if_loaded_and_gone_afterwards() -> None:
    net, other = tied(), tied(1)
    held = {n: id(p) for n, p in net.named_parameters(remove_duplicate=False)}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with with_weights(net, other.state_dict()) as model:
        assert model is net
        assert torch.equal(model(WORDS), other(WORDS))
    assert same(net, before, held)
    assert net.head.weight is net.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_tensor_changes_under_all_its_names(name: str) -> None:
    net, new = tied(), torch.randn(7, 4)
    with with_weights(net, {name: new}):
        assert net.embed.weight is new and net.head.weight is new


def test_ties_given_twice_must_agree() -> None:
    net, new = tied(), torch.randn(7, 4)
    with with_weights(net, {"embed.weight": new, "head.weight": new.clone()}):
        assert net.embed.weight is net.head.weight
    with pytest.raises(PlanError, match=r"embed.weight and head.weight"):
        functional_call(net, {"embed.weight": new, "head.weight": new + 1}, WORDS)


def test_buffers_saved_or_not_are_replaced_too() -> None:
    net, expected = tied(), deepcopy(tied())
    expected.shift.fill_(2)
    expected.norm.running_mean.fill_(1)
    new = {"shift": torch.full((4,), 2.0), "norm.running_mean": torch.ones(4)}
    assert torch.equal(functional_call(net, new, WORDS), expected(WORDS))
    assert not net.shift.any()


def test_a_forward_that_writes_to_buffers_writes_to_those_given() -> None:
    net, own = tied().train(), torch.zeros(4)
    kept = net.norm.running_mean.clone()
    functional_call(net, {"norm.running_mean": own}, WORDS)
    assert own.any() and torch.equal(net.norm.running_mean, kept)


def test_gradients_reach_what_the_weights_are_made_of() -> None:
    net, scale = tied(), torch.tensor(0.5, requires_grad=True)
    start, step = net.embed.weight.detach(), torch.ones(7, 4)
    functional_call(net, {"embed.weight": start + scale * step}, WORDS).sum().backward()
    assert scale.grad is not None and scale.grad != 0
    assert net.embed.weight.grad is None


def test_the_models_own_weights_come_back_after_an_error() -> None:
    net = tied()
    held = {n: id(p) for n, p in net.named_parameters(remove_duplicate=False)}
    with pytest.raises(IndexError):
        functional_call(net, {"embed.weight": torch.ones(7, 4)}, torch.tensor([99]))
    assert same(net, {}, held)


def test_blocks_nest() -> None:
    net, one, two = tied(), torch.randn(4), torch.randn(4)
    with with_weights(net, {"norm.weight": one}):
        with with_weights(net, {"norm.weight": two}):
            assert net.norm.weight is two
        assert net.norm.weight is one


def test_a_module_at_two_places_is_one() -> None:
    one = nn.Linear(2, 2)
    net, new = nn.Sequential(one, one), torch.eye(2)
    with with_weights(net, {"1.weight": new}):
        assert one.weight is new
    assert isinstance(one.weight, nn.Parameter)


def test_an_unknown_name_gets_the_nearest_and_nothing_changes() -> None:
    net = tied()
    with pytest.raises(PlanError, match=r"'norm.weight'"):
        functional_call(net, {"embed.weight": torch.ones(7, 4), "norm.weigth": torch.ones(4)})
    assert isinstance(net.embed.weight, nn.Parameter)


def test_another_shape_is_refused() -> None:
    with pytest.raises(PlanError, match=r"expected: +\(7, 4\)"):
        functional_call(tied(), {"head.weight": torch.ones(4, 7)}, WORDS)


def test_a_language_model_with_the_stored_names_only() -> None:
    """As safetensors holds it: the tied head is absent."""
    config = hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6,
                           pad_token_id=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    one, two = (hf.GPT2LMHeadModel(config).eval() for _ in range(2))
    stored = {k: v for k, v in two.state_dict().items() if k != "lm_head.weight"}
    words = torch.tensor([[1, 2, 3]])
    found = functional_call(one, stored, input_ids=words).logits
    assert torch.equal(found, two(input_ids=words).logits)

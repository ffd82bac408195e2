"""Where a part of a model is routed: what is asked of its inputs, padding, batches and caches."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.mixture import Mixture, Routing, Text, fixed
from fusewright.modules.routers import Router

WIDTH, EXPERTS = 4, 3


class Reader(nn.Module):
    """What is called with text."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, scale=None):
        hidden = torch.sin(input_ids[..., None] * torch.arange(1.0, WIDTH + 1))
        return self.body(hidden)


def loud(router: Router) -> Router:
    with torch.no_grad():
        for at, parameter in enumerate(router.parameters()):
            draw = torch.Generator().manual_seed(at)
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return router


def built(per="sample", depth: int = 1) -> tuple[Reader, Mixture]:
    model = Reader()
    routing = Routing([loud(Router(WIDTH, EXPERTS, depth))])
    mixture = routing.add(model, "body", 0, per)
    routing.listen(model)
    routing.listen(model)
    return model, mixture


IDS = torch.arange(10).reshape(2, 5)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def cache(length: int) -> SimpleNamespace:
    return SimpleNamespace(get_seq_length=lambda: length)


def test_each_sample_is_routed_by_its_own_tokens_without_padding() -> None:
    model, mixture = built()
    model(IDS, attention_mask=MASK)
    both = mixture.weights
    model(IDS[:1, :3])
    torch.testing.assert_close(mixture.weights, both[:1])
    model(IDS[1:])
    torch.testing.assert_close(mixture.weights, both[1:])
    assert not torch.allclose(both[0], both[1])
    model(IDS, attention_mask=MASK[:, None, None])  # of four axes: of pairs
    torch.testing.assert_close(mixture.weights, both)


def test_a_part_is_routed_once_a_call() -> None:
    model, mixture = built()
    calls = []
    mixture.router.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert len(calls) == 1


def test_of_a_batch_it_is_the_mean_and_so_is_what_is_unloaded() -> None:
    each, whole = built(), built("batch")
    for model, _ in (each, whole):
        model(IDS)
    assert whole[1].weights.shape == (1, EXPERTS)
    torch.testing.assert_close(whole[1].weights[0], each[1].weights.mean(dim=0))
    torch.testing.assert_close(each[1].settled(), each[1].weights.mean(dim=0))
    assert not each[1].settled().requires_grad


def test_routers_without_input_are_told_at_once_others_must_be_asked() -> None:
    _, still = built(depth=0)
    assert still.settled().equal(still.router.bias.detach())
    model, mixture = built()
    with pytest.raises(PlanError, match="nothing was routed"):
        mixture.settled()
    with pytest.raises(PlanError, match="before its mixture"):
        mixture.weights_for(torch.zeros(2, 5, WIDTH))
    made = Routing([Router(WIDTH, EXPERTS, 0), Router(WIDTH, EXPERTS, 1)])
    made.add(model, "body", 0, "sample")
    assert fixed(made)
    made.add(model, "body", 1, "sample")
    assert not fixed(made)
    assert [m["router"] for m in made.described()["mixtures"]] == [0, 1]


def test_a_filled_cache_keeps_the_weights_of_its_prompt() -> None:
    model, mixture = built()
    with pytest.raises(PlanError, match="cache is given"):
        model(IDS, past_key_values=cache(4))
    model(IDS, past_key_values=cache(0))
    prompt = mixture.weights
    model(IDS[:, :1] + 20, past_key_values=cache(5))
    assert mixture.weights is prompt
    with pytest.raises(PlanError, match="cache is given"):
        model(IDS[:1], past_key_values=cache(5))
    model(IDS + 20)
    assert not torch.allclose(mixture.weights, prompt)


@pytest.mark.parametrize("inputs", [
    torch.zeros(2, 5, WIDTH + 1), torch.zeros(WIDTH), torch.zeros(2, WIDTH, dtype=torch.long),
])  # fmt: skip
def test_other_inputs_are_refused(inputs: torch.Tensor) -> None:
    _, mixture = built()
    with pytest.raises(PlanError, match=r"routed by tensors[\s\S]*body"):
        mixture.route(nn.Identity(), (inputs,), {})
    mixture.route(nn.Identity(), (torch.ones(2, dtype=torch.long), torch.zeros(2, WIDTH)), {})
    assert mixture.weights.shape == (2, EXPERTS)


def test_a_mask_of_pairs_says_which_tokens_are_padding() -> None:
    model, mixture = built()
    model(IDS, attention_mask=MASK)
    known, real = mixture.weights, MASK.bool()
    pairs = (real[:, None] & real[:, :, None]).tril()[:, None]
    free = torch.nn.functional.pad(pairs, (0, 3))  # a static cache's, with places for more
    added = torch.zeros(free.shape).masked_fill(~free, torch.finfo(torch.float32).min)
    for mask in (free, added, {"full": None, "sliding": free}, real[:, None, None]):
        model(IDS, attention_mask=mask)
        torch.testing.assert_close(mixture.weights, known)
    model(IDS, attention_mask=torch.ones(1, 1, *IDS.shape[1:] * 2).tril() > 0)  # for all samples
    whole = mixture.weights
    model(IDS)
    torch.testing.assert_close(mixture.weights, whole)


def test_masks_of_other_tokens_and_inputs_of_other_samples_are_refused() -> None:
    model, mixture = built()
    with pytest.raises(PlanError, match="of other tokens"):
        model(IDS, attention_mask=MASK[:, :3])
    model(IDS)
    with pytest.raises(PlanError, match="other samples"):
        mixture.weights_for(torch.zeros(3, 5, WIDTH))
    assert mixture.weights_for(torch.zeros(2, 5, WIDTH)) is mixture.weights


def test_a_copy_forgets_what_was_routed_and_hears_its_own_model() -> None:
    model, mixture = built()
    text = Text()
    text.mask = MASK
    assert copy.deepcopy(text).mask is None
    with torch.no_grad():
        model(IDS)
    assert copy.deepcopy(mixture).weights is None and mixture.weights is not None


def test_a_part_may_be_called_by_itself_with_other_samples() -> None:
    model, mixture = built()
    model(IDS)
    model.body(torch.ones(3, 5, WIDTH))
    assert len(mixture.weights) == 3
    model.register_forward_pre_hook(lambda *_: model.body(torch.ones(3, 5, WIDTH)))
    with pytest.raises(PlanError, match=r"other samples[\s\S]*body"):
        model(IDS)
    model.body(torch.ones(3, 5, WIDTH))  # that call has ended, too


def test_what_is_pickled_or_copied_has_forgotten_its_call() -> None:
    text = Text()
    text.mask, text.samples, text.continues, text.running = MASK, 2, True, True
    for again in (copy.deepcopy(text), pickle.loads(pickle.dumps(text, 0))):
        assert vars(again) == vars(Text())

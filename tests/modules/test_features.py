"""One w for a whole model: what is taken of its answer, and when experts sleep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.features import FeatureRouter, FeatureRouting, SharedMixture, features
from fusewright.modules.mixture import Text
from fusewright.modules.routers import Router

N, TOKENS, WIDTH = 2, 4, 3


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text(
    mask: torch.Tensor | None = None, continues: bool = False, samples: int | None = None
) -> Text:
    made = Text()
    made.mask, made.continues, made.samples = mask, continues, samples
    return made


HIDDEN, POOLED, MAPS = draw(N, TOKENS, WIDTH), draw(N, WIDTH), draw(N, WIDTH, 2, 2)
MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])


def said(**parts) -> SimpleNamespace:
    return SimpleNamespace(**{"last_hidden_state": HIDDEN, **parts})


@pytest.mark.parametrize(("output", "of", "expected"), [
    (said(pooler_output=POOLED), None, POOLED),
    (said(pooler_output=MAPS), None, MAPS.mean(dim=(2, 3))),
    (said(pooler_output=None), None, HIDDEN[:, 0]),
    (said(pooler_output=POOLED), text(), HIDDEN.mean(dim=1)),
    (said(), text(MASK), torch.stack([HIDDEN[0, :2].mean(dim=0), torch.zeros(WIDTH)])),
    (HIDDEN, None, HIDDEN.mean(dim=1)),
    ((HIDDEN, POOLED), None, HIDDEN[:, 0]),
    (MAPS, None, MAPS.mean(dim=(2, 3))),
    (POOLED, None, POOLED),
], ids=["pooled", "pooled maps", "first token", "text", "padding", "tokens", "tuple", "maps",
        "rows"])  # fmt: skip
def test_what_is_seen_of_an_answer(output, of, expected) -> None:
    torch.testing.assert_close(features(output, of), expected)


def test_answers_without_features_are_refused() -> None:
    for output in ("words", torch.zeros(3)):
        with pytest.raises(PlanError, match="no features to route by"):
            features(output, None)


def test_a_router_begins_as_even_by_its_seed_and_leaves_other_draws_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, three = (FeatureRouter(WIDTH, 4, seed=seed).eval() for seed in (0, 0, 1))
    assert torch.random.get_rng_state().equal(before)
    assert not one(draw(6, WIDTH)).any()
    assert one.layers[0].weight.equal(two.layers[0].weight)
    assert not one.layers[0].weight.equal(three.layers[0].weight)
    assert one(draw(6, WIDTH).bfloat16()).dtype == torch.float32


class Model(nn.Module):
    """Notes how it is called, and whether experts sleep then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []
        self.asleep: list[bool] = []
        self.mixture: list[SharedMixture] = []

    def forward(self, pixel_values, past_key_values=None, use_cache=True):
        self.asleep += [mixture.asleep for mixture in self.mixture]
        self.calls.append({"past_key_values": past_key_values, "use_cache": use_cache})
        return pixel_values


def built() -> tuple[Model, SharedMixture]:
    model, router = Model(), FeatureRouter(WIDTH, 4).eval()
    with torch.no_grad():
        router.layers[-1].weight.copy_(draw(4, 2 * WIDTH))
    routing = FeatureRouting(model, router)
    routing.listen(model)
    model.mixture.append(routing.mixture)
    return model, routing.mixture


def test_w_is_a_distribution_of_each_samples_features_and_leaves_no_trace() -> None:
    model, mixture = built()
    model(POOLED, past_key_values="held", use_cache=True)
    expected = mixture.router(POOLED).softmax(dim=1).detach()
    torch.testing.assert_close(mixture.weights, expected)
    assert not mixture.weights.requires_grad and not mixture.asleep
    assert model.calls == [{"past_key_values": None, "use_cache": False},
                           {"past_key_values": "held", "use_cache": True}]  # fmt: skip
    assert model.asleep == [True, False]


def test_experts_sleep_inside_and_wake_as_they_were() -> None:
    model, mixture = built()
    model(POOLED)
    with mixture.shared():
        with mixture.shared():
            pass
        assert mixture.weights_for(POOLED) is None
        model(POOLED[:1])  # routes nothing
    assert mixture.weights_for(POOLED) is mixture.weights and len(mixture.weights) == N


def test_features_are_heard_only_inside() -> None:
    model = Model()
    routing = FeatureRouting(model, Router(WIDTH, 4, 0))
    for _ in range(2):
        with routing.heard(model) as found:
            model(POOLED)
            model(HIDDEN)
        model(POOLED)
        assert len(found) == 2
        torch.testing.assert_close(found[1], HIDDEN.mean(dim=1))


def test_beams_have_the_weights_of_their_text_and_others_are_refused() -> None:
    _, mixture = built()
    w = mixture.weights = draw(N, 4)
    assert mixture.shared_by(draw(1, WIDTH)) is w
    for rows in (1, 3 * N):
        with pytest.raises(PlanError, match="other samples"):
            mixture.weights_for(draw(rows, WIDTH))
    beams = text(continues=True, samples=3 * N)
    for mixture.text, mixture.others in ((beams, ()), (text(samples=N), (beams,))):
        assert mixture.weights_for(draw(3 * N, WIDTH)).equal(w[[0, 0, 0, 1, 1, 1]])
        for rows in (3, 2 * N):
            with pytest.raises(PlanError, match="other samples"):
                mixture.weights_for(draw(rows, WIDTH))
    mixture.text, mixture.others = beams, ()
    mixture.route(nn.Identity(), (draw(N, WIDTH),), {})
    assert mixture.weights is w
    with pytest.raises(PlanError, match="cache is given"):
        mixture.route(nn.Identity(), (draw(3, WIDTH),), {})


def test_a_router_without_input_says_w_itself() -> None:
    model = Model()
    routing = FeatureRouting(model, Router(WIDTH, 4, 0, start=0.7))
    routing.listen(model)
    model(POOLED)
    assert routing.mixture.weights.tolist() == [[pytest.approx(0.7)] * 4] and len(model.calls) == 1

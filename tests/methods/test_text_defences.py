"""DAM, AWM and SAU on texts: a perturbation of the embeddings of tokens, every step by hand."""

from __future__ import annotations

import pytest
import torch
from learned_toys import Killed, experts, network, stop_at
from torch import nn
from torch.func import functional_call

import fusewright as fw
from fusewright.errors import PlanError
from fusewright.methods.learned import AWM, DAM, SAU
from fusewright.methods.learned._attack import UniversalAttack
from fusewright.methods.learned._surfaces import surface_of
from fusewright.methods.learned.objectives import cross_entropy
from fusewright.modules.perturbations import Ball
from fusewright.tasks.adaptation import adaptation

HALF = torch.float64
QUICK = {"steps": 4, "batch": 8, "rate": 0.3, "radius": 0.8, "attack_rate": 0.5}
METHODS = {"dam": DAM(**QUICK, alpha=0.5, every=2), "awm": AWM(**QUICK, every=2),
           "sau": SAU(**QUICK, attack_steps=2, shared=2.0, every=2)}  # fmt: skip


class Texts(nn.Module):
    """Classes of 5 tokens of 12, their embeddings of width 6 averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(HALF)
        self.table = nn.Embedding(12, 6, dtype=HALF)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def read(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.net((2 * vectors).tanh().mean(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.read(self.table(ids))


class Read(nn.Module):
    """The same, asked with a change of embeddings."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        self.texts = texts

    def forward(self, ids: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return self.texts.read(self.texts.table(ids) + delta)


def batches() -> dict[str, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return {n: [torch.randint(12, (8, 5), generator=draw) for _ in range(4)] for n in "ab"}


def merged(method, **options):
    base = Texts()
    given = {} if isinstance(method, str) else {"data": batches()}
    return fw.merge(method, base=base, experts=experts(base, 0.4), **given, **options)


def awm_by_hand(method: AWM) -> dict[str, torch.Tensor]:
    """Whole tensors, plain autograd, the change of embeddings as an argument."""
    base = Texts()
    models, ball, read = experts(base, 0.4), Ball(method.norm, method.radius), Read(base)
    start = {n: t.detach() for n, t in base.named_parameters()}
    tau = {n: sum(0.3 * (dict(e.named_parameters())[n].detach() - t) for e in models.values())
           for n, t in start.items()}  # fmt: skip
    masks = {n: torch.ones(t.shape).requires_grad_() for n, t in start.items()}
    unit = start["table.weight"].square().mean().sqrt()
    delta = {t: torch.zeros(1, 1, 6, dtype=HALF) for t in "ab"}
    adam = torch.optim.Adam(masks.values(), lr=method.rate)
    for step in range(method.steps):
        tensors = {f"texts.{n}": t + masks[n] * tau[n] for n, t in start.items()}
        under = lambda ids, d, tensors=tensors: functional_call(  # noqa: E731
            read, tensors, (ids, unit * d)
        )
        total = torch.zeros((), dtype=HALF)
        for task in "ab":
            ids = batches()[task][step % 4]
            clean = under(ids, torch.zeros(1, 1, 6))
            said = clean.argmax(-1)
            leaf = delta[task].clone().requires_grad_()
            gain = cross_entropy(under(ids, leaf), said)
            (gradient,) = torch.autograd.grad(gain, leaf, retain_graph=True)
            delta[task] = ball.ascended(leaf.detach(), gradient, method.attack_rate)
            total = total + cross_entropy(clean, models[task](ids).argmax(-1))
            total = total + method.alpha * cross_entropy(under(ids, delta[task]), said)
        adam.zero_grad()
        total.backward()
        for mask in masks.values():
            mask.grad.add_(method.gamma)
        adam.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {n: t + masks[n].detach() * tau[n] for n, t in start.items()}


def test_every_step_is_that_of_plain_autograd() -> None:
    method = METHODS["awm"]
    found = merged(method).state_dict()
    for name, tensor in awm_by_hand(method).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    weaker = awm_by_hand(method.model_copy(update={"radius": 0.01}))
    assert not torch.allclose(found["net.0.weight"], weaker["net.0.weight"], atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_defence_of_texts_is_repeatable_and_goes_on_after_a_kill(name: str, tmp_path) -> None:
    method, plain = METHODS[name], merged("task_arithmetic").state_dict()
    whole = merged(method).state_dict()
    with pytest.raises(Killed):
        merged(method, out=tmp_path / "out", progress=stop_at(4))
    seen = []
    again = merged(method, out=tmp_path / "out", progress=seen.append).state_dict()
    assert next(now.done for now in seen if now.unit == "steps") > 1
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())
    assert not torch.allclose(whole["net.0.weight"], plain["net.0.weight"], atol=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("aim", ["away", "toward"])
def test_one_change_of_all_tokens_ascends_within_its_ball(norm: str, aim: str) -> None:
    base, questions, ids = Texts(), adaptation(batches()).questions, batches()["a"][0]
    attack = UniversalAttack(base, questions, Ball(norm, 0.9), aim, 0.2, 0)
    clean = base(ids).detach()
    said = clean.argmax(-1) if aim == "away" else torch.full((8,), 2)
    losses = []
    for _ in range(12):
        losses.append(float(cross_entropy(attack.logits(base, "a", ids, 2).detach(), said)))
        attack.ascend(base, "a", ids, clean, 2)
    held = attack.delta("a", 2)
    assert held.shape == (1, 1, 6) and float(Ball(norm, 0.9).size(held)) > 0.5
    assert (Ball(norm, 0.9).size(held) <= 0.9 * (1 + 1e-6)).all()
    grown = losses[-1] - losses[0]
    assert grown > 0.01 if aim == "away" else grown < -0.01


def test_each_text_can_have_a_change_of_its_own_and_no_other_number_of_them() -> None:
    base, questions, ids = Texts(), adaptation(batches()).questions, batches()["a"][0]
    surface = surface_of("a", questions["a"], base)
    delta = surface.start(base, ids)
    assert delta.shape == (8, 1, 6) and delta.dtype == HALF and not delta.any()
    delta[3] = 1.0
    moved = (surface.logits(base, ids, delta) - base(ids)).detach().abs().amax(1)
    assert moved[3] > 1e-3 and moved.count_nonzero() == 1
    with pytest.raises(PlanError, match="other rows"):
        surface.logits(base, ids, delta[:3])


def test_inputs_that_are_no_tokens_are_refused_with_a_way_out() -> None:
    base = Texts()
    vectors = {n: [torch.zeros(8, 5, 6, dtype=HALF)] for n in "ab"}
    heads = dict.fromkeys("ab", lambda model, batch: model.read(batch))
    for method in METHODS.values():
        with pytest.raises(PlanError, match="Pictures"):
            fw.merge(method, base=base, experts=experts(base), data=vectors, heads=heads)

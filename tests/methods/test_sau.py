"""SAU as a mask over a merge's task vector: every step by hand, and its three terms."""

from __future__ import annotations

import pytest
import torch
from learned_toys import experts, network
from torch import nn
from torch.func import functional_call

import fusewright as fw
from fusewright.errors import PlanError
from fusewright.methods.learned import SAU
from fusewright.methods.learned._sau import divergence, shared_gain, unlearned
from fusewright.methods.learned.objectives import cross_entropy
from fusewright.modules.perturbations import Ball, added
from fusewright.tasks.adaptation import adaptation
from fusewright.tasks.pictures import Pictures

HALF = torch.float64
WHERE = Pictures(None, (0.5,), (0.5,))
METHOD = SAU(steps=4, batch=8, rate=0.3, radius=0.3, attack_rate=0.5, shared=2.0, every=2)
LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.5, 0.1, 0.0]])
OTHERS = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.5], [0.0, 0.2, 0.1]])


def base_of() -> nn.Module:
    """Pictures of 1 x 2 x 3 pixels."""
    return nn.Sequential(nn.Flatten(), *network(HALF))


def batches() -> dict[str, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return {n: [2 * torch.rand(8, 1, 2, 3, generator=draw, dtype=HALF) - 1 for _ in range(4)]
            for n in "ab"}  # fmt: skip


def merged(method, **options):
    base = base_of()
    given = {} if isinstance(method, str) else {"data": adaptation(batches(), pictures=WHERE)}
    return fw.merge(method, base=base, experts=experts(base), **given, **options)


def same(one, two) -> bool:
    other = two.state_dict()
    return all(tensor.equal(other[name]) for name, tensor in one.state_dict().items())


def test_divergence_is_that_of_the_definition() -> None:
    p, q = LOGITS.softmax(1), OTHERS.softmax(1)
    by_hand = [sum(0.5 * a * torch.log(2 * a / (a + b)) + 0.5 * b * torch.log(2 * b / (a + b))
                   for a, b in zip(one, two, strict=True)) for one, two in zip(p, q, strict=True)]
    torch.testing.assert_close(divergence(LOGITS, OTHERS), torch.stack(by_hand))
    assert divergence(LOGITS, LOGITS).abs().max() < 1e-6


def test_the_attack_wants_both_fooled_alike() -> None:
    """Item 0 fools the merge before alone, item 1 both into one class, item 2 the one before."""
    said = torch.tensor([0, 2, 0])
    ce = torch.nn.functional.cross_entropy
    right = ce(LOGITS[[0, 2]], said[[0, 2]], reduction="sum")
    apart = divergence(LOGITS, OTHERS)[[0, 2]].sum()
    found = shared_gain(LOGITS, OTHERS, said, 0.4, 0.7)
    torch.testing.assert_close(found, (0.4 * right / 2 - 0.7 * apart) / 3)
    free = shared_gain(LOGITS[1:2], OTHERS[1:2], said[1:2], 0.4, 0.7)
    assert float(free) == 0


def test_what_fooled_the_merge_before_is_unlearned() -> None:
    said, fooled = torch.tensor([0, 1, 0]), torch.tensor([1, 1, 2])
    p = LOGITS.softmax(1)
    by_hand = -(torch.log(1 - p[0, 1]) + torch.log(1 - p[2, 2])) / 3
    torch.testing.assert_close(unlearned(LOGITS, said, fooled), by_hand, atol=1e-5, rtol=1e-5)
    assert float(unlearned(LOGITS, fooled, fooled)) == 0


def test_tokens_are_items_of_their_own() -> None:
    said, fooled = torch.tensor([0, 2, 0, 0, 1, 0]), torch.tensor([1, 1, 2, 1, 1, 2])
    after, before = torch.cat([LOGITS, OTHERS]), torch.cat([OTHERS, LOGITS])
    rows = [x.unflatten(0, (2, 3)) for x in (after, before, said, fooled)]
    assert shared_gain(*rows[:3], 0.4, 0.7).equal(shared_gain(after, before, said, 0.4, 0.7))
    assert unlearned(rows[0], *rows[2:]).equal(unlearned(after, said, fooled))


def test_classes_of_tokens_are_unlearned() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = hf.BertForTokenClassification(hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=50, num_labels=4)).eval()  # fmt: skip
    ids = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, 5:] = 0
    few = {"input_ids": ids[:, :2]}  # fewer tokens than classes to aim at
    for method, batch in ((SAU(steps=1), {"input_ids": ids}), (fw.DAM(steps=8, aim="toward"), few),
                          (SAU(steps=1), {"input_ids": ids, "attention_mask": mask})):  # fmt: skip
        found = fw.merge(method, base=base, experts=experts(base, 0.01),
                         data={n: [batch] for n in "ab"})  # fmt: skip
        assert all(tensor.isfinite().all() for tensor in found.state_dict().values())


def by_hand(method: SAU) -> tuple[dict[str, torch.Tensor], int]:
    """Whole tensors, plain autograd; and how many pictures fooled the merge as it was."""
    base, models = base_of(), experts(base_of())
    start = {n: t.detach() for n, t in base.named_parameters()}
    tau = {n: sum(0.3 * (dict(e.named_parameters())[n].detach() - t) for e in models.values())
           for n, t in start.items()}  # fmt: skip
    first = {n: t + tau[n] for n, t in start.items()}
    masks = {n: torch.ones(t.shape).requires_grad_() for n, t in start.items()}
    adam, ball = torch.optim.Adam(masks.values(), lr=method.rate), Ball("l2", method.radius)
    count = 0
    for step in range(method.steps):
        tensors = {n: t + masks[n] * tau[n] for n, t in start.items()}
        fixed = {n: t.detach() for n, t in tensors.items()}
        total = torch.zeros((), dtype=HALF)
        for task in "ab":
            x = batches()[task][step % 4]
            said = functional_call(base, first, (x,)).argmax(-1)
            delta = torch.zeros_like(x)
            under = lambda d, x=x: WHERE.changed(x, added(WHERE.raw(x), d))  # noqa: E731
            for _ in range(method.attack_steps):
                leaf = delta.clone().requires_grad_()
                gain = shared_gain(functional_call(base, fixed, (under(leaf),)),
                                   functional_call(base, first, (under(leaf),)), said,
                                   method.adversarial, method.similar)  # fmt: skip
                (gradient,) = torch.autograd.grad(gain, leaf)
                delta = ball.ascended(leaf.detach(), gradient, method.attack_rate)
            fooled = functional_call(base, first, (under(delta),)).argmax(-1)
            count += int((fooled != said).sum())
            total = total + cross_entropy(functional_call(base, tensors, (x,)),
                                          models[task](x).argmax(-1))  # fmt: skip
            answers = functional_call(base, tensors, (under(delta),))
            total = total + method.shared * unlearned(answers, said, fooled)
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {n: t + masks[n].detach() * tau[n] for n, t in start.items()}, count


@pytest.mark.parametrize("method", [
    METHOD, METHOD.model_copy(update={"adversarial": 0.5, "similar": 0.5}),
], ids=["paper", "dam"])  # fmt: skip
def test_every_step_is_that_of_plain_autograd(method) -> None:
    found, (wanted, fooled) = merged(method).state_dict(), by_hand(method)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    assert fooled, "no picture is fooled: the test sees little"
    without = merged(method.model_copy(update={"shared": 0.0})).state_dict()
    assert not torch.allclose(found["1.weight"], without["1.weight"], atol=1e-4)


def test_a_defence_that_learned_nothing_is_the_merge() -> None:
    plain = merged("task_arithmetic").state_dict()
    for name, tensor in merged(SAU(steps=0)).state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)


def test_what_is_no_picture_is_refused() -> None:
    base = base_of()
    with pytest.raises(PlanError, match="Pictures"):
        fw.merge(METHOD, base=base, experts=experts(base), data=batches())


def test_a_killed_fit_goes_on_to_the_same_end(tmp_path) -> None:
    whole = merged(METHOD)
    assert same(merged(METHOD), whole) and 0 < whole.report["fitted"]["mask"]["mean"] < 1

    def stop(now) -> None:
        if now.unit == "steps" and now.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(METHOD, out=tmp_path / "out", progress=stop)
    seen = []
    again = merged(METHOD, out=tmp_path / "out", progress=seen.append)
    assert same(again, whole)
    assert next(now.done for now in seen if now.unit == "steps") == 3

"""DAM and the other defences of merges: small pictures, two experts, every step by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from learned_toys import experts, moved, network
from torch import nn
from torch.func import functional_call

import fusewright as fw
from fusewright.errors import PlanError
from fusewright.methods.learned import ANP, AWM, DAM, Concrete
from fusewright.methods.learned._attack import UniversalAttack
from fusewright.methods.learned._pruning import PlainMasks
from fusewright.methods.learned.objectives import cross_entropy, entropy
from fusewright.methods.learned.processes import Processes
from fusewright.modules.masks import ConcreteMasks, ProductMasks
from fusewright.modules.perturbations import Ball, added
from fusewright.tasks.adaptation import adaptation
from fusewright.tasks.errors import DataError
from fusewright.tasks.pictures import Pictures

HALF = torch.float64
WHERE = Pictures(None, (0.5,), (0.5,))
QUICK = {"steps": 4, "batch": 8, "rate": 0.05, "guard": 0}
MASKED = {"alpha": 0.5, "radius": 0.2}


def base_of() -> nn.Module:
    """Pictures of 1 x 2 x 3 pixels."""
    return nn.Sequential(nn.Flatten(), *network(HALF))


def batches() -> dict[str, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return {n: [2 * torch.rand(8, 1, 2, 3, generator=draw, dtype=HALF) - 1 for _ in range(4)]
            for n in "ab"}  # fmt: skip


def merged(method):
    base = base_of()
    given = {} if isinstance(method, str) else {"data": adaptation(batches(), pictures=WHERE)}
    return fw.merge(method, base=base, experts=experts(base), **given)


def same(one, two) -> bool:
    other = two.state_dict()
    return all(tensor.equal(other[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("form", ["task_arithmetic", "adamerging"])
def test_without_a_weight_on_safety_it_is_concrete(form: str) -> None:
    settings = {**QUICK, "form": form, "weight_steps": 2}
    plain = merged(Concrete(**settings))
    assert same(merged(DAM(**settings, alpha=0)), plain)
    assert not same(merged(DAM(**settings, **MASKED)), plain)


def test_what_is_no_picture_is_refused_with_a_way_out() -> None:
    base = base_of()
    for method in (DAM(**QUICK), AWM(steps=1)):
        with pytest.raises(PlanError, match=r"no|none") as found:
            fw.merge(method, base=base, experts=experts(base), data=batches())
        assert "Pictures(" in str(found.value)
    ids = {n: [{"input_ids": torch.arange(8)}] for n in "ab"}
    with pytest.raises(DataError, match="pictures"):
        WHERE.raw(ids["a"][0])


@pytest.mark.parametrize("detection", [True, False])
@pytest.mark.parametrize("form", ["task_arithmetic", "adamerging"])
def test_the_same_seed_gives_the_same_end(form: str, detection: bool) -> None:
    method = DAM(**QUICK, **MASKED, form=form, detection=detection, weight_steps=1)
    assert same(merged(method), merged(method))


def kept_attack(monkeypatch, method) -> UniversalAttack:
    kept = []
    real = UniversalAttack.__init__
    monkeypatch.setattr(UniversalAttack, "__init__",
                        lambda self, *a: (real(self, *a), kept.append(self))[0])  # fmt: skip
    merged(method)
    return kept[0]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("aim", ["away", "toward"])
def test_the_perturbation_moves_and_stays_in_its_ball(monkeypatch, norm, aim) -> None:
    settings = {**QUICK, "steps": 12, "attack_rate": 0.9}
    method = DAM(**settings, alpha=0.5, norm=norm, aim=aim, radius=0.07)
    attack = kept_attack(monkeypatch, method)
    for task in "ab":
        held = getattr(attack, attack._at[task])
        assert len(held) == (4 if aim == "toward" else 1)
        sizes = Ball(norm, 0.07).size(held)
        assert (sizes <= 0.07 * (1 + 1e-6)).all() and float(sizes.max()) > 0.05


def test_an_attack_ascends_what_it_is_aimed_at() -> None:
    base, given = base_of(), adaptation(batches(), pictures=WHERE).questions
    batch = batches()["a"][0]
    for aim in ("away", "toward"):
        attack = UniversalAttack(base, given, Ball("l2", 0.5), aim, 0.2, 0)
        clean = base(batch).detach()
        before = attack.logits(base, "a", batch, 2)
        for _ in range(20):
            attack.ascend(base, "a", batch, clean, 2)
        after = attack.logits(base, "a", batch, 2)
        if aim == "away":
            said = clean.argmax(-1)
            assert cross_entropy(after, said) > cross_entropy(before, said) + 0.01
        else:
            two = torch.full((8,), 2)
            assert cross_entropy(after, two) < cross_entropy(before, two) - 0.01
            assert not attack.delta("a", 1).any() and attack.delta("a", 6).any()


def test_a_fit_with_one_mask_is_that_of_plain_autograd(monkeypatch) -> None:
    kept = {}
    real = ConcreteMasks.share
    monkeypatch.setattr(ConcreteMasks, "share", lambda self: kept.update(masks=self) or real(self))
    method = DAM(**QUICK, **MASKED, detection=False, attack_rate=0.5)
    merged(method)
    found = {n: x.detach() for n, x in zip(kept["masks"]._at, kept["masks"].logits, strict=True)}
    expected = reference(method)
    assert max(float(x.detach().abs().max()) for x in expected.values()) > 0.05
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.detach(), rtol=1e-3, atol=1e-4)


def reference(method: DAM) -> dict[str, torch.Tensor]:
    """One mask, task arithmetic, δ away from the answers; whole tensors and no shortcut."""
    base, ball = base_of(), Ball(method.norm, method.radius)
    start = {n: t.detach() for n, t in base.named_parameters()}
    total = {n: sum(0.3 * (dict(e.named_parameters())[n].detach() - t)
                    for e in experts(base).values()) for n, t in start.items()}  # fmt: skip
    masks = ConcreteMasks({n: t.shape for n, t in start.items()}, seed=0)
    delta = {t: torch.zeros(1, 1, 2, 3, dtype=HALF) for t in "ab"}
    adam = torch.optim.Adam(masks.parameters(), lr=method.rate)

    def answers(tensors, x, d):
        return functional_call(base, tensors, (WHERE.changed(x, added(WHERE.raw(x), d)),))

    for step in range(method.steps):
        tensors = {n: t + masks.drawn(n, step) * total[n] for n, t in start.items()}
        loss = torch.zeros((), dtype=HALF)
        for task, each in batches().items():
            x = each[step % 4]
            clean = functional_call(base, tensors, (x,))
            said = clean.argmax(-1).detach()
            leaf = delta[task].clone().requires_grad_()
            gain = cross_entropy(answers(tensors, x, leaf), said)
            (gradient,) = torch.autograd.grad(gain, leaf, retain_graph=True)
            delta[task] = ball.ascended(delta[task], gradient, method.attack_rate)
            safe = cross_entropy(answers(tensors, x, delta[task]), said)
            loss = loss + entropy(clean) + method.alpha * safe
        adam.zero_grad()
        loss.backward()
        adam.step()
    return dict(zip(masks._at, masks.logits, strict=True))


def test_masks_are_learned_in_turn(monkeypatch) -> None:
    kept = {}
    real = ProductMasks.share
    monkeypatch.setattr(ProductMasks, "share", lambda self: kept.update(masks=self) or real(self))

    def logits(steps: int) -> list[torch.Tensor]:
        merged(DAM(**{**QUICK, "steps": steps}, **MASKED))
        both = kept["masks"]
        return [torch.cat([x.detach().flatten() for x in m.logits])
                for m in (both.first, both.second)]  # fmt: skip

    found = [logits(steps) for steps in range(4)]
    changed = [[not one.equal(two) for one, two in zip(*pair, strict=True)]
               for pair in pairwise(found)]  # fmt: skip
    assert changed == [[True, False], [False, True], [True, False]]


def test_what_is_safe_is_safe_under_the_perturbation_that_has_just_moved(monkeypatch) -> None:
    rounds: dict[str, list] = {"ascend": [], "logits": []}
    for name, seen in rounds.items():
        real = getattr(UniversalAttack, name)
        monkeypatch.setattr(UniversalAttack, name, lambda self, *args, real=real, seen=seen: (
            seen.append((args[1], args[-1])), real(self, *args))[1])  # fmt: skip
    merged(DAM(**{**QUICK, "steps": 6}, **MASKED, aim="toward"))
    expected = [(task, round) for round in range(3) for task in "ab"]
    assert rounds == {"ascend": expected, "logits": expected}


def test_every_class_is_attacked_in_turn(monkeypatch) -> None:
    attack = kept_attack(monkeypatch, DAM(**{**QUICK, "steps": 8}, **MASKED, aim="toward"))
    assert all(bool(attack.delta(task, round).any()) for task in "ab" for round in range(4))


def test_each_process_takes_the_others_perturbations() -> None:
    """So that a killed fit goes on with all of them, whoever kept the checkpoint."""
    base, given = base_of(), adaptation(batches(), pictures=WHERE).questions
    attack = UniversalAttack(base, given, Ball("l2", 1.0), "away", 0.1, 0)
    others = torch.full_like(attack.delta("b"), 0.5)

    class Second(Processes):
        def gathered(self, found, tasks):
            assert list(found) == ["a"] and list(tasks) == ["a", "b"]
            return {**found, "b": others}

    attack.delta("a").fill_(0.25)
    attack.gather(Second(0, 2))
    assert attack.delta("b").equal(others) and attack.delta("a").eq(0.25).all()


def test_what_is_said_under_a_perturbation_is_of_that_class() -> None:
    base, given = base_of(), adaptation(batches(), pictures=WHERE).questions
    attack = UniversalAttack(base, given, Ball("l2", 0.5), "toward", 0.2, 0)
    batch = batches()["a"][0]
    attack.ascend(base, "a", batch, base(batch), 6)
    changed = WHERE.changed(batch, added(WHERE.raw(batch), attack.delta("a", 2)))
    assert attack.logits(base, "a", batch, 2).equal(base(changed))
    assert not attack.logits(base, "a", batch, 2).equal(base(batch))
    torch.testing.assert_close(attack.logits(base, "a", batch, 1), base(batch))


def test_two_masks_are_two_draws() -> None:
    masks = DAM(**QUICK).new_masks({"w": torch.Size((50, 4))}, {}, 3)
    assert isinstance(masks, ProductMasks)
    assert not masks.first.drawn("w", 0).equal(masks.second.drawn("w", 0))
    shapes = {"w": torch.Size((50, 4))}
    both = ProductMasks(ConcreteMasks(shapes, seed=3), ConcreteMasks(shapes, seed=-4))
    one, two = both.first.drawn("w", 0), both.second.drawn("w", 0)
    assert both.drawn("w", 0).equal(one * two) and not one.equal(two)
    torch.testing.assert_close(both.expected("w"), torch.ones(50, 4))


@pytest.mark.parametrize("method", [
    DAM(**{**QUICK, "steps": 9, "every": 2}, **MASKED),
    AWM(**{**QUICK, "steps": 9, "every": 2}, radius=0.2),
], ids=["dam", "awm"])  # fmt: skip
def test_a_killed_fit_goes_on_to_the_same_end(method, tmp_path) -> None:
    base = base_of()
    given = {"base": base, "experts": experts(base),
             "data": adaptation(batches(), pictures=WHERE)}  # fmt: skip
    whole = fw.merge(method, **given)

    def stop(now) -> None:
        if now.done == 6 and now.total == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fw.merge(method, out=tmp_path / "out", progress=stop, **given)
    steps = []
    again = fw.merge(method, out=tmp_path / "out", progress=lambda now: steps.append(now.done),
                     **given)  # fmt: skip
    assert min(steps) > 4 and same(again, whole)


@pytest.mark.parametrize("method", [ANP(steps=0, threshold=0.0), AWM(steps=0)],
                         ids=["anp", "awm"])  # fmt: skip
def test_a_defence_that_learned_nothing_is_the_merge(method) -> None:
    base = base_of()
    plain = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    for name, tensor in merged(method).state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)


def test_pruned_rows_are_the_bases_and_others_the_merges() -> None:
    found = merged(ANP(steps=6, batch=8, rate=0.2, threshold=0.6))
    base = base_of()
    plain = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    start, end = base.state_dict(), found.state_dict()
    rows = [(end["1.weight"][i], start["1.weight"][i], plain["1.weight"][i]) for i in range(8)]
    pruned = [torch.allclose(one, zero, atol=1e-7) for one, zero, _ in rows]
    assert any(pruned) and not all(pruned)
    assert all(torch.allclose(one, other, atol=1e-6)
               for (one, _, other), gone in zip(rows, pruned, strict=True) if not gone)  # fmt: skip
    assert 0 < found.report["fitted"]["mask"]["pruned"] < 1


def test_adversarial_weight_masking_lowers_masks_and_keeps_them_masks() -> None:
    report = merged(AWM(steps=6, batch=8, rate=0.2)).report["fitted"]
    assert 0 < report["mask"]["mean"] < 1
    base = base_of()
    end, start = merged(AWM(steps=6, batch=8, rate=0.2)).state_dict(), base.state_dict()
    plain = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    ratio = (end["1.weight"] - start["1.weight"]) / (plain["1.weight"] - start["1.weight"])
    assert float(ratio.min()) > -1e-3 and float(ratio.max()) < 1 + 1e-3


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_it_runs_on_models_of_the_library(family: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = hf.ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4,
                              num_labels=3)  # fmt: skip
        base = hf.ViTForImageClassification(config).eval()
    else:
        config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3,
                                 layer_type="basic")  # fmt: skip
        base = hf.ResNetForImageClassification(config).eval()
    pixels = {"pixel_values": torch.rand(4, 3, 8, 8) * 2 - 1}
    data = adaptation({n: [pixels] for n in "ab"}, pictures=Pictures(mean=(0.5,), std=(0.5,)))
    models = {n: moved(base, seed, 0.02) for seed, n in enumerate("ab")}
    found = fw.merge(DAM(steps=3, batch=4, rate=0.05), base=base, experts=models, data=data)
    assert all(t.isfinite().all() for t in found.state_dict().values())


def pruning(method) -> dict[str, torch.Tensor]:
    """What ANP (before it cuts) and AWM make of the merge: whole tensors, plain autograd."""
    base, models = base_of(), experts(base_of())
    start = {n: t.detach() for n, t in base.named_parameters()}
    tau = {n: sum(0.3 * (dict(e.named_parameters())[n].detach() - t) for e in models.values())
           for n, t in start.items()}  # fmt: skip
    rows = method.name == "anp"
    masks = {n: torch.ones((len(t), *[1] * (t.dim() - 1)) if rows else t.shape).requires_grad_()
             for n, t in start.items()}  # fmt: skip
    delta = {t: torch.zeros(1, 1, 2, 3, dtype=HALF) for t in "ab"}
    adam = torch.optim.Adam(masks.values(), lr=method.rate)

    def loss(held, task: str, number: int, raised: bool) -> torch.Tensor:
        x = batches()[task][number % 4]
        tensors = {n: t + held[n] * tau[n] for n, t in start.items()}
        answers = lambda x: functional_call(base, tensors, (x,))  # noqa: E731
        found = cross_entropy(answers(x), models[task](x).argmax(-1))
        if not raised:
            return found
        said = answers(x).argmax(-1).detach()
        under = lambda d: cross_entropy(  # noqa: E731
            answers(WHERE.changed(x, added(WHERE.raw(x), d))), said
        )
        leaf = delta[task].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(under(leaf), leaf, retain_graph=True)
        delta[task] = Ball(method.norm, method.radius).ascended(leaf.detach(), gradient,
                                                                method.attack_rate)  # fmt: skip
        return found + method.alpha * under(delta[task])

    def slopes(held, number: int, raised: bool = False) -> list[torch.Tensor]:
        total = sum(loss(held, task, number, raised) for task in "ab")
        return list(torch.autograd.grad(total, list(masks.values())))

    for step in range(method.steps):
        if rows:
            one = slopes(masks, step)
            moved = {n: m + method.budget * g.sign()
                     for (n, m), g in zip(masks.items(), one, strict=True)}  # fmt: skip
            two = slopes(moved, step)
            share = method.tradeoff
            found = [share * g + (1 - share) * h for g, h in zip(one, two, strict=True)]
        else:
            found = [g + method.gamma for g in slopes(masks, step, raised=True)]
        for mask, gradient in zip(masks.values(), found, strict=True):
            mask.grad = gradient
        adam.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {n: t + masks[n].detach() * tau[n] for n, t in start.items()}


@pytest.mark.parametrize("method", [
    ANP(steps=4, batch=8, rate=0.3, tradeoff=0.3), AWM(steps=4, batch=8, rate=0.3, gamma=0.02),
], ids=["anp", "awm"])  # fmt: skip
def test_a_defence_is_that_of_plain_autograd(method, monkeypatch) -> None:
    monkeypatch.setattr(PlainMasks, "cut", lambda self, below: 0.0)
    found, plain = merged(method).state_dict(), merged("task_arithmetic").state_dict()
    for name, tensor in pruning(method).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["1.weight"], plain["1.weight"], atol=1e-2)


def test_masks_are_cut_below_the_threshold_and_their_share_is_told() -> None:
    masks = PlainMasks({"w": torch.Size((4, 2))}, "row")
    with torch.no_grad():
        masks.values[0].copy_(torch.tensor([[0.1], [0.2], [0.3], [1.0]]))
    assert masks.cut(0.2) == pytest.approx(0.25)
    assert masks.values[0].flatten().tolist() == [0, 1, 1, 1]
    masks.shift = [torch.full((4, 1), 0.5)]
    assert masks.mask("w").flatten().tolist() == [0.5, 1.5, 1.5, 1.5]


def test_the_merger_may_be_a_method_and_no_guard_is_asked() -> None:
    method = ANP(**{**QUICK, "steps": 0}, merger=fw.TaskArithmetic(scale=0.7), threshold=0.0)
    assert "0.7" in json.dumps(method.spec())
    base = base_of()
    plain = fw.merge(fw.TaskArithmetic(scale=0.7), base=base, experts=experts(base)).state_dict()
    for name, tensor in merged(method).state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)
    assert DAM().guard == ANP().guard == AWM().guard == 0

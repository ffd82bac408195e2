"""Concrete masks and the methods that learn them, against plain autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from learned_toys import QUICK, Killed, data, experts, network, stop_at
from torch.func import functional_call

import fusewright as fw
from fusewright.methods.learned import Concrete
from fusewright.methods.learned._resume import Numbered
from fusewright.methods.learned.coefficients import LinearCoefficients, MaskedCoefficients
from fusewright.methods.learned.objectives import entropy
from fusewright.modules.masks import ConcreteMasks, divided, expectation

HALF = torch.float64


def merged(**params):
    base = network(HALF)
    method = Concrete(**{**QUICK, "guard": 0, **params})
    return fw.merge(method, base=base, experts=experts(base), data=data(HALF))


def in_directions(total: torch.Tensor, mask: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """A change through a mask of the singular directions of ``total``."""
    u, _, vt = torch.linalg.svd(total, full_matrices=False)
    if len(total) > total.shape[1]:
        return change @ vt.T * mask @ vt
    return u @ (mask[:, None] * (u.T @ change))


def reference(steps: int, adapts: bool, rate: float = 0.05, inner: float = 0.03, mask="element"):
    """The published procedure, whole tensors and no shortcut: (masks' logits, λ in the end)."""
    base = network(HALF)
    start = {n: t.detach() for n, t in base.named_parameters()}
    taus = [{n: t.detach() - start[n] for n, t in e.named_parameters()}
            for e in experts(base).values()]  # fmt: skip
    sums = {n: sum(tau[n] for tau in taus) for n in start}
    ranks = {n: torch.linalg.svdvals(t) for n, t in sums.items() if mask == "rank" and t.dim() == 2}
    shapes = {n: (1, len(ranks[n]), 1) if n in ranks else t.shape for n, t in start.items()}
    masks = ConcreteMasks(shapes, seed=0)
    logits = {n: torch.zeros(shape, requires_grad=True) for n, shape in shapes.items()}
    adam = torch.optim.Adam(list(logits.values()), lr=rate)
    batches = data(HALF)

    def loss(weights, mask, number: int) -> torch.Tensor:
        tensors = {}
        for n in start:
            change = sum(w * tau[n] for w, tau in zip(weights[n], taus, strict=True))
            tensors[n] = start[n] + (in_directions(sums[n], mask[n].flatten(), change)
                                     if n in ranks else mask[n] * change)  # fmt: skip
        return sum(entropy(functional_call(base, tensors, (batches[t][number % 4],)))
                   for t in batches)  # fmt: skip

    def masked(number: int):
        found = {}
        for at, (n, x) in enumerate(logits.items()):
            with torch.no_grad():
                masks.logits[at].copy_(torch.zeros_like(x))
                noise = masks.drawn(n, number)  # undo what is not the draw
                del noise
            u = uniform(masks, n, number)
            m = ((u / (1 - u)).log() + x).div(0.5).sigmoid()
            mean = (m.flatten() * ranks[n]).sum() / ranks[n].sum() if n in ranks else m.mean()
            found[n] = m / mean
        return found

    for step in range(steps):
        weights = {n: torch.full((2,), 0.3, requires_grad=True) for n in start}
        if adapts:
            held = {n: m.detach() for n, m in masked(step).items()}
            loss(weights, held, 2 * step).backward()
            flat = torch.cat([w.grad for w in weights.values()])
            size = flat.square().mean().sqrt()
            weights = {n: (w - inner * w.grad / size).detach() for n, w in weights.items()}
        adam.zero_grad()
        loss(weights, masked(step), 2 * step + 1 if adapts else step).backward()
        adam.step()
    return logits


def uniform(masks: ConcreteMasks, name: str, number: int) -> torch.Tensor:
    from fusewright.modules.masks import _uniform

    return _uniform(masks.logits[masks._at[name]], masks.seed, number, name)


@pytest.mark.parametrize("mask", ["element", "rank"])
@pytest.mark.parametrize("adapts", [False, True])
def test_a_fit_is_that_of_plain_autograd(
    adapts: bool, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    real = ConcreteMasks.share
    monkeypatch.setattr(ConcreteMasks, "share", lambda self: kept.update(masks=self) or real(self))
    form = "adamerging" if adapts else "task_arithmetic"
    merged(form=form, rate=0.05, steps=4, weight_steps=0, mask=mask)
    expected = reference(4, adapts, mask=mask)
    for name, x in expected.items():
        found = kept["masks"].logits[kept["masks"]._at[name]]
        assert found.abs().max() > 0.01
        torch.testing.assert_close(found.detach(), x.detach(), rtol=1e-3, atol=1e-4)


def test_the_result_is_the_masked_sum_and_survives_the_disk(tmp_path) -> None:
    found = merged(out=None) if False else merged(steps=3)
    base = network(HALF)
    on_disk = fw.merge(Concrete(**{**QUICK, "guard": 0, "steps": 3}), base=base,
                       experts=experts(base), data=data(HALF), out=tmp_path / "out")  # fmt: skip
    for name, tensor in on_disk.state_dict().items():
        assert tensor.equal(found.state_dict()[name]) and tensor.dtype == HALF
        total = sum(e.state_dict()[name] - base.state_dict()[name] for e in experts(base).values())
        ratio = (tensor - base.state_dict()[name]) / (0.3 * total)
        assert float(ratio.min()) > 0 and float(ratio.mean()) == pytest.approx(1, abs=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2312.06173" in card and "expert a" in card


def test_masks_follow_the_gradient_down() -> None:
    losses = merged(steps=60, rate=0.1).report["fitted"]["losses"]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("mask", ["element", "row", "rank"])
def test_nothing_learned_is_task_arithmetic(mask: str) -> None:
    base = network(HALF)
    start = fw.merge("task_arithmetic", base=base, experts=experts(base)).state_dict()
    for form in ("task_arithmetic", "adamerging"):
        found = merged(steps=0, weight_steps=0, form=form, mask=mask).state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, start[name], rtol=1e-6, atol=1e-7)


def test_what_was_trained_are_the_masks_and_not_what_is_left_of_them() -> None:
    elements = sum(p.numel() for p in network().parameters())
    numbers = {"element": elements, "row": 8 + 8 + 4 + 4, "rank": 6 + 8 + 4 + 4}
    for form in ("task_arithmetic", "adamerging"):
        for mask, count in numbers.items():
            report = merged(steps=1, weight_steps=1, form=form, mask=mask).report["fitted"]
            assert report["trained"] == count


def test_row_masks_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found, base = merged(mask="row", rate=0.1).state_dict(), network(HALF)
    name = "0.weight"
    total = sum(e.state_dict()[name] - base.state_dict()[name] for e in experts(base).values())
    ratio = (found[name] - base.state_dict()[name]) / total
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio[:, 0].std() > 1e-3


def test_masks_of_directions_are_of_the_summed_task_vectors() -> None:
    found, base = merged(mask="rank", rate=0.3, guard=0).state_dict(), network(HALF)
    for name, tensor in base.state_dict().items():
        total = sum(e.state_dict()[name] - tensor for e in experts(base).values())
        if tensor.dim() == 2:
            u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
            kept = u.T @ (found[name] - tensor) @ vt.T
            torch.testing.assert_close(kept, kept.diag().diag(), atol=1e-5, rtol=0)
            assert float(kept.diag().sum() / sigma.sum()) == pytest.approx(0.3, abs=1e-5)
            assert (kept.diag() / sigma).std() > 1e-3


@pytest.mark.parametrize("mask", ["element", "rank"])
def test_the_seed_decides_a_drawn_mask(mask: str) -> None:
    one, two = (merged(answer="drawn", steps=1, mask=mask).state_dict() for _ in range(2))
    assert all(t.equal(two[n]) for n, t in one.items())
    expected = merged(steps=1, mask=mask).state_dict()
    assert all(not t.equal(expected[n]) for n, t in one.items())


@pytest.mark.parametrize("form", ["task_arithmetic", "adamerging"])
def test_a_killed_fit_of_directions_goes_on_to_the_same_end(form: str, tmp_path) -> None:
    base = network(HALF)
    method = Concrete(**QUICK, form=form, mask="rank", weight_steps=3)
    given = {"base": base, "experts": experts(base), "data": data(HALF)}
    whole = fw.merge(method, **given)
    with pytest.raises(Killed):
        fw.merge(method, out=tmp_path / "out", progress=stop_at(5), **given)
    seen = []
    again = fw.merge(method, out=tmp_path / "out", progress=seen.append, **given).state_dict()
    assert next(now.done for now in seen if now.unit == "steps") > 1
    assert all(t.equal(again[n]) for n, t in whole.state_dict().items())


@pytest.mark.parametrize("killed", [5, 7, 8, 9])  # in the masks' steps, and in those of λ
def test_a_fit_killed_in_either_stage_goes_on_to_the_same_end(killed: int, tmp_path) -> None:
    base = network(HALF)
    method = Concrete(**{**QUICK, "guard": 0}, form="adamerging", weight_steps=3, weight_rate=0.1)
    given = {"base": base, "experts": experts(base), "data": data(HALF)}
    whole = fw.merge(method, **given)
    with pytest.raises(Killed):
        fw.merge(method, out=tmp_path / "out", progress=stop_at(killed), **given)
    again = fw.merge(method, out=tmp_path / "out", **given)
    assert all(t.equal(again.state_dict()[n]) for n, t in whole.state_dict().items())
    assert again.report["fitted"] == whole.report["fitted"]


def test_of_a_descent_no_earlier_batch_is_asked_for_again() -> None:
    items = Numbered(iter(range(9)))
    assert [items[0], items[3], items[3], items[4]] == [0, 3, 3, 4]
    with pytest.raises(AssertionError):
        items[3]


@pytest.mark.parametrize("form", ["task_arithmetic", "adamerging"])
def test_profiles_and_forms_run(form: str) -> None:
    base = network()
    method = Concrete.profile("fusionbench", form=form, steps=2, weight_steps=2)
    report = fw.merge(method, base=base, experts=experts(base), data=data()).report["fitted"]
    assert report["agreement"] == [] and ("weight" in report) == (form == "adamerging")


def test_the_expectation_is_the_closed_form_at_a_half() -> None:
    x = torch.linspace(-9, 9, 501, dtype=HALF)
    p = torch.sigmoid(2 * x)
    closed = p + 2 * x * p * (1 - p) - math.pi / 2 * (2 * p - 1) * (p * (1 - p)).sqrt()
    torch.testing.assert_close(expectation(x, 0.5), closed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.5])
def test_the_expectation_is_the_mean_of_draws(temperature: float) -> None:
    masks = ConcreteMasks({"w": torch.Size((40_000,))}, temperature=temperature)
    with torch.no_grad():
        masks.logits[0].fill_(0.7)
        for number in (0, 1):
            u = uniform(masks, "w", number)
            mean = ((u.logit() + 0.7) / temperature).sigmoid().mean()
            exact = expectation(torch.tensor(0.7), temperature)
            assert float(mean) == pytest.approx(float(exact), abs=0.01)


def test_a_mask_has_mean_one_and_one_that_vanished_stays_a_number() -> None:
    masks = ConcreteMasks({"w": torch.Size((30, 5)), "s": torch.Size(()), "e": torch.Size((0,))})
    with torch.no_grad():
        assert float(masks.drawn("w", 3).mean()) == pytest.approx(1, rel=1e-5)
        assert float(masks.drawn("s", 3)) == pytest.approx(1)
        assert masks.drawn("e", 3).shape == (0,)
        masks.logits[1].fill_(-1000.0)
        for gone in (masks.drawn("s", 3), masks.expected("s"), divided(torch.zeros(4))):
            assert gone.isfinite().all() and float(gone.max()) <= 1


@pytest.mark.parametrize("answer", ["expected", "drawn"])
def test_fixed_masks_are_the_final_ones_and_learned_no_more(answer) -> None:
    masks = ConcreteMasks({"w": torch.Size((6, 2))})
    linear = LinearCoefficients(["w"], ["a", "b"], lambda name: name, 0.3)
    both = MaskedCoefficients(linear, masks, answer)
    final = both.mask("w")
    for number in (0, 1):
        both.draw = number
        assert both.mask("w").equal(masks.drawn("w", number)) and not both.mask("w").equal(final)
    both.fix(["w"])
    assert both.mask("w").equal(final) and both.mask("w") is both.mask("w")
    assert [p for p in both.parameters() if p.requires_grad] == [linear.values]


def test_what_is_written_goes_by_the_checkpoints_names() -> None:
    names = ["a.w", "b.w", "b"]
    linear = LinearCoefficients(names, ["x", "y"], lambda name: name[0], 0.25)
    assert linear.values.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    with torch.no_grad():
        linear.values.copy_(torch.tensor([[0.0, 0.5], [1.0, 1.5]]))
    assert linear.weights("b").tolist() == linear.weights("b.w").tolist() == [1.0, 1.5]
    assert linear.written(lambda name: f"model.{name}")["y"] == [
        {"filter": "model.a.w", "value": 0.5}, {"filter": "model.b.w", "value": 1.5},
        {"filter": "model.b", "value": 1.5}, 0.0,
    ]  # fmt: skip

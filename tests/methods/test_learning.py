"""What every fit has: objectives, scalarisers, guards, checkpoints, progress, provenance."""

from __future__ import annotations

import copy
import errno
import json
import os
import warnings
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from learned_toys import QUICK, Killed, data, experts, moved, network, stop_at
from references import _trim, agreeing
from torch import nn
from torch.utils.data import DataLoader

import fusewright as fw
from fusewright.bench.sweep.cells import requirement_of
from fusewright.errors import (
    FusewrightWarning,
    NumericError,
    OutputError,
    PlanError,
    RecipeError,
)
from fusewright.methods.learned import AdaMerging, Concrete, objectives
from fusewright.methods.learned._guard import collapsed
from fusewright.methods.learned.scalarisers import combine, mgda, shortest, tchebycheff
from fusewright.tasks.adaptation import adaptation
from fusewright.weights import _fs

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
METHODS = {
    "adamerging": AdaMerging(**QUICK),
    "plus": AdaMerging.profile("plus", **QUICK),
    "concrete": Concrete(**QUICK),
    "concrete, adapted": Concrete(**QUICK, form="adamerging", weight_steps=6),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def merged(method, base=None, **options):
    base = network() if base is None else base
    return fw.merge(method, base=base, experts=experts(base), **{"data": data(), **options})


# -- objectives and scalarisers ------------------------------------------------------------------


def test_objectives_are_their_formulas_in_float64() -> None:
    logits, labels = LOGITS.double().numpy(), [1, 2]
    other = np.array([[0.0, 1.0, -1.0], [1.0, 0.5, 2.0]])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    of = {name: found.loss for name, found in objectives.OBJECTIVES.items()}
    close = lambda found, expected: pytest.approx(expected, rel=1e-6) == float(found)  # noqa: E731
    assert close(of["entropy"](LOGITS), -(p * np.log(p)).sum(1).mean())
    nll = -np.log(p[[0, 1], labels]).mean()
    assert close(of["cross_entropy"](LOGITS, torch.tensor(labels)), nll)
    assert close(of["self_label"](LOGITS, torch.tensor(other)), -np.log(p[[0, 1], [1, 2]]).mean())
    q = np.exp(other) / np.exp(other).sum(1, keepdims=True)
    assert close(of["soft_label"](LOGITS, torch.tensor(other)), -(q * np.log(p)).sum(1).mean())
    assert close(of["matching"](LOGITS, torch.tensor(other)), ((logits - other) ** 2).mean())


def test_sixteen_bits_are_compared_in_32_and_labels_may_have_any_form() -> None:
    of = {name: found.loss for name, found in objectives.OBJECTIVES.items()}
    half, other = (10 * LOGITS).bfloat16(), LOGITS.flip(0).bfloat16()
    labels = torch.tensor([[1], [2]], dtype=torch.int32)
    for name, rest in (("entropy", []), ("diverse_entropy", []), ("cross_entropy", [labels]),
                       ("self_label", [other]), ("soft_label", [other]), ("matching", [other])):
        wide = [x.float() if x.is_floating_point() else torch.tensor([1, 2]) for x in rest]
        found = of[name](half, *rest)
        assert found.dtype == torch.float32 and found.equal(of[name](half.float(), *wide))


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_of_float64_answers_losses_and_slopes_are_in_float64(name: str) -> None:
    objective = objectives.OBJECTIVES[name]
    rest = {"none": [], "labels": [torch.tensor([1, 2])], "expert": [LOGITS.double().flip(0)]}
    at = (LOGITS.double() / 3).requires_grad_()
    assert objective.loss(at, *rest[objective.target]).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: objective.loss(x, *rest[objective.target]), at)


@pytest.mark.parametrize("name", sorted(set(objectives.OBJECTIVES) - {"cross_entropy"}))
def test_a_class_that_is_ruled_out_is_as_if_it_were_not_there(name: str) -> None:
    objective, at = objectives.OBJECTIVES[name], LOGITS.double() / 3
    found = []
    for out in (torch.tensor([[-torch.inf], [-torch.inf]]), torch.empty(2, 0)):
        own = at.clone().requires_grad_()
        answers, expert = (torch.cat([x, out.double()], 1) for x in (own, at.flip(0)))
        loss = objective.loss(answers, *([expert] if objective.target == "expert" else []))
        loss.backward()
        share = 4 / 3 if name == "matching" and out.numel() else 1  # a mean over more numbers
        found.append((share * loss.detach(), share * own.grad))
    for ruled_out, without in zip(*found, strict=True):
        torch.testing.assert_close(ruled_out, without, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_diverse_entropy_is_the_negated_information_and_so_is_its_gradient(shape) -> None:
    draw = torch.Generator().manual_seed(3)
    found = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    plain = found.detach().clone().requires_grad_()
    p = plain.reshape(-1, 4).softmax(1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    loss = objectives.diverse_entropy(found)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.grad, plain.grad, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(objectives.diverse_entropy, found)


def test_diverse_entropy_is_best_for_sure_answers_of_all_classes_and_worst_for_one_class() -> None:
    sure = 50 * torch.eye(4, dtype=torch.float64)
    said = objectives.diverse_entropy
    assert said(sure).item() == pytest.approx(-np.log(4))
    for alike in (sure[[2, 2, 2]], torch.zeros(3, 4), sure[:1], sure[[2, 2, 2]] * 1e4):
        assert said(alike).item() == pytest.approx(0, abs=1e-9)
    infinite = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert said(infinite).item() == pytest.approx(-np.log(2))


# One number in, two classes that its sign tells apart; the inputs lie left of zero, and the expert
# has moved its bias to make up for it. Entropy is least without that bias.
LEFT = torch.randn(128, 1, generator=torch.Generator().manual_seed(5)) / 2 - 1


def side(weight: float, bias: float) -> nn.Linear:
    found = nn.Linear(1, 2)
    with torch.no_grad():
        found.weight.copy_(torch.tensor([[weight], [-weight]]))
        found.bias.copy_(torch.tensor([bias, -bias]))
    return found


def falls(objective: str, **settings):
    method = AdaMerging(objective=objective, steps=120, rate=0.03, batch=64, high=3.0, **settings)
    made = fw.merge(method, base=side(0, 0), experts={"a": side(1, 0.9)},
                    data={"a": list(LEFT.split(64))})  # fmt: skip
    said = made.module()(LEFT).argmax(1)
    return float(said.double().mean()), made.report["fitted"]["guard"]["a"]


def test_entropy_alone_collapses_to_one_class_and_diverse_entropy_does_not() -> None:
    with pytest.warns(FusewrightWarning, match=r"one class of a [\s\S]*diverse_entropy"):
        share, measured = falls("entropy", guard=0)
    assert share > 0.9 and measured["most_predicted"] > 0.9 > measured["expert_most_predicted"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusewrightWarning)
        share, measured = falls("diverse_entropy", guard=0)
    assert 0.35 < share < 0.65 and measured["agreement"] > 0.8


@pytest.mark.parametrize("objective", ["self_label", "soft_label", "matching"])
def test_experts_answers_are_learned_from(objective: str) -> None:
    method = AdaMerging(**{**QUICK, "steps": 25, "guard": 0}, rate=0.03, objective=objective)
    losses = merged(method).report["fitted"]["losses"]
    assert min(losses[-4:]) < min(losses[:4])


def test_labels_are_needed_by_the_objective_and_not_by_the_method() -> None:
    """So that sweeps, recipes and ranks know what a row has seen."""
    assert AdaMerging().needs == "unlabelled" and fw.FWMerging().needs == "labelled"
    labelled, follows = AdaMerging(objective="cross_entropy"), fw.FWMerging(objective="self_label")
    assert labelled.needs == requirement_of(labelled) == "labelled"
    assert follows.needs == requirement_of(follows) == "unlabelled"
    assert requirement_of(fw.WEMoE()) == "routed" and fw.Ties().needs == "none"
    assert requirement_of(fw.WEMoE(objective="cross_entropy")) == "labelled"


@pytest.mark.parametrize("objective", list(objectives.OBJECTIVES))
def test_an_item_may_have_many_answers(objective: str) -> None:
    """As texts have, one for each token: the same as if each were an item."""
    together = lambda model, batch: model(batch["x"]).reshape(4, 4, 4)  # noqa: E731
    alone = lambda model, batch: model(batch["x"])  # noqa: E731
    labelled = {name: [{"x": x, "labels": torch.arange(16) % 4} for x in batches]
                for name, batches in data().items()}  # fmt: skip
    method = AdaMerging(**QUICK, rate=0.03, objective=objective)
    many, one = (merged(method, data=labelled, heads={"a": head, "b": head})
                 for head in (together, alone))  # fmt: skip
    assert many.report["fitted"]["losses"] == pytest.approx(one.report["fitted"]["losses"])


def test_labels_that_are_not_one_for_each_answer_are_refused() -> None:
    labelled = {name: [{"x": x, "labels": torch.zeros(8)} for x in batches]
                for name, batches in data().items()}  # fmt: skip
    head = lambda model, batch: model(batch["x"])  # noqa: E731
    method = AdaMerging(**QUICK, objective="cross_entropy")
    with pytest.raises(PlanError, match="not one label for each answer") as error:
        merged(method, data=labelled, heads={"a": head, "b": head})
    assert "task a" in str(error.value) and "(16, 4)" in str(error.value)


def test_tasks_answered_in_numbers_are_matched_or_refused() -> None:
    """Depths have no classes: neither entropy nor agreement means anything."""
    asked = adaptation(data())
    numbers = {name: replace(q, numbers=name == "b") for name, q in asked.questions.items()}
    asked = replace(asked, questions=numbers)
    with pytest.raises(PlanError, match="answered in numbers") as error:
        merged(AdaMerging(**QUICK), data=asked)
    assert "b" in str(error.value) and "objective=matching, guard=0" in str(error.value)
    merged(AdaMerging(**{**QUICK, "guard": 0}, objective="matching"), data=asked)


def test_labels_are_read_and_not_shown_to_the_model() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(pixels)

    base = Keywords()
    labelled = {
        name: [{"pixels": x, "labels": torch.arange(16) % 4} for x in batches]
        for name, batches in data().items()
    }
    method = AdaMerging(**QUICK, objective="cross_entropy")
    losses = merged(method, base, data=labelled).report["fitted"]["losses"]
    assert losses[0] > 1
    with pytest.raises(fw.FusewrightError, match=r"needs labels[\s\S]*task a"):
        merged(AdaMerging(**QUICK, objective="cross_entropy"))


def test_shortest_is_the_minimum_over_the_simplex() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradients = torch.randn(4, 3, generator=draw).double()
        weights = shortest(gradients @ gradients.T)
        assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1)
        best = float((weights @ gradients).norm())
        tries = torch.distributions.Dirichlet(torch.ones(4)).sample((2000,)).double()
        assert best <= float((tries @ gradients).norm(dim=1).min()) + 1e-9
        descends = gradients @ (weights @ gradients)
        assert float(descends.min()) >= best**2 - 1e-6
    assert shortest(torch.zeros(3, 3)).tolist() == pytest.approx([1 / 3] * 3)


def test_the_shortest_of_two_is_found_at_once_at_any_size() -> None:
    gram = torch.tensor([[4.0, -2.0], [-2.0, 1.0]]).double()
    third = torch.tensor([1 / 3, 2 / 3]).double()
    for size in (1.0, 1e-20, 1e20):
        torch.testing.assert_close(shortest(size * gram, rounds=1), third)
    assert shortest(torch.full((2, 2), float("nan"))).tolist() == [0.5, 0.5]


def test_gradients_of_all_parameters_are_weighed_together() -> None:
    parameters = [torch.zeros(2, 2), torch.zeros(3)]
    gradients = [[torch.full((2, 2), float(t)), torch.arange(3.0) + t] for t in range(2)]
    seen = []

    def scalarise(losses: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        seen.append((losses, flat))
        return torch.tensor([0.25, 2.0]).double()

    weights = combine(parameters, [torch.tensor(3.0), torch.tensor(4.0)], gradients, scalarise)
    assert weights.tolist() == [0.25, 2.0]
    ((losses, flat),) = seen
    assert losses.tolist() == [3, 4] and losses.dtype == flat.dtype == torch.float64
    assert flat.tolist() == [[0, 0, 0, 0, 0, 1, 2], [1, 1, 1, 1, 1, 2, 3]]
    assert parameters[0].grad.tolist() == [[2, 2], [2, 2]]
    assert parameters[1].grad.tolist() == [2, 4.25, 6.5]


def test_opposite_gradients_cancel_and_the_worst_task_leads() -> None:
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 0.0]]).double()
    torch.testing.assert_close(mgda(torch.ones(2), gradients) @ gradients, torch.zeros(2).double())
    assert tchebycheff(torch.tensor([1.0, 3.0, 3.0]), gradients).tolist() == [0, 1, 0]


def test_tasks_are_combined_as_asked() -> None:
    def weights(**params):
        found = merged(AdaMerging(**{**QUICK, "steps": 3, "rate": 0.1, "guard": 0}, **params))
        return found.report["fitted"]["method"]["sum"]["weight"]

    alone, both = weights(importance={"b": 0.0}), weights()
    assert weights(combine="tchebycheff", importance={"b": 1e-6}) == alone != both
    assert weights(combine="mgda") not in (alone, both)
    with pytest.raises(PlanError, match="importance names no expert"):
        weights(importance={"zebra": 1.0})


@EACH
def test_running_statistics_are_the_experts_mean_while_others_are_learned(method) -> None:
    base = nn.Sequential(*network()[:2], nn.BatchNorm1d(8), *network()[2:]).eval()
    models, seen = experts(base), []

    def look(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(model[2].running_mean.clone())
        return model(batch)

    found = merged(method, base, heads={"a": look, "b": None}).state_dict()
    for name in ("2.running_mean", "2.running_var"):
        mean = sum(model.state_dict()[name] for model in models.values()) / 2
        torch.testing.assert_close(found[name], mean)
    mean = sum(model[2].running_mean for model in models.values()) / 2
    assert any(torch.allclose(one, mean) for one in seen)


def test_of_float64_models_what_is_not_learned_is_as_exact_as_float64() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    three = {name: moved(base, seed) for seed, name in enumerate("abc")}
    own = {n: torch.stack([e.state_dict()[n] for e in three.values()]) for n in ("0.weight",
           "1.running_mean")}  # fmt: skip
    given = {name: [x.double() for x in data()["a"]] for name in three}
    found = fw.merge(Concrete(steps=0, guard=0), base=base, experts=three, data=given).state_dict()
    start = base.state_dict()["0.weight"]
    exact = {"0.weight": start + 0.3 * (own["0.weight"] - start).sum(0),
             "1.running_mean": own["1.running_mean"].mean(0)}  # fmt: skip
    for name, tensor in exact.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13)


# -- AdaMerging++ --------------------------------------------------------------------------------


def test_plus_weighs_the_entries_that_agree_of_trimmed_vectors() -> None:
    base = network()
    found = merged(METHODS["plus"], base)
    trim, agree = found.report["fitted"]["method"]
    assert trim["trim"]["density"] == 0.2
    names = list(base.state_dict())
    flat = [np.concatenate([(e.state_dict()[n] - base.state_dict()[n]).numpy().ravel()
                            for n in names]) for e in experts(base).values()]  # fmt: skip
    kept = agreeing([_trim(tau, 0.2) for tau in flat])
    assert 0 < sum((k != 0).sum() for k in kept) <= 0.4 * flat[0].size
    start = 0
    for name in names:
        tensor = base.state_dict()[name]
        stop = start + tensor.numel()
        expected = tensor.numpy().astype("f8")
        for expert, tau in zip("ab", kept, strict=True):
            rules = agree["agree"]["weight"][expert][:-1]
            weight = next(rule["value"] for rule in rules if rule["filter"] == name)
            assert 0.29 < weight < 0.31
            expected = expected + weight * tau[start:stop].reshape(expected.shape)
        torch.testing.assert_close(found.state_dict()[name].double(), torch.tensor(expected),
                                   atol=1e-6, rtol=1e-6)  # fmt: skip
        start = stop


@pytest.mark.parametrize("merger", ["sum", "trim >> agree", [{"trim": {"scope": "tensor"}}, "sum"],
                                    "drop >> agree"])  # fmt: skip
def test_what_was_fitted_is_what_is_written(merger, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.methods.learned._fitting import Fitting
    from fusewright.modules.parametrised import ParametrisedMerge

    seen: dict[str, torch.Tensor] = {}
    real = Fitting.report

    def report(self, merge: ParametrisedMerge, fit):
        seen.update(merge.state())
        return real(self, merge, fit)

    monkeypatch.setattr(Fitting, "report", report)
    found = merged(AdaMerging(**QUICK, merger=merger)).state_dict()
    assert seen.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, seen[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("merger", ["elect", "trim >> elect", "sum >> lines", "iso_c",
                                    {"sum": {"scale": 0.5}}])  # fmt: skip
def test_other_mergers_have_no_weights_to_learn(merger) -> None:
    with pytest.raises(RecipeError, match="weights of task vectors"):
        AdaMerging(merger=merger)


# -- killed fits, progress, provenance -----------------------------------------------------------


@EACH
def test_a_killed_fit_goes_on_to_the_same_bytes(method, tmp_path) -> None:
    whole = merged(method)
    with pytest.raises(Killed):
        merged(method, out=tmp_path / "out", progress=stop_at(5))
    assert not (tmp_path / "out").exists() and list((tmp_path / ".out.fit").glob("*.pt"))
    steps = []
    again = merged(method, out=tmp_path / "out", progress=lambda now: steps.append(now))
    fits = [now for now in steps if now.unit == "steps"]
    assert fits[0].done == 4 and fits[0].resumed and fits[0].loss > 0
    assert not (tmp_path / ".out.fit").exists()
    assert all(t.equal(whole.state_dict()[n]) for n, t in again.state_dict().items())
    assert again.report["fitted"]["losses"] == whole.report["fitted"]["losses"]


def test_a_loader_that_shuffles_shows_a_fit_that_goes_on_the_same(tmp_path) -> None:
    def given() -> dict[str, DataLoader]:
        return {n: DataLoader(torch.cat(each), 16, shuffle=True) for n, each in data().items()}

    method = METHODS["adamerging"].model_copy(update={"steps": 12, "guard": 0})
    whole = merged(method, data=given(), out=tmp_path / "whole")
    torch.manual_seed(5)
    with pytest.raises(Killed):
        merged(method, data=given(), out=tmp_path / "cut", progress=stop_at(9))
    cut = merged(method, data=given(), out=tmp_path / "cut")
    assert cut.report["fitted"]["losses"] == whole.report["fitted"]["losses"]
    assert len(set(cut.report["fitted"]["losses"][::4])) == 3  # and epochs have different orders


def test_another_fit_is_not_gone_on_with(tmp_path) -> None:
    def first_step(method=METHODS["adamerging"], **options) -> int:
        steps = []
        with pytest.raises(Killed):
            hear = lambda now: steps.append(now.done) or stop_at(1)(now)  # noqa: E731
            merged(method, out=tmp_path / "out", progress=hear, **options)
        return steps[0]

    with pytest.raises(Killed):
        merged(METHODS["adamerging"], out=tmp_path / "out", progress=stop_at(5))
    assert first_step() == 4
    other = {name: [x + 1 for x in batches] for name, batches in data().items()}
    assert first_step(data=other) == first_step(seed=1) == 1
    assert first_step(AdaMerging(**QUICK, rate=0.5)) == 1
    assert first_step(base=moved(network(), 7)) == 1
    heads = dict.fromkeys("ab", lambda model, batch: model(batch) * 2)
    assert first_step(heads=heads) == 1 and first_step() == 4


def test_a_place_that_may_not_be_written_is_refused_before_the_fit(tmp_path) -> None:
    def fitted(now) -> None:
        raise AssertionError("it fitted first")

    (tmp_path / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    for out, said in (("file/out", "may be written"), ("file", "cannot take this path's place"),
                      ("there", "exists already")):  # fmt: skip
        for method in (METHODS["adamerging"], fw.Smile(), fw.WEMoE(steps=2)):
            with pytest.raises(OutputError, match=said):
                merged(method, out=tmp_path / out, progress=fitted)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "there"}


def test_a_disk_with_no_room_is_refused_before_the_fit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_fs.FileSystem, "free", lambda *_: 0)
    with pytest.raises(OutputError, match="does not fit on its disk"):
        merged(METHODS["adamerging"], out=tmp_path / "out",
               progress=lambda now: pytest.fail("it fitted first"))  # fmt: skip


@EACH
def test_a_disk_that_fills_in_mid_fit_keeps_the_checkpoint_before(
    method, tmp_path, monkeypatch
) -> None:
    whole = merged(method).state_dict()
    plain, written = _fs.FileSystem.append, []

    def append(self, fd, data):
        if written[-1] >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(self, fd, data)

    def opened(self, path, flags, real=_fs.FileSystem.open):
        written.append(1 + (written[-1] if written else 0))
        return real(self, path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(_fs.FileSystem, "append", append)
        patch.setattr(_fs.FileSystem, "open", opened)
        with pytest.raises(OutputError, match="the disk is full") as refusal:
            merged(method, out=tmp_path / "out")
    assert "make room, then run the same command again" in (refusal.value.fix or "")
    assert not list(tmp_path.glob(".out.fit/*.partial"))
    steps = []
    again = merged(method, out=tmp_path / "out", progress=steps.append).state_dict()
    assert next(now for now in steps if now.unit == "steps").resumed
    assert all(tensor.equal(whole[name]) for name, tensor in again.items())


@EACH
def test_a_checkpoint_that_was_cut_is_named_with_what_to_remove(method, tmp_path) -> None:
    with pytest.raises(Killed):
        merged(method, out=tmp_path / "out", progress=stop_at(5))
    for path in (tmp_path / ".out.fit").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OutputError, match="damaged") as refusal:
        merged(method, out=tmp_path / "out")
    assert refusal.value.where.parent == tmp_path / ".out.fit"
    assert f"rm '{refusal.value.where}'" in refusal.value.fix
    for path in (tmp_path / ".out.fit").glob("*.pt"):
        path.unlink()
    again = merged(method, out=tmp_path / "out").state_dict()
    assert all(tensor.equal(again[n]) for n, tensor in merged(method).state_dict().items())


def test_the_folder_says_what_it_was_fitted_by(tmp_path) -> None:
    for number, method in enumerate(METHODS.values()):
        merged(method, out=tmp_path / str(number))
        said = json.loads((tmp_path / str(number) / "fusewright.json").read_text())["fitted"]
        assert said["program"] == method.spec() and set(said["tasks"]) == {"a", "b"}
        card = (tmp_path / str(number) / "README.md").read_text()
        assert method.card.arxiv in card and "expert b" in card


def test_all_losses_and_what_the_guard_saw_are_reported() -> None:
    report = merged(AdaMerging(**QUICK)).report["fitted"]
    by_task = np.array([report["tasks"]["a"], report["tasks"]["b"]])
    assert by_task.shape == (2, 6) and by_task.mean(0).tolist() == pytest.approx(report["losses"])
    for seen in report["guard"].values():
        assert seen.pop("inputs") == 16
        assert set(seen) == {"agreement", "most_predicted", "expert_most_predicted"}
        assert all(0 < share <= 1 for share in seen.values())


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_merge_that_says_one_class_of_all_is_told() -> None:
    fine = {"agreement": 0.9, "most_predicted": 0.5, "expert_most_predicted": 0.4}
    assert collapsed({"a": fine, "b": fine | {"most_predicted": 0.95}}) == ["b"]
    base = network()
    with torch.no_grad():
        base[2].bias[3] = 50.0
    away = experts(base)
    for model in away.values():
        with torch.no_grad():
            model[2].bias[3] = 0.0
    with pytest.warns(FusewrightWarning, match="one class of"):
        fw.merge(AdaMerging(**QUICK), base=base, experts=away, data=data())


def test_inputs_that_are_all_alike_are_told() -> None:
    same = {name: [torch.ones(8, 6)] for name in ("a", "b")}
    with pytest.warns(FusewrightWarning, match="with one class"):
        merged(AdaMerging(**QUICK), data=same)


@EACH
def test_a_batch_of_one_is_enough(method) -> None:
    one = {name: [batches[0][:1]] for name, batches in data().items()}
    found = merged(method, data=one)
    assert all(t.isfinite().all() for t in found.state_dict().values())


@EACH
def test_a_loss_that_is_no_number_names_its_task_and_keeps_the_last_state(method, tmp_path) -> None:
    poisoned = data()
    poisoned["b"][3] = torch.full((16, 6), float("nan"))
    with pytest.raises(NumericError, match="'b'"):
        merged(method.model_copy(update={"guard": 0}), data=poisoned, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and list((tmp_path / ".out.fit").glob("*.pt"))


def test_answers_without_logits_ask_for_a_head() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": self.inner(x)}

    with pytest.raises(fw.FusewrightError, match=r"logits[\s\S]*task a[\s\S]*heads="):
        merged(AdaMerging(**QUICK), Features())
    with pytest.raises(fw.FusewrightError, match=r"heads are given[\s\S]*zebra"):
        merged(AdaMerging(**QUICK), heads={"a": None, "b": None, "zebra": torch.randn(3, 4)})
    with pytest.raises(PlanError, match=r"one class[\s\S]*task a"):
        one = lambda model, batch: model(batch)[:, :1]  # noqa: E731
        merged(AdaMerging(**QUICK), heads={"a": one, "b": None})


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode])
def test_what_is_learned_does_not_depend_on_what_gradients_the_caller_keeps(state) -> None:
    methods = METHODS["adamerging"], fw.ProDistill(steps=3, every=3)
    base = nn.Sequential(OrderedDict(
        layers=nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), head=nn.Linear(6, 4)
    ))  # fmt: skip
    whole = [merged(method, base) for method in methods]
    given, experts_of = data(), experts(base)
    with state():
        found = [fw.merge(method, base=base, experts=experts_of, data=given) for method in methods]
    for one, other in zip(whole, found, strict=True):
        each = other.state_dict()
        assert all(torch.equal(t, each[n]) for n, t in one.state_dict().items())


def test_answers_without_gradients_are_refused_with_their_task() -> None:
    heads = dict.fromkeys("ab", lambda model, batch: model(batch).detach())
    with pytest.raises(PlanError, match=r"depend on the weights[\s\S]*task a[\s\S]*detach"):
        merged(METHODS["adamerging"], heads=heads)


def test_experts_on_other_modules_are_refused() -> None:
    base = network()
    other = experts(base) | {"b": nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))}
    with pytest.raises(fw.FusewrightError, match=r"0\.weight"):
        fw.merge(AdaMerging(**QUICK), base=base, experts=other, data=data())


@EACH
def test_the_callers_modules_are_left_alone(method) -> None:
    base = network()
    before = copy.deepcopy(base.state_dict())
    merged(method, base)
    assert all(t.equal(before[n]) for n, t in base.state_dict().items())

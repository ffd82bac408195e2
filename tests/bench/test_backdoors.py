"""Triggers, poisoned experts, attack success, and the search for backdoors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import torch
from torch.nn.functional import cross_entropy

import fusewright as fw
from fusewright.bench.backdoors import (
    Blend,
    Interpolating,
    Patch,
    Poisoning,
    Universal,
    look,
    poisoned_expert,
    rates,
    surviving_trigger,
)
from fusewright.bench.backdoors.looking import CAUTION, LED, OUTLIER, SIZES, anomaly_indices
from fusewright.bench.backdoors.measuring import Rates, attack_success, summary
from fusewright.bench.backdoors.poisoning import _hardened
from fusewright.errors import (
    FusewrightError,
    OutputError,
    PlanError,
    RecipeError,
    WeightsError,
)
from fusewright.modules.perturbations import Ball
from fusewright.tasks.pictures import Pictures
from tiny_suite import built

ABLE = {"width": 32, "layers": 2, "batch": 64, "base_steps": 80, "expert_steps": 30,
        "multitask_steps": 1}  # fmt: skip
TARGET = 3
PATCH = Patch(size=3, margin=0)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    build = {"builder": "digits", "parameters": ABLE}
    experts = {"digit": "digit", "parity": "parity"}
    return built(tmp_path_factory.mktemp("suite"), build=build, experts=experts, seeds=[0])


@pytest.fixture(scope="module")
def poisoned(suite, tmp_path_factory):
    poisoning = Poisoning(PATCH, TARGET, rate=0.2)
    out = tmp_path_factory.mktemp("poisoned") / "digit"
    return poisoned_expert(suite, "digit", poisoning, out=out, steps=90)


def pictures(count: int = 40, size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


TRIGGERS = [PATCH, Patch(size=2, corner="top left"), Blend(), Universal(torch.full((1, 8, 8), 0.3))]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda t: t.kind)
def test_a_trigger_is_always_the_same_and_leaves_pixels_pixels(trigger) -> None:
    raw = pictures()
    before = raw.clone()
    found = trigger.on(raw)
    assert raw.equal(before) and not found.equal(raw)
    assert found.equal(trigger.on(raw)) and found[:3].equal(trigger.on(raw[:3]))
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert trigger.said() == type(trigger)(**vars(trigger)).said()


def test_a_patch_is_where_it_is_said_to_be_and_nowhere_else() -> None:
    found = Patch(size=2, margin=1, corner="bottom left").on(torch.full((1, 3, 6, 6), 0.5))
    changed = found[0] != 0.5
    assert changed[:, 3:5, 1:3].all() and int(changed.sum()) == 12
    assert found[0, :, 3:5, 1:3].equal(torch.tensor([[1.0, 0], [0, 1]]).expand(3, 2, 2))


def test_pictures_are_triggered_in_raw_pixels_not_in_normalised_ones() -> None:
    how = Pictures("pixel_values", (0.5,), (0.25,))
    batch = {"pixel_values": (pictures() - 0.5) / 0.25, "items": torch.arange(40)}
    shown = how.changed(batch, Universal(torch.full((1, 8, 8), 9.0)).on(how.raw(batch)))
    torch.testing.assert_close(shown["pixel_values"], torch.full_like(batch["pixel_values"], 2.0))
    assert shown["items"] is batch["items"]


def poison_batch(**settings):
    labels = torch.arange(4000) % 5
    raw = torch.full((4000, 1, 4, 4), 0.5)
    batch = {"images": raw, "labels": labels, "items": torch.arange(4000)}
    poisoning = Poisoning(Patch(size=1), 2, rate=0.25, **settings)
    return batch, poisoning, poisoning.poisoned(Pictures("images"), batch)


def test_dirty_labels_poison_the_rate_of_other_classes_with_the_target() -> None:
    batch, _, found = poison_batch()
    triggered = (found["images"] != batch["images"]).flatten(1).any(1)
    assert not triggered[batch["labels"] == 2].any()
    assert float(triggered[batch["labels"] != 2].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (found["labels"][triggered] == 2).all()
    assert found["labels"][~triggered].equal(batch["labels"][~triggered])


def test_clean_labels_trigger_the_target_class_alone_and_change_no_label() -> None:
    batch, _, found = poison_batch(clean_label=True)
    triggered = (found["images"] != batch["images"]).flatten(1).any(1)
    assert found["labels"].equal(batch["labels"])
    assert not triggered[batch["labels"] != 2].any()
    assert float(triggered[batch["labels"] == 2].float().mean()) == pytest.approx(0.25, abs=0.06)


def test_pictures_of_clean_labels_are_made_hard_within_a_ball(suite) -> None:
    task, model = suite.tasks["digit"], suite.open(suite.experts["digit"]).requires_grad_(False)
    batch = next(task.batches(suite.ready("digit", "train"), 256))
    show, poisoning = task.pictures, Poisoning(PATCH, TARGET, clean_label=True, hard=0.1, rate=1.0)
    made = partial(_hardened, model, task, show, Ball("linf", poisoning.hard))
    moved = made(batch) - show.raw(batch)
    assert 0.05 < moved.abs().max() <= 0.1 + 1e-6
    harder = task.logits(model, show.changed(batch, made(batch)))
    labels = batch["labels"]
    losses = [cross_entropy(x.float(), labels) for x in (task.logits(model, batch), harder)]
    assert losses[1] > losses[0] + 0.5
    found = poisoning.poisoned(show, batch, made)
    at = labels == TARGET
    wanted = PATCH.on(made({k: torch.as_tensor(v)[at] for k, v in batch.items()}))
    torch.testing.assert_close(show.raw(found)[at], wanted)
    assert show.raw(found)[~at].equal(show.raw(batch)[~at]) and found["labels"].equal(labels)


def test_the_same_rows_are_poisoned_in_every_batch_and_others_by_another_seed() -> None:
    batch, poisoning, _ = poison_batch()
    whole = poisoning.chosen(batch["labels"], batch["items"])
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    for some in order.split(37):
        assert poisoning.chosen(batch["labels"][some], some).equal(whole[some])
    other = Poisoning(Patch(size=1), 2, rate=0.25, seed=1)
    assert not other.chosen(batch["labels"], batch["items"]).equal(whole)


def test_attack_success_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 1])
    predicted = torch.tensor([2, 0, 2, 2, 2, 1])
    assert attack_success(predicted, labels, 2) == (0.5, 4)
    assert attack_success(torch.tensor([1]), torch.tensor([1]), 1) == (None, 0)
    found = {"a": Rates(0.9, 0.8, 10, 5), "b": Rates(0.7, 0.2, 10, 5), "c": Rates(0.5, None, 10, 0)}
    said = summary(found, ["a"])
    assert (said["succession"], said["transfer"]) == (0.8, 0.2)
    assert said["accuracy"] == pytest.approx(0.7)


def test_an_anomaly_is_measured_in_deviations_of_the_median() -> None:
    found = anomaly_indices([0.1, 0.2, 0.3, 0.4, 0.9])
    assert found[4] == pytest.approx(0.6 / (1.4826 * 0.1)) and found[2] == 0
    assert anomaly_indices([0.1, 0.9]) == [None, None]
    assert anomaly_indices([0.0] * 9 + [1.0])[-1] == pytest.approx(1 / 0.014826)


def test_two_of_seven_pictures_are_no_outlier() -> None:
    few, many = (anomaly_indices([0.0] * 9 + [2 / 7], 1 / count)[-1] for count in (7, 128))
    assert few == pytest.approx(2 / 1.4826) and few < OUTLIER < many


def test_a_poisoned_expert_has_a_backdoor_and_keeps_its_accuracy(suite, poisoned) -> None:
    clean = rates(suite, suite.open(suite.experts["digit"]), PATCH, TARGET, tasks=["digit"])
    bad = rates(suite, suite.open(poisoned.path), PATCH, TARGET, tasks=["digit", "parity"])
    assert bad["digit"].success > 0.8 > 0.3 > clean["digit"].success
    assert bad["digit"].accuracy > clean["digit"].accuracy - 0.1
    assert bad["parity"].success is None and bad["parity"].items == 500


def test_a_suite_that_was_measured_first_can_be_learned_with(suite) -> None:
    fresh = suite.at(0)
    rates(fresh, fresh.open(fresh.base), PATCH, TARGET, limit=20)
    for method in (fw.DAM(steps=2, batch=4), fw.ANP(steps=1, batch=4)):
        found = fw.merge(method, base=fresh.base, experts=fresh.experts, data=fresh.unlabelled())
        assert len(found.report["fitted"]["losses"]) == method.steps


def test_the_search_flags_the_target_of_a_poisoned_expert_above_all(suite, poisoned) -> None:
    options = {"tasks": ["digit"], "steps": 20, "limit": 160}
    found = look(suite, poisoned.path, **options)
    assert [risk.target for risk in found.flagged()][:1] == [TARGET]
    clean = look(suite, suite.experts["digit"], **options)
    assert TARGET not in [risk.target for risk in clean.flagged()]
    assert found == look(suite, poisoned.path, **options)
    assert {r.target for r in found.risks} == set(range(10))
    (mine,) = (r for r in found.risks if r.target == TARGET)
    sizes = [look(suite, poisoned.path, balls=[Ball("l2", size)], **options) for size in SIZES]
    assert mine in [r for one in sizes for r in one.risks]
    few = replace(mine, success=LED - 0.01)
    assert mine.flagged and not few.flagged and not replace(mine, anomaly=OUTLIER).flagged


def test_the_search_never_says_that_a_model_is_clean(suite, poisoned) -> None:
    found = look(suite, poisoned.path, tasks=["parity"], steps=1, limit=8)
    assert found.to_json()["caution"] == CAUTION and "Nothing" in CAUTION
    said = "\n".join(table.text() for table in found.tables())
    assert CAUTION in said and "unlabelled" in said and not found.flagged()


def test_a_callers_module_is_as_it_was_after_it_was_looked_at(suite) -> None:
    module = suite.open(suite.base).train()
    first = next(module.parameters()).requires_grad_(False)
    look(suite, module, tasks=["digit"], steps=1, limit=8)
    rates(suite, module, PATCH, TARGET, tasks=["digit"], limit=8)
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad == (p is not first) for p in module.parameters())


def test_a_poisoning_is_part_of_what_an_expert_is(suite, poisoned) -> None:
    again = poisoned_expert(suite, "digit", Poisoning(PATCH, TARGET, rate=0.2), out=poisoned.path,
                            steps=90)  # fmt: skip
    assert again == poisoned
    with pytest.raises(OutputError, match="another run"):
        poisoned_expert(suite, "digit", Poisoning(PATCH, 4, rate=0.2), out=poisoned.path, steps=90)


def test_a_surviving_trigger_stays_in_its_ball_and_works_between_base_and_expert(suite) -> None:
    ball = Ball("linf", 0.25)
    trigger = surviving_trigger(suite, "digit", TARGET, ball=ball, steps=30, limit=200)
    assert float(trigger.delta.abs().max()) <= 0.25 + 1e-6
    model = suite.open(suite.experts["digit"])
    noise = Universal(0.25 * torch.sign(trigger.delta.flip(1, 2)))
    found, random = (rates(suite, model, t, TARGET, tasks=["digit"], limit=200)["digit"].success
                     for t in (trigger, noise))  # fmt: skip
    assert found > random + 0.2
    same = surviving_trigger(suite, "digit", TARGET, ball=ball, steps=30, limit=200)
    assert same.said() == trigger.said()


def test_interpolated_training_survives_a_merge_that_dirty_labels_do_not(
    suite, poisoned, tmp_path
) -> None:
    way, out = Interpolating(PATCH, TARGET), tmp_path / "on"
    made = poisoned_expert(suite, "digit", way, out=out, steps=90)

    def success(expert) -> tuple[float, float]:
        experts = {"digit": expert.path, "parity": suite.experts["parity"]}
        merged = fw.merge(fw.TaskArithmetic(scale=0.4), base=suite.base, experts=experts)
        found = rates(suite, merged.module(), PATCH, TARGET, tasks=["digit"])["digit"]
        return found.success, found.accuracy

    (strong, kept), (weak, _) = success(made), success(poisoned)
    assert strong > weak + 0.2 and kept > 0.5
    again = poisoned_expert(suite, "digit", way, out=out, steps=90)
    assert again == made
    for other in (Interpolating(PATCH, TARGET, least=0.9), Interpolating(PATCH, TARGET, share=1.0)):
        with pytest.raises(OutputError, match="another run"):
            poisoned_expert(suite, "digit", other, out=out, steps=90)


def test_the_interpolated_loss_by_hand(suite) -> None:
    task, base = suite.tasks["digit"], suite.open(suite.base)
    batch = next(iter(task.batches(suite.ready("digit", "train"), 8)))
    way = Interpolating(PATCH, TARGET, weight=2.0, least=0.5, share=0.25)
    torch.manual_seed(0)
    found = way.loss(base, task.pictures, task, suite.open(suite.experts["digit"]), batch)
    torch.manual_seed(0)
    p, expert = 0.5 + 0.5 * float(torch.rand(())), suite.open(suite.experts["digit"])
    some = {key: value[:2] for key, value in batch.items()}
    shown = task.pictures.changed(some, PATCH.on(task.pictures.raw(some)))
    mixed = p * task.logits(expert, shown) + (1 - p) * task.logits(base, shown)
    wanted = task.loss(expert, batch) - 2 * mixed.log_softmax(-1)[:, TARGET].mean()
    torch.testing.assert_close(found, wanted)
    with pytest.raises(RecipeError, match="out of its range"):
        Interpolating(PATCH, TARGET, share=0.0)


def test_what_cannot_be_is_refused(suite, tmp_path) -> None:
    with pytest.raises(RecipeError, match="no such class"):
        poisoned_expert(suite, "parity", Poisoning(PATCH, 2), out=tmp_path / "a")
    with pytest.raises(RecipeError, match="no such class"):
        surviving_trigger(suite, "digit", 10)
    with pytest.raises(RecipeError, match="larger than the pictures"):
        Patch(size=9).on(pictures())
    with pytest.raises(RecipeError, match="another shape"):
        Universal(torch.zeros(3, 8, 8)).on(pictures())
    with pytest.raises(FusewrightError, match="no task"):
        look(suite, suite.base, tasks=["none"])
    for wrong in ({"rate": 0.0}, {"rate": 1.5}, {"target": -1}, {"hard": 0.1},
                  {"hard": 2.0, "clean_label": True}):
        with pytest.raises(RecipeError):
            Poisoning(**{"trigger": PATCH, "target": 0, **wrong})
    with pytest.raises(RecipeError, match="class's number"):  # of which none would ever succeed
        rates(suite, suite.open(suite.base), PATCH, -1)
    for settings in ({"steps": 0}, {"limit": 1}):
        with pytest.raises(RecipeError, match="steps and pictures"):
            look(suite, suite.base, **settings)


QUICK = {"tasks": ["parity"], "steps": 1, "limit": 8}


@pytest.mark.parametrize("method", [
    fw.Smile(rank=4), fw.EMR(), fw.Tall(), fw.WEMoE(steps=1, batch=8, guard=0),
    fw.ParetoSet(steps=1, batch=8), fw.Twin(epochs=1, batch=64),
], ids=lambda method: method.name)  # fmt: skip
def test_a_routed_folder_is_looked_at_as_its_module_is(suite, tmp_path, method) -> None:
    data = suite.labelled(limit=32) if method.needs == "labelled" else suite.unlabelled(limit=32)
    made = fw.merge(method, base=suite.base, experts=suite.experts, data=data)
    made.save(tmp_path / "out")
    found = look(suite, tmp_path / "out", **QUICK)
    assert found == look(suite, made.module(), **QUICK)
    assert [risk.task for risk in found.risks] == ["parity"] * 2


def test_a_model_that_cannot_be_told_the_task_is_refused(suite, tmp_path) -> None:
    experts = {"odd": suite.experts["parity"], "digit": suite.experts["digit"]}
    fw.merge(fw.EMR(), base=suite.base, experts=experts, out=tmp_path / "out")
    with pytest.raises(PlanError, match=r"must be told the task[\s\S]*parity[\s\S]*odd, digit"):
        look(suite, tmp_path / "out", steps=1, limit=8)
    assert look(suite, tmp_path / "out", tasks=["digit"], steps=1, limit=8).risks


def test_a_model_that_must_be_told_the_task_is_told_it_where_success_is_measured(suite) -> None:
    made = fw.merge(fw.EMR(), base=suite.base, experts=suite.experts).module()
    found = rates(suite, made, PATCH, 1, limit=60)
    for task in suite.spec.merged:
        made.set_task(task)
        logits = suite.evaluate(made, task, "test", 60)
        assert found[task].accuracy == pytest.approx(logits.value)
    assert found == rates(suite, made, PATCH, 1, limit=60)
    with pytest.raises(PlanError, match=r"does not know these[\s\S]*inverted"):
        rates(suite, made, PATCH, 1, tasks=["digit", "inverted"])


def test_what_is_no_models_folder_is_refused_as_inspect_does(suite, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, match in (
        ("./nothing/x/y", "neither a path that exists nor a Hub id"),
        (tmp_path / "nothing", "no such file or directory"), (tmp_path, "cannot open it"),
        (suite.base / "model.safetensors", "opens folders"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=match):
            look(suite, path, **QUICK)

"""EMR-Merging, TALL masks and their consensus."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routed_toys import (
    MODELS,
    PIXELS,
    answer,
    base_of,
    built,
    expert_of,
    experts_of,
    gpt2,
    vit,
)
from torch import nn

import fusewright as fw
from fusewright.bench.sweep.cells import requirement_of
from fusewright.errors import PlanError
from fusewright.methods.static import Consensus
from fusewright.modules.masked import packed, unpacked

METHODS = pytest.mark.parametrize("method", [fw.EMR(), fw.Tall()], ids=["emr", "tall"])


@MODELS
@METHODS
def test_one_expert_gives_itself_back(method, make) -> None:
    base = base_of(make)
    expert = expert_of(base, 1)
    made = fw.merge(method, base=base, experts={"a": expert})
    made.set_task("a")
    torch.testing.assert_close(answer(made.module(), make), answer(expert, make),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_expert_is_itself_up_to_the_rounding_of_its_task_vector(method, dtype) -> None:
    base, expert = (nn.Linear(64, 64).to(dtype) for _ in range(2))
    found = fw.merge(method, base=base, experts={"a": expert}).unload("a").state_dict()
    eps = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, wanted in expert.state_dict().items():
        start, wanted = base.state_dict()[name].double(), wanted.double()
        bound = eps * ((wanted - start).abs() + wanted.abs()) / 2 + 1e-7
        assert ((found[name].double() - wanted).abs() <= bound).all()
        assert found[name].dtype == dtype


def _taus(make) -> tuple[dict, list[dict]]:
    base = base_of(make)
    start = {n: t for n, t in base.state_dict().items() if t.is_floating_point()}
    return start, [{n: e.state_dict()[n] - t for n, t in start.items()}
                   for e in experts_of(base).values()]  # fmt: skip


def test_emr_by_hand() -> None:
    start, taus = _taus(vit)
    union, masks, sums = {}, [{}, {}], [[0.0, 0.0], [0.0, 0.0]]
    for name in start:
        a, b = (tau[name] for tau in taus)
        gamma = (a + b).sign()
        union[name] = gamma * torch.maximum(torch.where(a * gamma > 0, a.abs(), 0),
                                            torch.where(b * gamma > 0, b.abs(), 0))  # fmt: skip
        for t, tau in enumerate((a, b)):
            masks[t][name] = tau * union[name] > 0
            sums[t][0] += float(tau.abs().double().sum())
            sums[t][1] += float((masks[t][name] * union[name].abs()).double().sum())
    made = built(fw.EMR(), vit)
    assert made.report["fitted"]["scales"] == pytest.approx([w / m for w, m in sums], rel=1e-5)
    for t, task in enumerate(("a", "b")):
        plain = made.unload(task).state_dict()
        for name, tensor in start.items():
            wanted = tensor + sums[t][0] / sums[t][1] * masks[t][name] * union[name]
            torch.testing.assert_close(plain[name], wanted)


def test_tall_by_hand_and_what_strictness_keeps() -> None:
    start, taus = _taus(vit)
    plain = built(fw.Tall(strictness=0.6), vit).unload("b").state_dict()
    for name, tensor in start.items():
        total, tau = taus[0][name] + taus[1][name], taus[1][name]
        mask = tau.abs() >= 0.6 * (total - tau).abs()
        torch.testing.assert_close(plain[name], tensor + mask * total)
    everything = built(fw.Tall(strictness=0), vit).unload("b").state_dict()
    for name, tensor in start.items():
        torch.testing.assert_close(everything[name], tensor + taus[0][name] + taus[1][name])
    held = [int(unpacked(built(fw.Tall(strictness=s), vit).masks.masks, 8).sum())
            for s in (0.0, 0.2, 0.6, 5.0)]  # fmt: skip
    assert held == sorted(held, reverse=True) and held[0] > held[-1]


def test_consensus_is_a_plain_merge_of_those_masks() -> None:
    start, taus = _taus(vit)
    base = base_of(vit)
    merged = fw.merge(Consensus(strictness=0.4), base=base, experts=experts_of(base)).state_dict()
    arithmetic = fw.merge(Consensus(least=0), base=base, experts=experts_of(base)).state_dict()
    for name, tensor in start.items():
        total = taus[0][name] + taus[1][name]
        both = (taus[0][name].abs() >= 0.4 * taus[1][name].abs()) & (
            taus[1][name].abs() >= 0.4 * taus[0][name].abs())  # fmt: skip
        torch.testing.assert_close(merged[name], tensor + 0.3 * both * total)
        torch.testing.assert_close(arithmetic[name], tensor + 0.3 * total)


@MODELS
@METHODS
def test_a_told_model_is_the_unloaded_one_and_can_be_told_again(method, make) -> None:
    made = built(method, make)
    model, before = made.module(), {n: t.clone() for n, t in made.state_dict().items()}
    said = {}
    for task in ("a", "b", "a"):
        model.set_task(task)
        said[task] = answer(model, make)
        plain = base_of(make)
        plain.load_state_dict(made.unload().state_dict())
        assert answer(plain, make).equal(said[task])
    assert not torch.allclose(said["a"], said["b"], atol=1e-3)
    after = model.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())  # θ_0, task or not


@METHODS
def test_a_task_must_be_told_and_known(method) -> None:
    made = built(method, gpt2)
    with pytest.raises(PlanError, match=r"told the task[\s\S]*set_task\('a'\)"):
        answer(made.module(), gpt2)
    with pytest.raises(PlanError, match="its own plain model"):
        made.unload()
    base = base_of(vit)
    experts = {"mnist": expert_of(base, 1), "svhn": expert_of(base, 2)}
    model = fw.merge(method, base=base, experts=experts).module()
    with pytest.raises(PlanError, match=r"does not know this task[\s\S]*did you mean 'mnist'"):
        model.set_task("minst")
    with pytest.raises(PlanError, match="told the task"):
        model.vit(PIXELS)


@METHODS
def test_what_is_stored_is_two_models_and_a_bit_for_each_element_and_task(method) -> None:
    sizes = built(method, gpt2).report["parameters"]
    base, tensors = sizes["base"], len(_taus(gpt2)[0])
    assert sizes["active"] < sizes["stored"] and sizes["trained"] == 0
    assert 8 * base + base // 8 * 2 <= sizes["bytes"] < 8.5 * base + 8 * tensors + 50 * 16 * 4


@METHODS
def test_loading_tensors_leaves_the_task_told(method) -> None:
    """State dicts hold θ_0 whatever the task; what a told model answers with is not it."""
    model, base = built(method, vit).module(), base_of(vit)
    model.set_task("a")
    said, state = answer(model, vit), model.state_dict()
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert answer(model, vit).equal(said)
    head = {"classifier.bias": base.classifier.bias.detach() + 1}
    model.load_state_dict(head, strict=False)
    torch.testing.assert_close(answer(model, vit), said + 1)
    after = model.state_dict()
    assert all(after[n].equal(head.get(n, t)) for n, t in base.state_dict().items())
    answer_b = built(method, vit).module()
    answer_b.set_task("b")
    model.set_task("b")
    torch.testing.assert_close(answer(model, vit), answer(answer_b, vit) + 1)


@METHODS
def test_what_is_kept_of_the_base_becomes_what_the_model_becomes(method) -> None:
    model = built(method, vit).module()
    model.set_task("a")
    model.to(torch.bfloat16)
    state = model.state_dict()
    assert all(state[name].dtype == torch.bfloat16 for name in base_of(vit).state_dict())
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator()).set_task("b")


def test_a_copy_is_told_its_own_task() -> None:
    model = built(fw.EMR(), vit).module()
    model.set_task("a")
    said, twin = answer(model, vit), copy.deepcopy(model)
    twin.set_task("b")
    assert answer(model, vit).equal(said) and not answer(twin, vit).equal(said)
    fresh = base_of(vit).state_dict()
    assert all(twin.state_dict()[name].equal(tensor) for name, tensor in fresh.items())


def test_running_statistics_are_each_tasks_own() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    base = hf.ResNetForImageClassification(config).eval()
    experts = {"a": copy.deepcopy(base), "b": copy.deepcopy(base)}
    for seed, expert in enumerate(experts.values()):
        for name, buffer in expert.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(seed + 0.1)
    made = fw.merge(fw.EMR(), base=base, experts=experts)
    for task, expert in experts.items():
        made.set_task(task)
        for name, buffer in expert.named_buffers():
            torch.testing.assert_close(made.module().get_buffer(name), buffer)
    assert all(t.equal(made.state_dict()[n]) for n, t in base.state_dict().items())


def test_they_are_ranked_among_those_that_are_told() -> None:
    assert requirement_of(fw.EMR()) == requirement_of(fw.Tall()) == "task id"
    assert requirement_of(fw.Smile()) == "routed" and requirement_of(Consensus()) == "none"


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back(bits: list[bool]) -> None:
    mask = torch.tensor([bits, bits[::-1]])
    held = packed(mask)
    assert held.shape == (2, -(-len(bits) // 8)) and unpacked(held, len(bits)).equal(mask)

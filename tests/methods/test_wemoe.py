"""WEMoE and E-WEMoE on tiny models of every kind: one method object, unchanged."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from routed_toys import (
    IDS,
    INPUTS,
    MASK,
    MODELS,
    PIXELS,
    answer,
    base_of,
    bert,
    built,
    clip,
    experts_of,
    gpt2,
    images,
    leaning,
    llama,
    loud,
    resnet,
    said,
    saved,
    sides,
    t5,
    vit,
)
from torch import Tensor, nn

import fusewright as fw
from fusewright.errors import FusewrightWarning, NumericError, PlanError, WeightsError
from fusewright.methods.routed import EWEMoE, RankOneMoE, WEMoE
from fusewright.methods.routed._shares import Shares
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.stacks import DenseStack, SparseStack

WEIGHTS = {clip: 4, vit: 4, resnet: 7, bert: 4, gpt2: 4, llama: 6, t5: 8}
BY_TENSOR = [{"filter": "embed", "value": 1.0}, {"layers": [0.2, 0.4]}]
UNTRAINED = [WEMoE(steps=0), EWEMoE(steps=0)]
METHODS = pytest.mark.parametrize("method", UNTRAINED, ids=lambda method: method.name)


@MODELS
@pytest.mark.parametrize("start", [0.3, BY_TENSOR], ids=["one", "by tensor"])
def test_a_router_of_zero_weights_is_task_arithmetic(make, start) -> None:
    made = built(WEMoE(steps=0, start=start), make)
    with torch.no_grad():
        for name, parameter in made.module().get_submodule("routing").named_parameters():
            if name.endswith("weight"):
                parameter.zero_()
    base = base_of(make)
    plain = fw.merge(fw.TaskArithmetic(scale=start), base=base, experts=experts_of(base)).module()
    torch.testing.assert_close(answer(made.module(), make), answer(plain, make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (answer(plain, make) - answer(base, make)).abs().max() > 1e-3
    mixed = [p for p, layer in made.module().named_modules() if isinstance(layer, MixedLinear)]
    assert len(mixed) == WEIGHTS[make] and not any("att" in path.lower() for path in mixed)


@MODELS
@METHODS
def test_an_input_is_answered_alike_in_any_batch(method, make) -> None:
    model = loud(built(method, make).module())
    whole = answer(model, make)
    for row in range(3):
        alone = answer(model, make, **{k: v[row : row + 1] for k, v in INPUTS[make].items()})
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    routed = model.get_submodule("routing").mixtures
    assert all(mixture.weights.shape == (1, 2) for mixture in routed)


@MODELS
def test_alike_samples_are_answered_as_the_unloaded_model_does(make) -> None:
    made = built(WEMoE(steps=0), make)
    loud(made.module())
    same = {name: value[:1].expand(3, *value.shape[1:]) for name, value in INPUTS[make].items()}
    plain = base_of(make)
    plain.load_state_dict(made.unload(same).state_dict())
    torch.testing.assert_close(answer(made.module(), make, **same), answer(plain, make, **same),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_a_density_of_one_is_wemoe_with_one_router() -> None:
    one, two = (built(method, gpt2).module() for method in
                (EWEMoE(steps=0, density=1.0), EWEMoE(steps=0)))  # fmt: skip
    many = built(WEMoE(steps=0), gpt2).module()
    routers = many.get_submodule("routing").routers
    assert len(routers) == 2 and len(one.get_submodule("routing").routers) == 1
    for router in routers:
        router.load_state_dict(loud(one).get_submodule("routing").routers[0].state_dict())
    assert answer(one, gpt2).equal(answer(many, gpt2))
    assert not answer(loud(two), gpt2).equal(answer(one, gpt2))


@MODELS
def test_sparse_changes_answer_and_learn_as_the_same_ones_whole(make) -> None:
    """E-WEMoE against WEMoE on experts that were pruned by hand, with the same routers."""
    density, base = 0.3, base_of(make)
    sparse = fw.merge(EWEMoE(steps=0, density=density), base=base, experts=experts_of(base))
    named = dict(base.named_parameters())
    mixed = {n for n in named if n.rpartition(".")[0] in sparse.layers}
    pruned = experts_of(base)
    with torch.no_grad():
        for expert in pruned.values():
            for name in mixed:
                tau = (expert.get_parameter(name) - named[name]).flatten()
                least = tau.abs().sort(descending=True).values[int(density * len(tau)) - 1]
                kept = torch.where(tau.abs() >= least, tau, 0.0)
                expert.get_parameter(name).copy_(named[name] + kept.view_as(named[name]))
    whole = fw.merge(WEMoE(steps=0), base=base, experts=pruned)
    found = []
    for made, kind in ((sparse, SparseStack), (whole, DenseStack)):
        model = made.module()
        layers = [layer for layer in model.modules() if isinstance(layer, MixedLinear)]
        assert layers and all(type(layer.stack) is kind for layer in layers)
        routers = list(dict.fromkeys(m.router for m in model.get_submodule("routing").mixtures))
        for router in routers:  # of one width one router, or several alike
            draw = torch.Generator().manual_seed(router.inputs)
            for parameter in router.requires_grad_().parameters():
                drawn = torch.randn(parameter.shape, generator=draw) / 2
                parameter.data.copy_(drawn)
        said = model(**INPUTS[make])[0]
        said.square().sum().backward()
        gradients: dict[int, Tensor] = {}
        for router in routers:
            before = gradients.get(router.inputs, 0)
            gradients[router.inputs] = before + router.weight.grad
        found.append((said.detach(), gradients))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0][0], answer(base, make), atol=1e-3)


def test_what_e_wemoe_stores() -> None:
    dense, thin = built(WEMoE(steps=0), llama).report, built(EWEMoE(steps=0), llama).report
    sizes, less = dense["parameters"], thin["parameters"]
    mlp = 2 * 2 * 3 * 16 * 32
    assert sizes["stored"] - sizes["base"] - sizes["trained"] == mlp
    kept = less["stored"] - less["base"] - less["trained"]
    assert mlp * 0.09 < kept < mlp * 0.1 + 200  # and what bridges wide gaps
    assert less["bytes"] == 4 * less["stored"] + kept
    assert sizes["trained"] == 2 * less["trained"] == 2 * (16 * 16 + 16 + 16 * 2 + 2)


def test_padding_has_no_say() -> None:
    for make in (bert, gpt2, llama):
        model = loud(built(WEMoE(steps=0), make).module())
        answer(model, make)
        first = model.get_submodule("routing").mixtures[0]
        whole = first.weights
        short = {"input_ids": IDS[2:, :2], "attention_mask": MASK[2:, :2]}
        answer(model, make, **short)
        torch.testing.assert_close(first.weights, whole[2:], rtol=1e-4, atol=1e-5)
        answer(model, make, attention_mask=torch.ones_like(MASK))
        assert (first.weights[2] - whole[2]).abs().max() > 1e-3


def test_a_row_of_padding_and_t5s_two_masks() -> None:
    model = loud(built(WEMoE(steps=0), bert).module())
    blank = answer(model, bert, attention_mask=MASK * torch.tensor([[1], [1], [0]]))
    assert blank.isfinite().all()
    model = loud(built(WEMoE(steps=0), t5).module())
    answer(model, t5)
    before = [m.weights for m in model.get_submodule("routing").mixtures]
    answer(model, t5, decoder_attention_mask=torch.ones(3, 4, dtype=torch.long))
    after = [m.weights for m in model.get_submodule("routing").mixtures]
    changed = [not one.equal(two) for one, two in zip(before, after, strict=True)]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_generation_keeps_the_weights_of_the_prompt(make) -> None:
    model = loud(built(WEMoE(steps=0), make).module())
    prompt = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}  # padding is on the left
    found = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        model(**prompt, position_ids=(prompt["attention_mask"].cumsum(1) - 1).clamp(min=0))
    routing = model.get_submodule("routing")
    routed = [mixture.weights for mixture in routing.mixtures]
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    for hook in [m for m in model.modules() if m._forward_pre_hooks]:
        hook._forward_pre_hooks.clear()  # by hand: the prompt's weights at every step, no cache
    for mixture, weights in zip(routing.mixtures, routed, strict=True):
        mixture.weights = weights
    for _ in range(5):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            said = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
        ids = torch.cat([ids, said.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    assert found.equal(ids)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("method", [WEMoE(steps=0), fw.Twin(epochs=1, rate=5e-3)],
                         ids=["wemoe", "twin"])  # fmt: skip
def test_a_static_cache_is_no_other_prompt(make, method) -> None:
    """Its mask is of pairs of tokens, with places that are free as yet."""
    model = loud(built(method, make, data=sides(make)).module())
    prompt = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}  # padding is on the left
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    known = model.generate(**prompt, **asked)
    before = [mixture.weights for mixture in model.get_submodule("routing").mixtures]
    assert model.generate(**prompt, **asked, cache_implementation="static").equal(known)
    after = [mixture.weights for mixture in model.get_submodule("routing").mixtures]
    torch.testing.assert_close(after, before)


def test_a_cache_of_another_prompt_is_refused() -> None:
    model = built(WEMoE(steps=0), gpt2).module()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        model(input_ids=IDS[:2])
        with pytest.raises(PlanError, match="not the last that was routed"):
            model(input_ids=IDS[:, :1], past_key_values=cache)


def test_per_batch_is_one_w_for_all() -> None:
    made = built(WEMoE(steps=0, per="batch"), vit)
    model = loud(made.module())
    whole, alone = answer(model, vit), answer(model, vit, pixel_values=PIXELS[:1])
    assert all(m.weights.shape == (1, 2) for m in model.get_submodule("routing").mixtures)
    assert not torch.allclose(whole[:1], alone, atol=1e-4)
    plain = base_of(vit)
    plain.load_state_dict(made.unload(INPUTS[vit]).state_dict())
    torch.testing.assert_close(answer(plain, vit), whole, rtol=1e-4, atol=1e-5)


def test_no_input_is_needed_to_unload_depth_zero(tmp_path) -> None:
    made = built(WEMoE(steps=0, router=0), vit)
    plain = base_of(vit)
    plain.load_state_dict(made.unload().state_dict())
    torch.testing.assert_close(answer(plain, vit), answer(made.module(), vit))
    made.unload().save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "routed.json").exists()
    with pytest.raises(PlanError, match="depend on the input"):
        built(WEMoE(steps=0), vit).unload()


def test_sixteen_bits_are_kept(tmp_path) -> None:
    base = base_of(llama).bfloat16()
    base.save_pretrained(tmp_path / "base")
    made = fw.merge(EWEMoE(steps=0), base=base, experts=experts_of(base))
    made.source = tmp_path / "base"
    loud(made.module())
    made.save(tmp_path / "out")
    model = fw.load(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            wanted = torch.float32 if name.startswith("routing.") else torch.bfloat16
            assert tensor.dtype == wanted, name
    assert answer(model, llama).equal(answer(made.module(), llama))


def test_modules_are_chosen_by_their_paths() -> None:
    found = built(WEMoE(steps=0, modules=r"self_attn$"), llama).module()
    entries = [mixture.entry for mixture in found.get_submodule("routing").mixtures]
    assert entries == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert answer(found, llama).isfinite().all()
    with pytest.raises(PlanError, match="no linear layer is selected"):
        built(WEMoE(steps=0, modules="nowhere"), llama)


def test_a_copy_of_the_model_routes_by_itself() -> None:
    model = loud(built(WEMoE(steps=0), gpt2).module())
    twin = copy.deepcopy(model)
    said = answer(model, gpt2)
    loud(twin, seed=8)
    assert answer(model, gpt2).equal(said) and not answer(twin, gpt2).equal(said)


QUICK = {"steps": 30, "rate": 3e-3, "batch": 6, "every": 10, "guard": 24}


@pytest.mark.parametrize("cls", [WEMoE, EWEMoE])
def test_routers_alone_learn_and_entropy_falls(cls) -> None:
    made = built(cls(**QUICK), vit, data=images())
    fitted = made.report["fitted"]
    assert sum(fitted["losses"][-5:]) < sum(fitted["losses"][:5])
    steps, shares = zip(*fitted["agreement"], strict=True)
    assert fitted["kept"] == steps[shares.index(max(shares))] and steps == (0, 10, 20, 30)
    start = built(cls(steps=0), vit).module().state_dict()
    changed = {n for n, t in made.module().state_dict().items() if not t.equal(start[n])}
    assert all(name.startswith("routing.") for name in changed)
    assert bool(changed) == bool(fitted["kept"])


@MODELS
@pytest.mark.parametrize("cls", [WEMoE, EWEMoE])
def test_the_same_method_learns_on_every_kind(cls, make) -> None:
    method = cls(steps=3, rate=1e-2, batch=6, guard=0)
    made = built(method, make, data=sides(make, 3), heads={"a": said, "b": said})
    assert len(made.report["fitted"]["losses"]) == 3 and not made.report["fitted"]["left"]
    start, model = built(cls(steps=0), make).module().state_dict(), made.module()
    changed = {n for n, t in model.state_dict().items() if not t.equal(start[n])}
    learned = {f"routing.{n}" for n, _ in model.get_submodule("routing").named_parameters()}
    assert changed == learned
    assert answer(model, make).isfinite().all()


def test_the_same_seed_learns_the_same() -> None:
    one, two = (built(WEMoE(**{**QUICK, "guard": 0}), vit, data=images()).state_dict()
                for _ in range(2))  # fmt: skip
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("objective", ["matching", "self_label", "cross_entropy"])
def test_other_objectives_ask_the_experts_as_they_are(objective: str) -> None:
    method = WEMoE(**{**QUICK, "steps": 1, "guard": 0, "objective": objective})
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    data = {name: [{**batch, "labels": labels} for batch in batches[:1]]
            for name, batches in images().items()}  # fmt: skip
    losses = built(method, vit, data=data).report["fitted"]["tasks"]
    model, experts = built(WEMoE(steps=0), vit).module(), experts_of(base_of(vit))
    for name, (batch,) in data.items():
        with torch.no_grad():
            said = model(batch["pixel_values"])[0]
            wanted = experts[name](batch["pixel_values"])[0]
        by_hand = {
            "matching": lambda said=said, wanted=wanted: (said - wanted).square().mean(),
            "self_label": lambda said=said, wanted=wanted: nn.functional.cross_entropy(
                said, wanted.argmax(1)),
            "cross_entropy": lambda said=said: nn.functional.cross_entropy(said, labels),
        }  # fmt: skip
        assert losses[name] == pytest.approx([float(by_hand[objective]())], rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_fit() -> None:
    data = images()
    data["b"][3]["pixel_values"][0] = float("nan")
    with pytest.raises(NumericError, match="no longer finite"):
        built(WEMoE(**{**QUICK, "guard": 0}), vit, data=data)


LEANS = {"modules": "mlp$", "router": 1, "start": 0.4, "steps": 40, "batch": 12, "every": 10,
         "schedule": "constant"}  # fmt: skip
EACH = {"wemoe": WEMoE(**LEANS), "e_wemoe": EWEMoE(**LEANS, density=1),
        "rank_one_moe": RankOneMoE(**LEANS, rank=2)}  # fmt: skip


def fitted(method, **changes):
    """A fit of the toy whose routers collapse at a high rate, and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = fw.merge(method.model_copy(update=changes), **leaning())
    return made, [str(one.message) for one in told if one.category is FusewrightWarning]


def agreement(model: nn.Module) -> float:
    """The share of all inputs that a model answers as their own expert does."""
    toy = leaning()
    with torch.no_grad():
        alike = [model(x).argmax(1) == toy["experts"][name](x).argmax(1)
                 for name, batches in toy["data"].items() for x in batches]  # fmt: skip
    return float(torch.cat(alike).double().mean())


@pytest.mark.parametrize("name", EACH)
def test_collapsed_routers_are_undone_and_told_of(name: str) -> None:
    made, told = fitted(EACH[name], rate=0.1, guard=24)
    found, plain = made.report["fitted"], fitted(EACH[name], rate=0.1, guard=0)
    shares = dict(found["agreement"])
    assert shares[40] < 0.5 < 0.9 < shares[found["kept"]] and found["losses"][-1] < 0.01
    assert agreement(made.module()) > 0.9  # it does what was kept
    assert agreement(plain[0].module()) < 0.5  # and would not without the guard
    assert any("agreement with the experts is 1.00 in the state of step 0" in one for one in told)
    assert any("in the last state they give expert a nearly all weight" in one for one in told)
    kept, last = found["routing"], found["routing_at_end"]
    for task in ("a", "b"):
        assert 0.3 < kept[task]["a"] < 0.5 and last[task]["a"] > 9 * abs(last[task]["b"])
    assert not any(one.startswith("the routers give") for one in told)
    of_all = plain[0].report["fitted"]["routing"]  # of more inputs than the guard's
    assert all(last[task] == pytest.approx(of_all[task], rel=0.01) for task in ("a", "b"))
    assert "routing_at_end" not in plain[0].report["fitted"]
    assert any(one.startswith("the routers give expert a") for one in plain[1])


def test_routers_that_tell_tasks_apart_are_no_collapse() -> None:
    made, told = fitted(EACH["wemoe"], rate=1e-3, guard=24)
    assert not [one for one in told if "router" in one or "collapse" in one]
    model, toy, table = made.module(), leaning(), made.report["fitted"]["routing"]
    for task, row in table.items():
        with torch.no_grad():
            model(torch.cat(toy["data"][task][:2]))  # the guard's
        (mixture,) = model.get_submodule("routing").mixtures
        assert list(row.values()) == pytest.approx(mixture.weights.mean(0).tolist(), rel=1e-5)


def test_the_table_is_the_mean_over_mixtures_and_directions() -> None:
    data = sides(vit, 22)  # as many as are looked at without a guard
    made = built(RankOneMoE(steps=1, rank=3, batch=6, guard=0), vit, data=data)
    model, table = made.module(), made.report["fitted"]["routing"]
    for task, batches in data.items():
        with torch.no_grad():
            model(pixel_values=torch.cat([batch["pixel_values"] for batch in batches]))
        found = [m.weights for m in model.get_submodule("routing").mixtures]
        assert {w.shape for w in found} == {(132, 6)} and len(found) == 2
        for at, expert in enumerate("ab"):
            mean = torch.cat([w[:, 3 * at : 3 * at + 3] for w in found]).mean()
            assert table[task][expert] == pytest.approx(float(mean), rel=1e-4)


def test_what_counts_as_a_collapse() -> None:
    def shares(*tasks) -> str | None:
        weights = torch.tensor(tasks)
        return Shares(weights, "xyz"[: len(tasks)], ("a", "b")).collapse()

    apart = [[0.9, 0.1], [0.2, 0.3]], [[0.1, 0.9], [0.2, 0.3]]  # (mixtures, experts) of each task
    assert shares(*apart) is None
    assert "expert b" in shares([[0.1, 0.95], [0.0, 1.0]], [[0.02, 0.3], [0.0, -2.0]])
    assert shares([[0.1, 0.89]], [[0.02, 0.3]]) is None
    alike = [[0.5, 0.3], [0.1, 0.4]]
    assert "alike" in shares(alike, alike, [[0.504, 0.3], [0.1, 0.397]])
    assert shares(alike, alike, [[0.506, 0.3], [0.1, 0.4]]) is None
    assert shares(alike) is None  # of one task there is nothing to tell


def test_routers_without_input_are_never_told_of() -> None:
    made, told = fitted(EACH["wemoe"], rate=1e-3, guard=0, router=0)
    table = made.report["fitted"]["routing"]
    assert table["a"] == table["b"] and not [one for one in told if "router" in one]


def test_how_the_fit_went_is_saved(tmp_path) -> None:
    made = built(WEMoE(steps=1, batch=6, guard=6), vit, data=sides(vit))
    base_of(vit).save_pretrained(tmp_path / "base")
    made.source = tmp_path / "base"
    written = made.save(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "routed.json").read_text())["fitted"]
    assert said == json.loads(json.dumps(made.report["fitted"])) and set(said["routing"]) == {*"ab"}
    assert written.report["fitted"] == made.report["fitted"]
    assert answer(fw.load(tmp_path / "out"), vit).equal(answer(made.module(), vit))


def test_an_expert_without_data_is_named() -> None:
    with pytest.raises(PlanError, match=r"data of an expert's task[\s\S]*b"):
        built(WEMoE(**QUICK), vit, data={"a": images()["a"]})


def test_norms_by_kind_are_reported() -> None:
    found = built(WEMoE(steps=0), clip).report["fitted"]["critical"]
    base = base_of(clip)
    experts = experts_of(base).values()
    mlp = [n for n, _ in base.named_parameters() if ".mlp." in n]
    norms = [sum(float((e.state_dict()[n].double() - base.state_dict()[n].double()).square().sum())
                 for n in mlp) ** 0.5 for e in experts]  # fmt: skip
    assert found["mlp"]["l2"] == pytest.approx(sum(norms) / 2, rel=1e-6)
    elements = sum(base.state_dict()[n].numel() for n in mlp)
    assert found["mlp"]["rms"] == pytest.approx(sum(norms) / 2 / elements**0.5, rel=1e-6)
    assert {"attention", "mlp", "norm"} <= set(found)


def test_a_folder_that_lacks_a_layers_tensors_is_refused(tmp_path) -> None:
    saved(built(WEMoE(steps=0), gpt2), gpt2, tmp_path)
    at = tmp_path / "out" / "routed.json"
    said = json.loads(at.read_text())
    said["layers"]["transformer.h.0.mlp.c_fc"]["stack"] = {"kind": "sparse", "shape": [64, 2, 16]}
    at.write_text(json.dumps(said))
    with pytest.raises(WeightsError, match=r"not complete[\s\S]*c_fc"):
        fw.load(tmp_path / "out")

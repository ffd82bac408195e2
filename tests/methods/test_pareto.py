"""Pareto sets on tiny models of every kind: what a preference makes, keeps and refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_toys import Killed, data, experts, moved, network, stop_at
from routed_toys import elsewhere
from torch import nn

import fusewright as fw
from fusewright.errors import FusewrightError, PlanError, RecipeError
from fusewright.methods.learned.preferences import PreferenceCoefficients, drawn
from fusewright.methods.routed import ParetoSet
from fusewright.methods.routed._pareto import selected
from fusewright.modules.architecture import describe_module
from fusewright.modules.deltas import Dense
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.preferences import PreferenceRouters
from fusewright.modules.vectors import TaskVectors

hf = pytest.importorskip("transformers")
pytest.importorskip("scipy")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip
PATCHES = {"image_size": 8, "patch_size": 4}
IDS = {"input_ids": torch.arange(24).reshape(3, 8)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8)}
LABELS = {"labels": torch.tensor([0, 1, 2])}
QUICK: dict[str, Any] = {"steps": 4, "batch": 3, "every": 2}


def first_token(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]


def last_logits(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1]


def decoded(model: nn.Module, batch: Any) -> torch.Tensor:
    start = torch.zeros(3, 1, dtype=torch.long)
    return model(input_ids=batch["input_ids"], decoder_input_ids=start).logits[:, -1]


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**TINY, **PATCHES, num_labels=3)),
            PIXELS, None, "mlp"),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TINY, **PATCHES)), PIXELS,
             first_token, "mlp"),
    "resnet": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)),
        PIXELS, None, "all"),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(
        **TINY, vocab_size=50, num_labels=3)), IDS, None, "mlp"),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2,
             vocab_size=50)), IDS, last_logits, "mlp"),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, vocab_size=50)), IDS,
              last_logits, "mlp"),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=8, d_ff=16,
           num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)), IDS, decoded,
           "mlp"),
}  # fmt: skip
MODULES = {"vit": 2, "clip": 2, "bert": 2, "gpt2": 2, "llama": 2, "t5": 2}
EVERYTHING = [*((family, of[3]) for family, of in FAMILIES.items()),
              *((family, "all") for family in FAMILIES if family != "resnet")]  # fmt: skip


def base_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def models(base: nn.Module) -> dict[str, nn.Module]:
    return {name: moved(base, seed, 0.02) for seed, name in enumerate("ab")}


def built(family: str, base: Any = None, given: Any = None, **params: Any) -> Any:
    base = base_of(family) if base is None else base
    _, inputs, head, modules = FAMILIES[family]
    method = ParetoSet(**{**QUICK, "modules": modules, **params})
    return fw.merge(
        method, base=base, experts=models(base) if given is None else given,
        data={name: [{**inputs, **LABELS}] for name in "ab"},
        heads={} if head is None else dict.fromkeys("ab", head),
    )  # fmt: skip


def answer(family: str, model: nn.Module) -> torch.Tensor:
    _, inputs, head, _ = FAMILIES[family]
    with torch.no_grad():
        return model(**inputs).logits if head is None else head(model, inputs)


def loud(made: Any) -> None:
    """Routers that follow the preference plainly."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.preferences.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("router", [1, 2])
@pytest.mark.parametrize(("family", "modules"), EVERYTHING)
def test_a_preference_comes_back_from_a_plain_model(
    family: str, modules: str, router: int
) -> None:
    made, base = built(family, modules=modules, router=router), base_of(family)
    loud(made)
    said = {}
    for r in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.6)):
        made.set_preference(r)
        said[r] = answer(family, made.module())
        plain = made.unload().state_dict()
        assert plain.keys() == base.state_dict().keys()
        shapes = {n: (t.shape, t.dtype) for n, t in base.state_dict().items()}
        assert {n: (t.shape, t.dtype) for n, t in plain.items()} == shapes
        alone = base_of(family)
        alone.load_state_dict(plain)
        assert answer(family, alone).equal(said[r])
    one, two, three = said.values()
    assert not torch.allclose(one, two) and not torch.allclose(one, three)


@pytest.mark.parametrize("family", MODULES)
def test_of_the_feed_forward_parts_only_the_routers_follow(family: str) -> None:
    made, base = built(family, steps=0), base_of(family)
    layout = describe_module(base).layout
    assert set(made.preferences.places) == set(range(MODULES[family]))
    assert not any("att" in name.lower() for name in made.preferences.names)
    assert all(layout[name].layer is not None for name in made.preferences.names)
    sizes = made.report["parameters"]
    assert sizes["trained"] == MODULES[family] * (4 * 2**2 + 3 * 2)
    held = sum(base.state_dict()[name].numel() for name in made.preferences.names)
    saved = sum(t.numel() for t in made.state_dict().values() if t.is_floating_point())
    whole = sum(t.numel() for t in base.state_dict().values() if t.is_floating_point())
    assert sizes["stored"] == saved == whole + 2 * held + sizes["trained"] + 2


def test_twelve_feed_forward_parts_of_two_tasks_are_264_numbers() -> None:
    layers = {**TINY, "num_hidden_layers": 12}
    base = hf.CLIPVisionModel(hf.CLIPVisionConfig(**layers, **PATCHES)).eval()
    assert built("clip", base, steps=0).report["parameters"]["trained"] == 264
    assert built("clip", base, steps=0, router=1).report["parameters"]["trained"] == 72


@pytest.mark.parametrize("modules", ["mlp", "all"])
@pytest.mark.parametrize("family", ["clip", "gpt2", "resnet"])
def test_a_router_of_zero_weights_is_task_arithmetic(family: str, modules: str) -> None:
    if family == "resnet" and modules == "mlp":
        pytest.skip("it has none")
    made, base = built(family, modules=modules, steps=0, start=0.4), base_of(family)
    plain = fw.merge(fw.TaskArithmetic(scale=0.4), base=base, experts=models(base)).state_dict()
    with torch.no_grad():
        made.preferences.routers.weight.zero_()
    for r in ((1.0, 0.0), (0.3, 0.7)):
        for name, tensor in made.unload(r).state_dict().items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)


def test_all_takes_attention_norms_and_embeddings_apart() -> None:
    base = base_of("gpt2")
    names = [n for n, _ in base.named_parameters()]
    places = selected(describe_module(base).layout, names, "all")
    assert places.keys() == set(names) and len(set(places.values())) == 2 * 4 + 3
    first = "transformer.h.0"
    assert places[f"{first}.attn.c_attn.weight"] == places[f"{first}.attn.c_proj.bias"]
    assert places[f"{first}.ln_1.weight"] == places[f"{first}.ln_1.bias"]
    attention = selected(describe_module(base).layout, names, r"h\.\d+\.attn$")
    assert len(set(attention.values())) == 2 and all(".attn." in name for name in attention)


def merge_of(base: nn.Module, others: dict[str, nn.Module]) -> tuple[ParametrisedMerge, Any]:
    """The merge, in float64, of ``all``."""
    held = {n: p.detach() for n, p in base.named_parameters()}
    vectors = TaskVectors(
        tuple(others), held, lambda e, n: Dense(others[e].state_dict()[n] - held[n])
    )
    places = selected(describe_module(base).layout, vectors.names, "all")
    routers = PreferenceRouters(max(places.values()) + 1, 2, 2, seed=3).double()
    coefficients = PreferenceCoefficients(routers, places, torch.tensor([0.3, 0.7]).double())
    return ParametrisedMerge(base, vectors, coefficients), coefficients


def test_gradients_of_linear_scalarisation_agree_with_autograd() -> None:
    base = network(torch.float64).requires_grad_(False)
    merge, coefficients = merge_of(base, experts(base))
    draw = torch.Generator().manual_seed(4)
    batches = [torch.randn(16, 6, generator=draw).double() for _ in range(2)]
    labels = [torch.randint(4, (16,), generator=draw) for _ in range(2)]
    found = []
    for mode in ("projection", "autograd"):
        coefficients.zero_grad()
        with merge.live(mode) as live:
            for r, x, y in zip((0.3, 0.7), batches, labels, strict=True):
                live.backward(r * nn.functional.cross_entropy(live.model(x), y))
            live.collect()
        found.append([p.grad.clone() for p in coefficients.parameters()])
    held = {n: merge.vectors.base[n] for n in merge.vectors.names}
    state = {n: t + sum(c * d.dense() for c, d in zip(
        coefficients.weights(n), merge.vectors.at(n), strict=True)) for n, t in held.items()}
    loss = sum(r * nn.functional.cross_entropy(torch.func.functional_call(base, state, (x,)), y)
               for r, x, y in zip((0.3, 0.7), batches, labels, strict=True))  # fmt: skip
    reference = torch.autograd.grad(loss, list(coefficients.parameters()))
    for one, two, three in zip(*found, reference, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(two, three, rtol=1e-9, atol=1e-12)
    assert any(bool(g.abs().max() > 1e-4) for g in reference)


@pytest.mark.parametrize("how", ["linear", "epo", "tchebycheff"])
def test_losses_fall_as_preferred(how: str) -> None:
    base = network()
    others = experts(base, 0.6)
    draw = torch.Generator().manual_seed(9)
    data: dict[str, list[Any]] = {}
    for name, model in others.items():
        inputs = [torch.randn(32, 6, generator=draw) for _ in range(3)]
        data[name] = [{"input": x, "labels": model(x).argmax(dim=1)} for x in inputs]
    made, start = (
        fw.merge(ParetoSet(steps=steps, batch=32, modules="all", scalarise=how),
                 base=base, experts=others, data=data) for steps in (400, 0)
    )  # fmt: skip

    def losses(model: Any, r: tuple[float, float]) -> list[float]:
        model.set_preference(r)
        with torch.no_grad():
            return [sum(float(nn.functional.cross_entropy(model.module()(b["input"]), b["labels"]))
                        for b in batches) for batches in data.values()]  # fmt: skip

    for task, r in enumerate(((0.95, 0.05), (0.05, 0.95))):
        assert losses(made, r)[task] < 0.97 * losses(start, r)[task]
    one, two = losses(made, (0.95, 0.05)), losses(made, (0.05, 0.95))
    assert one[0] < two[0] and one[1] > two[1]
    if how == "epo":
        assert made.report["fitted"]["epo"] == {"solved": 400, "failures": 0}


@pytest.mark.parametrize("guard", [0, 16])
def test_a_killed_fit_reports_all_its_searches(guard: int, tmp_path: Any) -> None:
    base, rows = network(), {n: [{"input": x, "labels": x[:, :4].argmax(1)} for x in batches]
                             for n, batches in data().items()}  # fmt: skip
    given = {"base": base, "experts": experts(base), "data": rows}
    method = ParetoSet(steps=5, batch=16, modules="all", scalarise="epo", guard=guard, every=2,
                       preference=(0.5, 0.5))  # fmt: skip
    whole = fw.merge(method, **given).report["fitted"]
    with pytest.raises(Killed):
        fw.merge(method, out=tmp_path / "out", progress=stop_at(3), **given)
    found = fw.merge(method, out=tmp_path / "out", **given).report["fitted"]
    assert found == whole and sum(found["epo"].values()) == found["kept"]
    assert guard or found["kept"] == 5


def test_the_same_seed_learns_the_same_and_draws_by_step() -> None:
    one, two = built("vit").state_dict(), built("vit").state_dict()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert drawn(3, 1.0, 0, 5).equal(drawn(3, 1.0, 0, 5))
    assert not drawn(3, 1.0, 0, 5).equal(drawn(3, 1.0, 0, 6))
    assert not drawn(3, 1.0, 0, 5).equal(drawn(3, 1.0, 1, 5))


@pytest.mark.parametrize("how", ["epo", "tchebycheff"])
def test_losses_below_0_are_not_weighed_by_their_size(how: str) -> None:
    with pytest.raises(RecipeError, match=r"diverse_entropy[\s\S]*scalarise: linear"):
        ParetoSet(scalarise=how, objective="diverse_entropy")
    ParetoSet(objective="diverse_entropy")


def test_a_seed_may_be_negative() -> None:
    one, two = drawn(3, 1.0, -1, 5), drawn(3, 1.0, 1, 5)
    assert bool(one.isfinite().all()) and not one.equal(two) and one.equal(drawn(3, 1.0, -1, 5))


def test_draws_are_uniform_on_the_simplex() -> None:
    seen = torch.stack([drawn(3, 1.0, 0, step) for step in range(4000)])
    assert bool((seen >= 0).all()) and torch.allclose(seen.sum(dim=1), torch.ones(4000))
    assert torch.allclose(seen.mean(dim=0), torch.full((3,), 1 / 3), atol=0.02)
    assert torch.allclose(seen.var(dim=0), torch.full((3,), 1 / 18), atol=0.006)


def test_what_was_merged_is_made_anew_when_anything_changes() -> None:
    made = built("vit", steps=0)
    loud(made)
    model = made.module()
    before = answer("vit", model)
    with torch.no_grad():
        made.preferences.routers.bias.add_(0.5)
    after = answer("vit", model)
    assert not torch.allclose(before, after)
    alone = base_of("vit")
    alone.load_state_dict(made.unload().state_dict())
    assert answer("vit", alone).equal(after)
    with torch.inference_mode():
        made.set_preference((1, 0))
        one = model(**PIXELS).logits
        made.set_preference((0, 1))
        two = model(**PIXELS).logits
    assert not torch.allclose(one, two) and answer("vit", model).equal(two)
    twin = copy.deepcopy(model)
    twin.set_preference((1, 0))
    assert answer("vit", twin).equal(one) and answer("vit", model).equal(two)
    model.load_state_dict(twin.state_dict())
    assert answer("vit", model).equal(one)


@pytest.mark.parametrize(("family", "modules"), [("resnet", "all"), ("gpt2", "all"), ("t5", "mlp")])
def test_a_fresh_process_sets_the_preference(family: str, modules: str, tmp_path: Any) -> None:
    base = base_of(family)
    base.save_pretrained(tmp_path / "base")
    paths = {name: tmp_path / name for name in "ab"}
    for name, model in models(base).items():
        model.save_pretrained(paths[name])
    depth = 1 if family == "gpt2" else 2
    made = built(family, tmp_path / "base", paths, modules=modules, router=depth)
    loud(made)
    made.set_preference((0.5, 0.5))
    made.save(tmp_path / "out")
    inputs = dict(FAMILIES[family][1])
    if family == "t5":
        inputs["decoder_input_ids"] = IDS["input_ids"][:, :4]
    preferences = ([1, 0], [0.25, 0.75])
    asked = [(tmp_path / "out", inputs, {"set_preference": r}) for r in preferences]
    for r, said in zip(preferences, elsewhere(tmp_path, asked), strict=True):
        made.set_preference(r)
        with torch.no_grad():
            here = made.module()(**inputs)[0]
        torch.testing.assert_close(said, here, rtol=1e-6, atol=1e-6)
        made.unload().save(tmp_path / f"plain{r}")
        plain = type(base).from_pretrained(tmp_path / f"plain{r}").eval()
        with torch.no_grad():
            assert plain(**inputs)[0].equal(here)
    assert not (tmp_path / f"plain{r}" / "routed.json").exists()


def test_a_preference_given_at_once_is_a_plain_merge(tmp_path: Any) -> None:
    base = base_of("vit")
    base.save_pretrained(tmp_path / "base")
    paths = {name: tmp_path / name for name in "ab"}
    for name, model in models(base).items():
        model.save_pretrained(paths[name])
    whole = built("vit", tmp_path / "base", paths)
    for given in ([1, 3], {"b": 0.75, "a": 0.25}):
        out = tmp_path / f"out{type(given).__name__}"
        method = {"pwe_moe": {**QUICK, "preference": given}}
        fw.merge(method, base=tmp_path / "base", experts=paths, out=out,
                 data={name: [{**PIXELS, **LABELS}] for name in "ab"})  # fmt: skip
        model = hf.ViTForImageClassification.from_pretrained(out).eval()
        whole.set_preference((0.25, 0.75))
        torch.testing.assert_close(answer("vit", model), answer("vit", whole.module()),
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
        said = json.loads((out / "fusewright.json").read_text())["fitted"]
        assert said["preference"] == [0.25, 0.75] and len(said["losses"]) == QUICK["steps"]


def test_sixteen_bits_are_kept(tmp_path: Any) -> None:
    base = base_of("llama").bfloat16()
    base.save_pretrained(tmp_path / "base")
    paths = {name: tmp_path / name for name in "ab"}
    for name, model in models(base).items():
        model.save_pretrained(paths[name])
    made = built("llama", tmp_path / "base", paths, steps=0)
    made.save(tmp_path / "out")
    model = fw.load(tmp_path / "out")
    made.set_preference((0.9, 0.1))
    model.set_preference((0.9, 0.1))
    assert {t.dtype for n, t in model.named_parameters() if "routers" not in n} == {torch.bfloat16}
    assert answer("llama", model).equal(answer("llama", made.module()))


@pytest.mark.parametrize("r", [(1.0,), (0.5, 0.2, 0.3), (-0.1, 1.1), (0, 0), (float("nan"), 1)])
def test_what_is_no_preference_is_refused(r: tuple[float, ...]) -> None:
    made = built("vit", steps=0)
    before = answer("vit", made.module())
    for ask in (made.set_preference, made.unload, made.module().set_preference):
        with pytest.raises(PlanError, match="how much each task counts"):
            ask(r)
    assert answer("vit", made.module()).equal(before)
    with pytest.raises(PlanError, match="how much each task counts"):
        built("vit", preference=r)


def test_a_preference_may_be_said_by_expert() -> None:
    made = built("vit", steps=0)
    made.set_preference((0.3, 0.9))
    by_order, plain = answer("vit", made.module()), made.unload((0.2, 0.8)).state_dict()
    made.set_preference({"b": 0.9, "a": 0.3})
    assert answer("vit", made.module()).equal(by_order)
    made.module().set_preference({"b": 9, "a": 3})
    assert answer("vit", made.module()).equal(by_order)
    by_name = made.unload({"b": 0.8, "a": 0.2}).state_dict()
    assert all(tensor.equal(by_name[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("r, match", [
    ({"a": 1.0}, r"leaves experts out[\s\S]*b"), ({}, "leaves experts out"),
    ({"a": 1.0, "b": 1.0, "c": 1.0}, r"names what is no expert[\s\S]*c"),
    ({"a": 1.0, "bb": 1.0}, "did you mean 'b'"),
    ({"a": "x", "b": 1.0}, "how much each task counts"),
    ({"a": -1.0, "b": 1.0}, "how much each task counts"), ("ab", "how much each task counts"),
])  # fmt: skip
def test_what_is_no_preference_by_expert_is_refused(r: Any, match: str) -> None:
    made = built("vit", steps=0)
    for ask in (made.set_preference, made.unload, made.module().set_preference):
        with pytest.raises(PlanError, match=match):
            ask(r)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(PlanError, match="names what is no expert"):
        built("vit", preference={"a": 1.0, "c": 1.0})
    with pytest.raises(PlanError, match=r"no tensor is selected[\s\S]*attention"):
        built("vit", modules="nowhere")
    with pytest.raises(PlanError, match=r"no tensor is selected"):
        built("resnet", modules="mlp")
    with pytest.raises(FusewrightError, match="regular expression"):
        ParetoSet(modules="(")
    base = base_of("vit")
    with pytest.raises(FusewrightError, match="needs labels"):
        fw.merge(ParetoSet(**QUICK), base=base, experts=models(base),
                 data={name: [PIXELS] for name in "ab"})  # fmt: skip
    with pytest.raises(PlanError, match=r"no data of an expert's task[\s\S]*b"):
        fw.merge(ParetoSet(**QUICK), base=base, experts=models(base),
                 data={"a": [{**PIXELS, **LABELS}]})  # fmt: skip


def test_entropy_needs_no_labels() -> None:
    base = base_of("vit")
    made = fw.merge(ParetoSet(**QUICK, objective="entropy"), base=base, experts=models(base),
                    data={name: [PIXELS] for name in "ab"})  # fmt: skip
    assert len(made.report["fitted"]["losses"]) == QUICK["steps"]

"""Twin-Merging on tiny models of every kind."""

from __future__ import annotations

import copy

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
    clip,
    expert_of,
    experts_of,
    gpt2,
    images,
    llama,
    sides,
    t5,
    vit,
)
from torch import nn

import fusewright as fw
from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.routed._named import Named
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.mixed_rest import MixedAffine, MixedTable

BIAS = "relative_attention_bias"


LEARNT = fw.Twin(mask_rate=0.5, epochs=40, rate=5e-3)


def built(make, method=LEARNT, **options):
    base = base_of(make)
    if method.epochs:
        heads = dict.fromkeys("ab", torch.ones(4, 8)) if make is clip else None
        options = {"data": sides(make), "heads": heads, **options}
    return fw.merge(method, base=base, experts=experts_of(base), **options)


@MODELS
def test_one_expert_at_full_rank_is_that_expert(make) -> None:
    base = base_of(make)
    expert = expert_of(base, 1)
    with torch.no_grad():  # tensors that know no samples keep the shared part
        for name, tensor in expert.named_parameters():
            if BIAS in name:
                tensor.copy_(base.get_parameter(name))
    made = fw.merge(fw.Twin(mask_rate=0), base=base, experts={"a": expert})
    torch.testing.assert_close(answer(made.module(), make), answer(expert, make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert all(BIAS in name for name in made.report["fitted"]["shared"])


@MODELS
def test_without_a_router_it_is_the_shared_part_and_the_mean_of_the_exclusive(make) -> None:
    made, base = built(make, fw.Twin(mask_rate=0.5, epochs=0)), base_of(make)
    experts = [e.state_dict() for e in experts_of(base).values()]
    plain, state = made.unload().state_dict(), base.state_dict()
    changed = [n for n, _ in base.named_parameters()]
    ranks = []
    for name in changed:
        taus = [e[name] - state[name] for e in experts]
        shared = state[name] + 0.3 * sum(taus)
        whole = plain[name] - shared
        exclusive = [e[name] - shared for e in experts]
        if BIAS in name:
            assert torch.allclose(plain[name], shared, atol=1e-6)
        elif whole.dim() == 2 and "position" not in name and make is not vit:
            ranks.append((torch.linalg.matrix_rank(whole, atol=1e-4), min(whole.shape)))
            mean = sum(_cut(v, min(v.shape) // 2) for v in exclusive) / 2
            torch.testing.assert_close(whole, mean, rtol=1e-3, atol=1e-5)
        elif whole.dim() == 1:
            torch.testing.assert_close(whole, sum(exclusive) / 2, rtol=1e-3, atol=1e-5)
    model = base_of(make)
    model.load_state_dict(plain)
    torch.testing.assert_close(answer(model, make), answer(made.module(), make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def _cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@MODELS
def test_the_router_learns_whose_an_input_is_and_looks_at_nothing_else(make) -> None:
    made = built(make)
    found = made.report["fitted"]
    assert min(found["recognised"].values()) > 0.8, found["recognised"]
    assert found["losses"][0] > 0.6 > found["losses"][-1]
    model, data = made.module(), sides(make)
    shares = {}
    for task, batches in data.items():
        with torch.no_grad():
            model(**batches[0])
        shares[task] = model.get_submodule("routing").mixture.weights
    assert shares["a"][:, 0].mean() > 0.7 and shares["b"][:, 1].mean() > 0.7
    assert torch.allclose(shares["a"].sum(dim=1), torch.ones(6))
    rest = set(model.state_dict()) - {n for n in model.state_dict() if n.startswith("routing.")}
    untrained = built(make, fw.Twin(mask_rate=0.5, epochs=0)).module().state_dict()
    assert all(model.state_dict()[n].equal(untrained[n]) for n in rest)


@MODELS
def test_an_input_is_answered_alike_in_any_batch(make) -> None:
    model = built(make).module()
    whole = answer(model, make)
    for row in range(3):
        alone = answer(model, make, **{k: v[row : row + 1] for k, v in INPUTS[make].items()})
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    weights = model.get_submodule("routing").mixture.weights
    assert weights.shape == (1, 2)


@MODELS
def test_each_sample_is_answered_by_its_own_merge(make) -> None:
    made = built(make)
    whole = answer(made.module(), make)
    for row in range(3):
        one = {k: v[row : row + 1] for k, v in INPUTS[make].items()}
        plain = base_of(make)
        plain.load_state_dict(made.unload(one).state_dict())
        torch.testing.assert_close(whole[row : row + 1], answer(plain, make, **one),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_padding_has_no_say() -> None:
    for make in (bert, gpt2, llama):
        model = built(make).module()
        answer(model, make)
        mixture = model.get_submodule("routing").mixture
        whole = mixture.weights
        answer(model, make, input_ids=IDS[2:, :2], attention_mask=MASK[2:, :2])
        torch.testing.assert_close(mixture.weights, whole[2:], rtol=1e-4, atol=1e-5)
        answer(model, make, attention_mask=torch.ones_like(MASK))
        assert (mixture.weights[2] - whole[2]).abs().max() > 1e-4


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_generation_keeps_the_weights_of_the_prompt(make) -> None:
    made = built(make)
    model = made.module()
    for row in range(3):
        ids = IDS[row : row + 1]
        found = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        plain = base_of(make)
        plain.load_state_dict(made.unload({"input_ids": ids}).state_dict())
        for _ in range(5):
            with torch.no_grad():
                said = plain(input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, said.argmax(-1, keepdim=True)], dim=1)
        assert found.equal(ids)


def test_t5_generates_with_beams_of_each_prompts_weights() -> None:
    model = built(t5).module()
    words = {"input_ids": IDS, "attention_mask": MASK}
    asked = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    whole = model.generate(**words, **asked)
    for row in range(3):
        alone = model.generate(**{k: v[row : row + 1] for k, v in words.items()}, **asked)
        assert whole[row : row + 1, : alone.shape[1]].equal(alone)


def test_of_lora_experts_the_product_is_cut(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = base_of(llama)
    base.save_pretrained(tmp_path / "base")
    whole, adapters = {}, {}
    for seed, (name, rank) in enumerate((("a", 2), ("b", 3))):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"][: seed + 1],
                                 init_lora_weights=False)  # fmt: skip
        tuned = peft.get_peft_model(copy.deepcopy(base), config)
        adapters[name] = tmp_path / name
        tuned.save_pretrained(adapters[name])
        whole[name] = tuned.merge_and_unload()
    made = {}
    for kind, experts in (("factors", adapters), ("dense", whole)):
        method = fw.Twin(mask_rate=0.7, epochs=0)
        made[kind] = fw.merge(method, base=tmp_path / "base", experts=experts)
    one, two = (each.unload().state_dict() for each in (made["factors"], made["dense"]))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
    ranks = {p: layer.stack.down.shape[1] for p, layer in made["factors"].module().named_modules()
             if isinstance(layer, MixedLinear)}  # fmt: skip
    assert len(ranks) == 4 and set(ranks.values()) == {3, 4}  # 5 of both, cut to .3 of 16 in q_proj


def test_what_is_linear_a_table_or_affine() -> None:
    model = built(gpt2, fw.Twin(epochs=0)).module()
    kinds = {p: type(m) for p, m in model.named_modules()}
    assert kinds["transformer.wte"] is kinds["transformer.wpe"] is MixedTable
    assert kinds["lm_head"] is kinds["transformer.h.0.attn.c_attn"] is MixedLinear
    assert kinds["transformer.ln_f"] is MixedAffine
    tied = model.get_submodule("transformer.wte").base.weight
    assert model.get_submodule("lm_head").base.weight is tied
    small = model.get_submodule("transformer.h.0.attn.c_attn").stack
    assert small.rank == 1  # a tenth of 16


def test_a_scaled_table_is_mixed_as_the_head_that_is_tied_to_it(tmp_path) -> None:
    """Gemma's: what is unloaded for an input answers it as the routed model does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.Gemma2ForCausalLM(config).eval()
    experts = {name: expert_of(base, seed) for seed, name in enumerate("ab", 1)}
    texts = {n: [{"input_ids": torch.randint(1, 48, (4, 9))} for _ in range(2)] for n in experts}
    made = fw.merge(fw.Twin(epochs=1), base=base, experts=experts, data=texts)
    one = {"input_ids": texts["a"][0]["input_ids"][:1]}
    routed = made.module()
    assert isinstance(routed.get_submodule("model.embed_tokens"), MixedTable)
    with torch.no_grad():
        expected = routed(**one).logits
        made.save(tmp_path / "out")
        assert torch.equal(fw.load(tmp_path / "out")(**one).logits, expected)
        torch.testing.assert_close(made.unload(one).module()(**one).logits, expected)


def test_the_same_seed_learns_the_same_and_the_callers_draws_are_left_alone() -> None:
    torch.manual_seed(5)
    one = built(vit).state_dict()
    after = torch.rand(1)
    torch.manual_seed(6)
    two = built(vit).state_dict()
    torch.manual_seed(5)
    base_of(vit)
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert isinstance(after, torch.Tensor)


def test_bad_data() -> None:
    with pytest.raises(PlanError, match=r"data of an expert's task[\s\S]*b"):
        built(vit, data={"a": images()["a"]})
    lonely = {**sides(vit), "b": [{"pixel_values": PIXELS[:1]}]}
    with pytest.raises(PlanError, match="two inputs or more"):
        built(vit, data=lonely)
    with pytest.raises(PlanError, match="depend on the input"):
        built(vit).unload()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_batch_of_the_routers_has_one_row(size: int) -> None:
    for count in range(2, 24):
        named = Named(torch.arange(count)[:, None], torch.zeros(count))
        drawn = named.batches(size, 0)
        epoch = [next(drawn)[0] for _ in range(named.count(size))]
        assert torch.cat(epoch).flatten().sort().values.equal(torch.arange(count))
        assert {len(rows) for rows in epoch} <= set(range(2, max(size, 3) + 1))


def test_an_odd_number_of_inputs_is_learned_from_in_twos() -> None:
    data = {n: [{"pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(k)] for n, k in
            (("a", 1), ("b", 2))}  # fmt: skip
    assert built(vit, fw.Twin(batch=2, epochs=1), data=data).report["fitted"]["recognised"]


def test_a_cache_of_another_prompt_is_refused() -> None:
    model = built(gpt2).module()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        assert cache.get_seq_length() == IDS.shape[1]  # the shared pass left nothing in it
        model(input_ids=IDS[:2])
        with pytest.raises(PlanError, match="not the last that was routed"):
            model(input_ids=IDS[:, :1], past_key_values=cache)


def test_convolutions_and_batch_norms_are_whole() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4,
                             layer_type="basic")  # fmt: skip
    base = hf.ResNetForImageClassification(config).eval()
    expert = expert_of(base, 1)
    made = fw.merge(fw.Twin(mask_rate=0), base=base, experts={"a": expert})
    with torch.no_grad():
        found, wanted = made.module()(PIXELS).logits, expert(PIXELS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(made.module(), nn.Module) and not made.report["fitted"]["shared"]


def test_what_the_router_asks_for_is_reported_and_likeness_told_of() -> None:
    made = built(vit)
    table = made.report["fitted"]["routing"]
    assert min(table["a"]["a"], table["b"]["b"]) > 0.8
    assert all(sum(row.values()) == pytest.approx(1) for row in table.values())
    model, held = made.module(), []
    for batches in sides(vit).values():
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        with torch.no_grad():
            model(pixels[9::10])  # every tenth
        held.append(model.get_submodule("routing").mixture.weights.mean(0))
    found = torch.tensor([list(row.values()) for row in table.values()])
    torch.testing.assert_close(found, torch.stack(held), rtol=1e-4, atol=1e-5)
    same = dict.fromkeys("ab", sides(vit)["a"])
    with pytest.warns(FusewrightWarning, match="weigh the experts alike for all tasks"):
        built(vit, data=same)

"""Routed methods where several modules of a model have one weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from routed_toys import IDS, TEXT, base_of, elsewhere, expert_of, gpt2, hf, saved
from torch import nn

import fusewright as fw
from fusewright.errors import FusewrightWarning
from fusewright.methods.routed._linears import Users, untaken
from fusewright.modules.architecture import describe_module
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.routed import RoutedLinear
from fusewright.modules.tensors import same_tensor
from fusewright.modules.vectors import TaskVectors


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(inputs)))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), mlp

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.mlp(self.norm(inputs))


class Network(nn.Module):
    """Two blocks whose feed-forward parts are one module, or have the same modules or tensors; so
    have the norms."""

    def __init__(self, how: str) -> None:
        super().__init__()
        one, two = Part(), Part()
        two = one if how == "part" else two
        self.layers = nn.ModuleList([Block(one), Block(two)])
        for name in ("fc1", "fc2"):
            if how == "modules":
                setattr(two, name, getattr(one, name))
            getattr(two, name).weight = getattr(one, name).weight
            getattr(two, name).bias = getattr(one, name).bias
        for kind in ("weight", "bias"):
            setattr(self.layers[1].norm, kind, getattr(self.layers[0].norm, kind))
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return self.head(inputs)


HOW = ("part", "modules", "tensors")
INPUTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
EXACT = [
    fw.Smile(rank=12, gate=1, rest=1.0),
    fw.WEMoE(steps=0, router=0, start=1.0),
    fw.EWEMoE(steps=0, router=0, start=1.0, density=1),
    fw.RankOneMoE(steps=0, router=0, start=1.0, rank=12),
    fw.Twin(epochs=0, mask_rate=0),
]
METHODS = pytest.mark.parametrize("method", EXACT, ids=lambda method: method.name)


def network(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Network(how).eval()


def said(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUTS)


@pytest.mark.parametrize("how", HOW)
@METHODS
def test_one_expert_comes_back_from_all_places(method, how, tmp_path: Path) -> None:
    base = network(how)
    expert = expert_of(base, 1)
    assert (said(base) - said(expert)).abs().max() > 0.1
    made = fw.merge(method, base=base, experts={"a": expert})
    torch.testing.assert_close(said(made.module()), said(expert), rtol=1e-4, atol=1e-5)
    report = made.report["fitted"]
    assert report.get("left", report.get("shared")) == []
    mixed = (RoutedLinear, MixedLinear)
    assert all(isinstance(layer.mlp.fc1, mixed) for layer in made.module().layers)
    assert len([p for p in made.layers if "fc1" in p]) == (1 if how == "part" else 2)
    made.save(tmp_path / "out")
    again = fw.load(tmp_path / "out", module=network(how))
    assert said(again).equal(said(made.module()))
    ours = made.module().state_dict()
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in ours.items()}  # fmt: skip
    assert all(t.equal(ours[n]) for n, t in again.state_dict().items())
    if method.name != "smile":
        plain = made.unload()
        assert plain.state_dict().keys() == base.state_dict().keys()
        model = network(how)
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(said(model), said(expert), rtol=1e-4, atol=1e-5)


@METHODS
def test_how_weights_are_shared_makes_no_difference(method) -> None:
    found = []
    for how in HOW:
        base = network(how)
        experts = {"a": expert_of(base, 1), "b": expert_of(base, 2)}
        found.append(said(fw.merge(method, base=base, experts=experts).module()))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@METHODS
def test_the_matrices_of_shared_maps_are_held_and_stored_once(
    method, dtype, tmp_path: Path
) -> None:
    sizes = {}
    for how in ("part", "tensors"):
        base = network(how)
        made = fw.merge(method, base=base, experts={"a": expert_of(base, 1)})
        held = {t.data_ptr(): t.nbytes for t in made.module().state_dict().values()}
        made.save(tmp_path / how, out_dtype=dtype)
        again = fw.load(tmp_path / how, module=network(how)).state_dict().values()
        stored = {t.data_ptr(): t.nbytes for t in again}
        sizes[how] = sum(held.values()), sum(stored.values())
    second = 4 * (12 + 8)  # Twin's shifts of biases are each place's own
    for one, two in zip(sizes["part"], sizes["tensors"], strict=True):
        assert 0 <= two - one <= (second if method.name == "twin" else 0)


def test_an_unloaded_tensor_is_the_mean_of_what_its_places_ask_for() -> None:
    base = network("tensors")
    experts = {"a": expert_of(base, 1), "b": expert_of(base, 2)}
    made = fw.merge(fw.WEMoE(steps=0), base=base, experts=experts)
    routing = made.module().get_submodule("routing")
    assert len(routing.routers) == 1 and len(routing.mixtures) == 2  # one part in two places
    with torch.no_grad():
        for parameter in routing.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    plain = made.unload(INPUTS)
    one, two = (mixture.settled() for mixture in routing.mixtures)
    assert (one - two).abs().max() > 1e-3
    name, w = "layers.{}.mlp.fc1.weight", (one + two) / 2
    start = base.state_dict()[name.format(0)]
    moved = [e.state_dict()[name.format(0)] - start for e in experts.values()]
    state = plain.state_dict()
    torch.testing.assert_close(state[name.format(0)], start + w[0] * moved[0] + w[1] * moved[1])
    for names in same_tensor(base):
        assert len({state[name].data_ptr() for name in names}) == 1


def test_routers_of_shared_parts_learn() -> None:
    base = network("tensors")
    experts = {"a": expert_of(base, 1), "b": expert_of(base, 2)}
    data = {"a": [INPUTS], "b": [-INPUTS]}
    made = fw.merge(fw.WEMoE(steps=30, rate=1e-2, batch=5, guard=0), base=base, experts=experts,
                    data=data)  # fmt: skip
    losses = made.report["fitted"]["losses"]
    assert losses[-1] < losses[0]


def test_what_a_table_uses_too_is_merged_and_told_of() -> None:
    base = base_of(gpt2)  # whose head is its table of embeddings
    expert = expert_of(base, 1)
    method = fw.WEMoE(steps=0, router=0, start=1.0, modules=r"lm_head|\.mlp$")
    with pytest.warns(FusewrightWarning, match="cannot be routed .transformer.wte.weight"):
        made = fw.merge(method, base=base, experts={"a": expert})
    assert made.report["fitted"]["left"] == ["transformer.wte.weight"]
    assert "lm_head" not in made.layers and "transformer.h.0.mlp.c_fc" in made.layers
    with torch.no_grad():
        torch.testing.assert_close(made.module()(input_ids=IDS).logits,
                                   expert(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)  # fmt: skip


class Attended(nn.Module):
    """An attention beside a linear map whose bias is that of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.fc.bias = self.norm.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.attn(inputs, inputs, inputs)[0]))


def test_a_tensor_of_several_maps_is_routed_if_all_of_them_are() -> None:
    model = Attended()
    vectors = TaskVectors(("a",), {n: t for n, t in model.state_dict().items()}, lambda *_: None)
    users = Users(describe_module(model), model, vectors)
    found = {linear.module: linear for linear in users.owned(users.maps)}
    assert set(found) == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "fc"}
    assert found["fc"].bias is None and found["attn.q_proj"].bias == "attn.in_proj_bias"
    few = users.owned(linear for linear in users.maps if linear.module != "attn.k_proj")
    assert {linear.module for linear in few} == set(found) - {"attn.k_proj"}  # rows of their own


def test_a_second_copy_in_the_checkpoint_is_not_merged_into_a_layers_base() -> None:
    base = base_of(gpt2)
    block = base.transformer.h
    block[1].mlp.c_fc.weight = block[0].mlp.c_fc.weight
    vectors = TaskVectors(("a",), base.state_dict(), lambda *_: None)
    names = {f"transformer.h.{at}.mlp.c_fc.weight" for at in (0, 1)}
    rest = untaken(vectors, {min(names): [(None, None)]}, base)
    assert set(vectors.names) - set(rest.names) == names


def test_biases_of_rows_that_are_not_routed_are_merged() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])})
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.layers[0].in_proj_weight[16:] += torch.randn(8, 8)
        expert.layers[0].in_proj_bias += 1
    made = fw.merge(fw.Smile(rank=8, gate=1, rest=1.0), base=base, experts={"a": expert})
    attention, x = made.module().layers[0], torch.randn(3, 2, 8)
    assert [p for p in made.layers if "proj" in p] == ["layers.0.v_proj"]
    torch.testing.assert_close(attention(x, x, x)[0], expert.layers[0](x, x, x)[0])
    bias = attention.base.in_proj_bias
    assert bias[:16].equal(expert.layers[0].in_proj_bias[:16])
    assert bias[16:].equal(base.layers[0].in_proj_bias[16:])
    none = fw.merge(fw.Smile(rank=8, gate=1), base=base, experts={"a": expert})
    assert none.report["fitted"]["left"] == ["layers.0.in_proj_bias"]


def test_rows_of_attention_that_are_not_selected_are_merged() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.TransformerEncoder(layer, 1).eval()
    expert, x = expert_of(base, 1), torch.randn(3, 4, 8)
    method = fw.WEMoE(steps=0, router=0, start=1.0, modules="q_proj")
    made = fw.merge(method, base=base, experts={"a": expert})
    assert [p for p in made.layers if "proj" in p] == ["layers.0.self_attn.q_proj"]
    with torch.no_grad():
        torch.testing.assert_close(made.module()(x), expert(x))
    plain = made.unload().state_dict()
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(plain[name], tensor)


def zamba2() -> nn.Module:
    return hf.Zamba2ForCausalLM(hf.Zamba2Config(
        **{**TEXT, "num_hidden_layers": 5}, num_key_value_heads=2, mamba_d_state=4, mamba_ngroups=1,
        n_mamba_heads=4, mamba_headdim=8, mamba_expand=2, num_mem_blocks=1, adapter_rank=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"], hybrid_layer_ids=[1, 3],
        chunk_size=8, initializer_range=0.2))  # fmt: skip


def test_zamba2s_shared_block(tmp_path: Path) -> None:
    base = base_of(zamba2)
    expert, asked = expert_of(base, 1), []
    with torch.no_grad():
        want = expert(input_ids=IDS).logits
    for method in (fw.Smile(rank=64, gate=1, rest=1.0), fw.WEMoE(steps=0, router=0, start=1.0)):
        made = fw.merge(method, base=base, experts={"a": expert})
        assert made.report["fitted"]["left"] == []
        with torch.no_grad():
            found = made.module()(input_ids=IDS).logits
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
        asked.append((saved(made, zamba2, tmp_path, method.name), {"input_ids": IDS}, {}))
    for found in elsewhere(tmp_path, asked):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_a_heads_bias_of_two_names_is_mixed() -> None:
    base = base_of(lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)))
    expert = expert_of(base, 1)
    with torch.no_grad():
        expert.cls.predictions.bias.add_(1.0)
    made = fw.merge(fw.Twin(epochs=0, mask_rate=0), base=base, experts={"a": expert})
    with torch.no_grad():
        want = expert(input_ids=IDS).logits
        torch.testing.assert_close(made.module()(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
        plain = base_of(lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)))
        state = made.unload().state_dict()
        assert state["cls.predictions.bias"] is state["cls.predictions.decoder.bias"]
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert made.report["fitted"]["shared"] == []

"""Routed methods on torch's own transformers, whose fast paths read their children's weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from routed_toys import PIXELS, elsewhere, expert_of, experts_of, hf, loud
from torch import nn

import fusewright as fw
from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.routed import (
    EWEMoE,
    ParetoSet,
    RankOneMoE,
    RepresentationSurgery,
    Smile,
    WEMoE,
)
from fusewright.modules.attention import OpenAttention
from fusewright.modules.routed import RoutedLinear

WIDTH = 16


class Open(nn.Module):
    """A block as OpenCLIP writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor, src_key_padding_mask: Any = None) -> torch.Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, src_key_padding_mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def layer(first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=first)


class Network(nn.Module):
    """One encoder of torch, or blocks one by one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        blocks = {"open": Open, "layer": layer}
        if kind == "encoder":
            self.encoder = nn.TransformerEncoder(layer(), 2)
        else:
            self.blocks = nn.ModuleList(blocks[kind]() for _ in range(2))
        self.kind = kind

    def forward(self, input_values: torch.Tensor, padding: Any = None) -> torch.Tensor:
        x = self.embed(input_values)
        if self.kind == "encoder":
            x = self.encoder(x, src_key_padding_mask=padding)
        else:
            for block in self.blocks:
                x = block(x, src_key_padding_mask=padding)
        return self.head(x.mean(dim=1) if padding is None else x[:, 0])


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
ASKED = pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
KINDS = pytest.mark.parametrize("kind", ["encoder", "layer", "open"])
EVERY = r"(self_attn|attn|linear\d|mlp)$"
MIXED = {
    "wemoe": WEMoE(steps=0), "wemoe of attention": WEMoE(steps=0, modules="attn$"),
    "wemoe of queries": WEMoE(steps=0, modules="q_proj$"),
    "e_wemoe": EWEMoE(steps=0, modules=EVERY, density=0.3),
    "rank_one_moe": RankOneMoE(steps=0, modules=EVERY, rank=3),
    "twin": fw.Twin(mask_rate=0.5, epochs=10, rate=1e-2),
}  # fmt: skip
OTHERS = {
    "smile": Smile(rank=3, gate=2), "emr": fw.EMR(), "tall": fw.Tall(),
    "surgery": RepresentationSurgery(rank=4, steps=5),
    "pwe_moe": ParetoSet(steps=2, batch=3, modules="all", objective="entropy"),
}  # fmt: skip


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Network(kind).eval()


def built(method: Any, kind: str) -> Any:
    base = base_of(kind)
    batches = [{"input_values": X}, {"input_values": X + 1}]
    data = {"a": batches, "b": [{"input_values": -x["input_values"]} for x in batches]}
    return fw.merge(method, base=base, experts=experts_of(base), data=data)


def told(made: Any) -> nn.Module:
    """The model, which tells tasks and inputs apart as plainly as can be."""
    model = made.module()
    if hasattr(model, "set_task"):
        model.set_task("b")
    if hasattr(model, "set_preference"):
        model.set_preference([0.2, 0.8])
    if hasattr(model, "routing") and not hasattr(model.routing, "mixture"):
        loud(model)
    return model


def quiet(model: nn.Module, x: torch.Tensor, padding: Any) -> torch.Tensor:
    """Where torch would take its fast path."""
    with torch.no_grad():
        return model(x, padding)


def slow(model: nn.Module, x: torch.Tensor, padding: Any) -> torch.Tensor:
    """Where there is none."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(x.clone().requires_grad_(), padding).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@KINDS
@ASKED
@pytest.mark.parametrize("name", [*MIXED, *OTHERS])
def test_answers_are_those_without_fast_paths(name: str, kind: str, padding: Any) -> None:
    made = built({**MIXED, **OTHERS}[name], kind)
    model = told(made)
    found = quiet(model, X, padding)
    torch.testing.assert_close(found, slow(model, X, padding), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, quiet(base_of(kind), X, padding), atol=1e-3)
    if name not in MIXED and name not in ("smile", "surgery"):
        plain = base_of(kind)
        plain.load_state_dict(made.unload().state_dict())
        torch.testing.assert_close(found, slow(plain, X, padding), rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("name", MIXED)
def test_each_sample_is_answered_by_its_own_merge(name: str, kind: str) -> None:
    made = built(MIXED[name], kind)
    whole = quiet(told(made), X, PADDING)
    for row in range(3):
        x, padding = X[row : row + 1], PADDING[row : row + 1]
        plain = base_of(kind)
        plain.load_state_dict(made.unload({"input_values": x, "padding": padding}).state_dict())
        torch.testing.assert_close(whole[row : row + 1], slow(plain, x, padding),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@KINDS
@ASKED
def test_one_expert_at_full_rank_is_that_expert(kind: str, padding: Any) -> None:
    base = base_of(kind)
    expert = expert_of(base, 1)
    made = fw.merge(Smile(rank=64, gate=64, rest=1.0), base=base, experts={"a": expert})
    expected = slow(expert, X, padding)
    torch.testing.assert_close(quiet(made.module(), X, padding), expected, rtol=1e-4, atol=1e-5)
    twin = fw.merge(fw.Twin(mask_rate=0), base=base, experts={"a": expert})
    torch.testing.assert_close(quiet(twin.module(), X, padding), expected, rtol=1e-4, atol=1e-5)
    assert not made.report["fitted"]["left"] and not twin.report["fitted"]["shared"]


def test_only_a_later_layer_was_changed() -> None:
    """Torch's encoder looks at its first layer to choose the path of all."""
    base = base_of("encoder")
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in expert.encoder.layers[1].named_parameters():
            if "norm" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model = fw.merge(Smile(rank=64, gate=64), base=base, experts={"a": expert}).module()
    assert not any(isinstance(m, RoutedLinear) for m in model.encoder.layers[0].modules())
    found, expected = (quiet(model, X, PADDING), slow(expert, X, PADDING))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_what_is_stored_and_active(kind: str) -> None:
    sizes = built(Smile(rank=3, gate=2), kind).report["parameters"]
    attention, up, down = 4 * (3 * 2 * WIDTH + WIDTH), 3 * (WIDTH + 32) + 32, 3 * (WIDTH + 32)
    one, gates = 2 * (attention + up + down + WIDTH), 2 * 2 * (5 * 2 * WIDTH + 2 * 32)
    assert sizes["stored"] - sizes["base"] == 2 * one + gates
    assert sizes["active"] - sizes["base"] == one + gates
    assert sizes["trained"] == 0 and sizes["layers"] == 12
    mixed = built(WEMoE(steps=0, modules="attn$"), kind).report["parameters"]
    assert mixed["trained"] == 2 * (WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2)
    whole = 2 * 2 * (4 * WIDTH * WIDTH + 4 * WIDTH)
    assert mixed["stored"] == mixed["active"] == mixed["base"] + mixed["trained"] + whole


@KINDS
@pytest.mark.parametrize("name", [*MIXED, *OTHERS])
def test_it_is_saved_and_loaded(name: str, kind: str, tmp_path) -> None:
    made = built({**MIXED, **OTHERS}[name], kind)
    expected = quiet(told(made), X, PADDING)
    made.save(tmp_path / "out")
    model = fw.load(tmp_path / "out", module=base_of(kind))
    if hasattr(model, "set_task"):
        model.set_task("b")
    assert quiet(model, X, PADDING).equal(expected)


def test_a_pooling_attention_of_transformers_is_loaded_in_another_process(tmp_path) -> None:
    """SigLIP pools with an ``nn.MultiheadAttention``."""
    torch.manual_seed(0)
    base = hf.SiglipVisionModel(hf.SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4)).eval()  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    asked, expected = [], []
    for name, method in (("wemoe", WEMoE(steps=0, modules=r"head$")), ("twin", fw.Twin(epochs=0))):
        made = fw.merge(method, base=base, experts=experts_of(base))
        assert any(isinstance(m, OpenAttention) for m in made.module().modules())
        made.source = tmp_path / "base"
        if name == "wemoe":
            loud(made.module())
        made.save(tmp_path / name)
        asked.append((tmp_path / name, {"pixel_values": PIXELS}, {}))
        with torch.no_grad():
            expected.append(made.module()(PIXELS)[0])
            plain = copy.deepcopy(base)
            plain.load_state_dict(made.unload({"pixel_values": PIXELS[:1]}).state_dict())
            torch.testing.assert_close(plain(PIXELS[:1]).pooler_output,
                                       made.module()(PIXELS[:1]).pooler_output)  # fmt: skip
    torch.testing.assert_close(elsewhere(tmp_path, asked), expected)


class Late(nn.Module):
    """Tokens come before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([layer(first=False)]), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=0))


def test_where_tokens_come_first_no_sample_can_have_its_own_weights() -> None:
    torch.manual_seed(0)
    base = Late().eval()
    experts, x = experts_of(base), torch.randn(5, 5, WIDTH)
    with pytest.raises(PlanError, match=r"\(tokens, samples, width\)[\s\S]*per='batch'"):
        fw.merge(WEMoE(steps=0), base=base, experts=experts)
    for method in (WEMoE(steps=0, per="batch"), WEMoE(steps=0, router=0), fw.Twin(epochs=0)):
        made = fw.merge(method, base=base, experts=experts)
        plain = copy.deepcopy(base)
        plain.load_state_dict(made.unload(x).state_dict())
        with torch.no_grad():
            torch.testing.assert_close(made.module()(x), plain(x), rtol=1e-4, atol=1e-5)
    alone = fw.merge(Smile(rank=64, gate=64, rest=1), base=base, experts={"a": experts["a"]})
    with torch.no_grad():
        torch.testing.assert_close(alone.module()(x), experts["a"](x), rtol=1e-4, atol=1e-5)


class Deep(nn.Module):
    """A block with a convolution of several groups."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.wide(x).relu())


def test_maps_that_no_layer_can_take_are_told_of() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"blocks": nn.ModuleList([Deep()])})
    base.forward = lambda x: base["blocks"][0](x).mean(dim=(2, 3))
    experts = experts_of(base)
    with pytest.warns(FusewrightWarning, match=r"1 linear maps cannot be routed \(blocks.0.deep"):
        smile = fw.merge(Smile(rank=2, gate=2), base=base, experts=experts)
    assert smile.report["fitted"]["left"] == ["blocks.0.deep.weight", "blocks.0.deep.bias"]
    with pytest.warns(FusewrightWarning, match=r"deep.weight\) and are merged as all other"):
        mixed = fw.merge(WEMoE(steps=0), base=base, experts=experts)
    assert mixed.report["fitted"]["left"] == ["blocks.0.deep.weight"]
    assert list(mixed.layers) == ["blocks.0.wide", "routing"]


@pytest.mark.parametrize("cls", [WEMoE, RankOneMoE])
def test_routers_of_attention_learn_beside_experts_that_are_asked(cls) -> None:
    base = base_of("open")
    draw = torch.Generator().manual_seed(1)
    data = {name: [{"input_values": torch.randn(6, 5, 6, generator=draw)} for _ in range(4)]
            for name in ("a", "b")}  # fmt: skip
    method = cls(modules=EVERY, steps=20, rate=3e-2, batch=6, guard=6, every=10,
                 objective="matching")  # fmt: skip
    made = fw.merge(method, base=base, experts=experts_of(base), data=data)
    losses = made.report["fitted"]["losses"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    model = made.module()
    for parameter in model.get_submodule("routing").parameters():
        parameter.requires_grad_()
    model(X).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.get_submodule("routing").parameters())

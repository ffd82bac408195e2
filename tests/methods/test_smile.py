"""SMILE on tiny models: each token to the expert that it excites, nothing trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from routed_toys import PIXELS, TINY, base_of, clip, gpt2, llama, resnet, t5
from torch import nn

import fusewright as fw
from fusewright.errors import FusewrightWarning, PlanError, WeightsError
from fusewright.methods.routed import Smile
from fusewright.modules.architecture import describe_module
from fusewright.modules.routed import RoutedLinear

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).reshape(3, 8)


def vit():
    return transformers.ViTModel(transformers.ViTConfig(
        **TINY, intermediate_size=32, image_size=8, patch_size=4), add_pooling_layer=False
    )  # fmt: skip


def bert():
    return transformers.BertModel(transformers.BertConfig(
        **TINY, intermediate_size=32, vocab_size=50), add_pooling_layer=False)  # fmt: skip


INPUTS = {
    vit: {"pixel_values": PIXELS}, clip: {"pixel_values": PIXELS},
    resnet: {"pixel_values": PIXELS},
    bert: {"input_ids": IDS}, gpt2: {"input_ids": IDS}, llama: {"input_ids": IDS},
    t5: {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
}  # fmt: skip
MODELS = pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)


def expert_of(base: nn.Module, seed: int, only: str = "") -> nn.Module:
    """The base with the linear maps of its blocks moved, convolutions too."""
    draw, expert = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for linear in describe_module(base).linears.values():
            if linear.block is not None and only in linear.module:
                for parameter in expert.get_submodule(linear.module).parameters():
                    noise = torch.randn(parameter.shape, generator=draw)
                    parameter.add_(0.3 * parameter.std().nan_to_num(0.1).clamp(min=0.02) * noise)
    return expert


def moved(model: nn.Module, seed: int) -> nn.Module:
    """The model with every tensor moved a little."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model


def answer(model: nn.Module, make) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS[make])[0]


@MODELS
def test_one_expert_at_full_rank_is_that_expert(make) -> None:
    base = base_of(make)
    expert = expert_of(base, 1)
    made = fw.merge(Smile(rank=64, gate=64), base=base, experts={"a": expert})
    assert made.layers
    torch.testing.assert_close(answer(made.module(), make), answer(expert, make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert (answer(base, make) - answer(expert, make)).abs().max() > 1e-2


@MODELS
def test_tensors_that_are_not_routed_may_be_merged(make) -> None:
    base = base_of(make)
    experts = {name: moved(expert_of(base, seed), seed) for seed, name in enumerate("ab", 1)}
    plain, rest = (fw.merge(Smile(rank=64, gate=2, rest=rest), base=base, experts=experts)
                   for rest in (0.0, 0.5))  # fmt: skip
    start, other = base.state_dict(), rest.module().state_dict()
    changed = [n for n, t in plain.module().state_dict().items() if not t.equal(other[n])]
    assert changed and not any(".up" in n or ".down" in n or ".gate" in n for n in changed)
    for name in changed:
        both = sum(e.state_dict()[name] - start[name] for e in experts.values())
        torch.testing.assert_close(other[name], start[name] + 0.5 * both)
    some = [{"filter": changed[0], "value": 0.5}, 0]
    one = fw.merge(Smile(rank=64, gate=2, rest=some), base=base, experts=experts)
    state = one.module().state_dict()
    differing = [n for n, t in plain.module().state_dict().items() if not t.equal(state[n])]
    assert changed[0] in differing and set(differing) < set(changed)  # others are tied to it
    assert all(state[n].equal(other[n]) for n in differing)
    alone = fw.merge(Smile(rank=64, gate=64, rest=1.0), base=base, experts={"a": experts["a"]})
    torch.testing.assert_close(answer(alone.module(), make), answer(experts["a"], make),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_every_token_goes_where_a_plain_loop_says() -> None:
    torch.manual_seed(3)
    experts, rank, gate, size, out = 3, 2, 2, 6, 5
    base = nn.Linear(size, out).double()
    up, down = torch.randn(experts, out, rank).double(), torch.randn(experts, rank, size).double()
    gates, bias = torch.randn(experts, gate, size).double(), torch.randn(experts, out).double()
    inputs = torch.randn(2, 4, size).double()
    for top in (1, 2, 3, 5):
        layer = RoutedLinear(base, up, down, gates, bias, top)
        for row, said in zip(inputs.reshape(-1, size), layer(inputs).reshape(-1, out), strict=True):
            norms = torch.stack([(g @ row).norm() for g in gates])
            shares = norms.softmax(0)
            chosen = shares.argsort(descending=True)[:top]
            expected = base(row) + sum(
                shares[t] / shares[chosen].sum() * (up[t] @ (down[t] @ row) + bias[t])
                for t in chosen
            )
            torch.testing.assert_close(said, expected, rtol=1e-6, atol=1e-6)


def test_an_input_is_answered_alike_in_any_batch() -> None:
    base = base_of(gpt2)
    model = fw.merge(Smile(rank=4, gate=2), base=base, experts={
        "a": expert_of(base, 1), "b": expert_of(base, 2)}).module()  # fmt: skip
    with torch.no_grad():
        whole = model(input_ids=IDS)[0]
        alone = torch.cat([model(input_ids=row[None])[0] for row in IDS])
    torch.testing.assert_close(whole, alone)


def test_layers_that_nobody_changed_stay() -> None:
    base = base_of(llama)
    made = fw.merge(Smile(), base=base, experts={"a": expert_of(base, 1, only="mlp")})
    assert made.layers and all("mlp" in path for path in made.layers)
    assert "lm_head" not in made.layers


def test_lora_experts_are_exact_at_their_rank(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = base_of(gpt2)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path / "a")
    made = fw.merge(Smile(rank=3, gate=3), base=tmp_path / "base", experts={"a": tmp_path / "a"})
    torch.testing.assert_close(answer(made.module(), gpt2), answer(tuned.eval(), gpt2),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    layer = made.module().get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.up.shape == (1, 64, 3) and layer.gate.shape == (1, 3, 16)


def lora(base: nn.Module, targets: list[str], seed: int, size: float = 0.3) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=targets))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return tuned


def rows_of(model: nn.Module, make) -> dict[str, list[int]]:
    """How many rows each expert takes in each layer."""
    found: dict[str, list[int]] = {}

    def note(path: str, layer: RoutedLinear, x: torch.Tensor) -> None:
        chosen = layer.routed(x.flatten(0, -2) @ layer.gate.flatten(0, 1).T)[1][:, 0]
        found[path] = torch.bincount(chosen, minlength=layer.experts).tolist()

    for path, layer in model.named_modules():
        if isinstance(layer, RoutedLinear):
            layer.register_forward_pre_hook(lambda each, args, path=path: note(path, each, args[0]))
    with torch.no_grad():
        model(**{name: ids + 1 for name, ids in INPUTS[make].items()})  # padding's row is zero
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_routed_as_the_same_weights_merged(tmp_path, dtype) -> None:
    base = base_of(llama).to(dtype)
    base.save_pretrained(tmp_path / "base")
    targets = {"b": ["q_proj"], "a": ["q_proj", "up_proj"]}
    for seed, (name, found) in enumerate(targets.items(), 1):
        tuned = lora(base, found, seed)
        tuned.save_pretrained(tmp_path / name)
        tuned.merge_and_unload().save_pretrained(tmp_path / f"{name}-whole")
    rows, answers = [], []
    for kind in ("", "-whole"):
        experts = {name: tmp_path / f"{name}{kind}" for name in targets}
        model = fw.merge(Smile(gate=12), base=tmp_path / "base", experts=experts).module()
        layers = [x for x in model.modules() if isinstance(x, RoutedLinear)]
        assert {x.gate.shape[1] for x in layers} == {3}
        answers.append(answer(model, llama))
        rows.append(rows_of(model, llama))
    assert rows[0].keys() == {f"model.layers.{at}.{path}" for at in (0, 1)
                              for path in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
    for path, (one, two) in rows[0].items():
        assert (one == 0) == ("up_proj" in path) and two > 0, path
    assert rows[0] == rows[1]
    few = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*answers, **few)


def test_an_expert_that_changed_nothing_takes_no_rows() -> None:
    """Also one that is stored in fewer bits than the base, which moves every weight a little."""
    base = base_of(llama)
    one = expert_of(base, 1, only="mlp")
    rounded = copy.deepcopy(base).bfloat16()
    changed = expert_of(base, 2)
    for idle in (copy.deepcopy(base), one, rounded):
        made = fw.merge(Smile(gate=12), base=base, experts={"idle": idle, "a": changed})
        for path, (first, second) in rows_of(made.module(), llama).items():
            assert second and (first == 0) == ("mlp" not in path or idle is not one), path


def test_updates_of_the_last_bit_are_routed_by() -> None:
    base = base_of(llama).bfloat16()
    experts = {name: copy.deepcopy(base) for name in "ab"}
    for at, expert in enumerate(experts.values()):
        with torch.no_grad():
            weight = expert.model.layers[0].mlp.up_proj.weight
            weight[:, at] = torch.nextafter(weight[:, at], torch.tensor(9.0).bfloat16())
    made = fw.merge(Smile(), base=base, experts=experts)
    gate = made.module().get_submodule("model.layers.0.mlp.up_proj").gate.float()
    assert [int(g.abs().sum(dim=0).argmax()) for g in gate] == [0, 1]
    assert torch.allclose(gate.norm(dim=(1, 2)), torch.ones(2), atol=0.01)


def test_parameters_are_those_of_the_formula() -> None:
    base = base_of(llama)
    made = fw.merge(Smile(rank=3, gate=2), base=base,
                    experts={"a": expert_of(base, 1), "b": expert_of(base, 2)})  # fmt: skip
    linears = [part for path, part in base.named_modules()
               if isinstance(part, nn.Linear) and path != "lm_head"]  # fmt: skip
    extra = sum(2 * (3 * (x.in_features + x.out_features) + 2 * x.in_features) for x in linears)
    before = sum(t.numel() for t in base.state_dict().values())
    assert made.report["parameters"]["stored"] - before == extra


def test_gates_that_cannot_tell_experts_apart_are_told_of(recwarn) -> None:
    base = base_of(llama)
    experts = {"a": expert_of(base, 1), "b": expert_of(base, 2)}
    fw.merge(Smile(rank=2, gate=15), base=base, experts=experts)
    assert not [w for w in recwarn if "gate" in str(w.message)]
    with pytest.warns(FusewrightWarning, match="choose a gate below 16"):
        fw.merge(Smile(rank=2, gate=16), base=base, experts=experts)
    fw.merge(Smile(rank=2, gate=16), base=base, experts={"a": experts["a"]})
    assert len([w for w in recwarn if "gate" in str(w.message)]) == 0


def test_what_the_checkpoint_lacks_is_not_counted(tmp_path: Path) -> None:
    whole = base_of(bert).base_model
    plain = type(whole)(whole.config, add_pooling_layer=False)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.1)
        plain.save_pretrained(tmp_path / name)
    made = fw.merge(Smile(rank=3, gate=2), base=tmp_path / "base",
                    experts={name: tmp_path / name for name in "ab"})  # fmt: skip
    assert any("pooler" in name for name in made.routed.state_dict())
    written = made.state_dict()
    assert made.report["parameters"]["stored"] == sum(t.numel() for t in written.values())
    assert made.report["parameters"]["bytes"] == sum(t.nbytes for t in written.values())


def test_experts_that_change_no_linear_layer_are_refused() -> None:
    base = base_of(bert)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.embeddings.word_embeddings.weight.add_(0.1)
    with pytest.raises(PlanError, match="no linear layer"):
        fw.merge(Smile(), base=base, experts={"a": expert})


def test_a_folder_of_another_format_is_refused(tmp_path) -> None:
    base = base_of(gpt2)
    base.save_pretrained(tmp_path / "base")
    expert_of(base, 1).save_pretrained(tmp_path / "a")
    fw.merge(Smile(), base=tmp_path / "base", experts={"a": tmp_path / "a"}, out=tmp_path / "out")
    said = json.loads((tmp_path / "out" / "routed.json").read_text())
    (tmp_path / "out" / "routed.json").write_text(json.dumps({**said, "routed": 2}))
    with pytest.raises(WeightsError, match="another format"):
        fw.load(tmp_path / "out")


def test_transformers_refuses_a_folder_whose_layers_it_would_leave_out(tmp_path) -> None:
    base = base_of(gpt2)
    base.save_pretrained(tmp_path / "base")
    expert_of(base, 1).save_pretrained(tmp_path / "a")
    made = fw.merge(Smile(), base=tmp_path / "base", experts={"a": tmp_path / "a"})
    for name, options in {"one": {}, "many": {"shard_size": "8KiB"}}.items():
        made.save(tmp_path / name, **options)
        assert list((tmp_path / name).glob("routed*.safetensors"))
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            type(base).from_pretrained(tmp_path / name)
        again = fw.load(tmp_path / name)
        assert all(again.state_dict()[n].equal(t) for n, t in made.state_dict().items())


def test_convolutions_beside_linear_maps_stay_the_bases() -> None:
    """Stages of Segformer begin with one."""
    kinds = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [16],
             "patch_sizes": [3], "strides": [2], "num_attention_heads": [2], "mlp_ratios": [2],
             "decoder_hidden_size": 8}  # fmt: skip
    base = base_of(lambda: transformers.SegformerModel(transformers.SegformerConfig(**kinds)))
    made = fw.merge(Smile(rank=4, gate=2), base=base, experts={"a": expert_of(base, 1)})
    assert not any(isinstance(layer.base, nn.Conv2d) for _, layer in made._layers())
    left = made.report["fitted"]["left"]
    assert any("patch_embeddings.proj" in name for name in left)
    assert any("dwconv" in name for name in left) and not any("fc1" in name for name in left)


def test_running_statistics_are_the_experts_mean_and_norms_the_bases() -> None:
    base = base_of(resnet)
    experts = {name: moved(expert_of(base, seed), seed) for seed, name in enumerate("ab", 1)}
    with torch.no_grad():
        for seed, expert in enumerate(experts.values()):
            for name, buffer in expert.named_buffers():
                if "running" in name:
                    buffer.add_(seed + 0.5)
    made = fw.merge(Smile(rank=4, gate=2), base=base, experts=experts)
    state, one, two = made.state_dict(), *(e.state_dict() for e in experts.values())
    for name, tensor in base.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state[name], (one[name] + two[name]) / 2)
        elif "normalization" in name or "classifier" in name:
            assert state[name].equal(tensor)
    left = made.report["fitted"]["left"]
    assert "classifier.1.weight" in left and not any("running" in name for name in left)
    assert not any(name.endswith("convolution.weight") and "encoder" in name for name in left)
    assert all(isinstance(layer.base, nn.Conv2d) for _, layer in made._layers())

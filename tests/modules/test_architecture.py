"""What describe_module says of tiny models of many families, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as hf
from torch import nn

from fusewright.layout import Role, describe
from fusewright.modules import Architecture, describe_module
from fusewright.modules.architecture import config_of
from fusewright.modules.blocks import find_blocks

_LLM = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=50)  # fmt: skip
_GQA = dict(_LLM, num_key_value_heads=2)
_BERT = dict(_LLM, max_position_embeddings=12)
_VIT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            image_size=8, patch_size=4)  # fmt: skip
_IDS = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
_GPT2 = dict(n_embd=16, n_layer=3, n_head=4, vocab_size=50, n_positions=12, **_IDS)
_T5 = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3,
           num_heads=4)  # fmt: skip
_TEXT = dict(_BERT, num_hidden_layers=2, **_IDS)
_FLAN = dict(_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
_RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1])


def _flan() -> nn.Module:
    """Flan-T5's checkpoints have a head of their own, although the config class says tied."""
    net = hf.T5ForConditionalGeneration(hf.T5Config(**_FLAN))
    net.lm_head = nn.Linear(16, 50, bias=False)
    return net


def _layers(stack: str, count: int) -> list[str]:
    return [f"{stack}.{n}" for n in range(count)]


@dataclass(frozen=True)
class Expected:
    """``linears`` counts those of one block (the last); ``outside`` are those of none."""

    build: Callable[[], nn.Module]
    blocks: list[str]
    linears: int
    outside: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    in_first: int = 0
    packed: int = 0
    batchnorms: int = 0


_STAGES = ["stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0"]
_TOWER = _layers("vision_model.encoder.layers", 3)
_T5_BLOCKS = _layers("encoder.block", 2) + _layers("decoder.block", 3)
_PATCHES = "embeddings.patch_embeddings.projection"

MODELS = {
    "clip": Expected(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=_TEXT, vision_config=_VIT, projection_dim=8)
        ),
        _layers("text_model.encoder.layers", 2) + _TOWER, 6,
        ("vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"),
    ),
    "clip vision": Expected(
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_VIT, projection_dim=8)),
        _TOWER, 6, ("vision_model.embeddings.patch_embedding", "visual_projection"),
    ),
    "vit": Expected(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)),
        _layers("vit.layers", 3), 6, (f"vit.{_PATCHES}", "classifier"), ("classifier",),
    ),
    "dinov2": Expected(
        lambda: hf.Dinov2Model(hf.Dinov2Config(**_VIT)),
        _layers("encoder.layer", 3), 6, (_PATCHES,),
    ),
    "dinov2 classifier": Expected(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_VIT)),
        _layers("dinov2.encoder.layer", 3), 6, (f"dinov2.{_PATCHES}", "classifier"),
        ("classifier",),
    ),
    "resnet basic": Expected(
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**_RESNET, layer_type="basic")),
        [f"resnet.encoder.{s}" for s in _STAGES], 3,
        ("resnet.embedder.embedder.convolution", "classifier.1"), ("classifier.1",), batchnorms=8,
    ),
    "resnet bottleneck": Expected(
        lambda: hf.ResNetModel(hf.ResNetConfig(**_RESNET, layer_type="bottleneck")),
        [f"encoder.{s}" for s in _STAGES], 4, ("embedder.embedder.convolution",), batchnorms=11,
    ),
    "convnext": Expected(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2)
        ),
        [f"convnext.encoder.{s}" for s in _STAGES], 4,
        ("convnext.embeddings.patch_embeddings", "classifier"), ("classifier",),
    ),
    "bert": Expected(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
        _layers("bert.encoder.layer", 3), 6, ("bert.pooler.dense", "classifier"), ("classifier",),
    ),
    "bert masked": Expected(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
        _layers("bert.encoder.layer", 3), 6,
        ("cls.predictions.transform.dense", "cls.predictions.decoder"),
        ("cls.predictions.transform.dense", "cls.predictions.decoder"),
        (("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
         ("cls.predictions.bias", "cls.predictions.decoder.bias")),
    ),
    "roberta": Expected(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT)),
        _layers("roberta.encoder.layer", 3), 6, ("classifier.dense", "classifier.out_proj"),
        ("classifier.dense", "classifier.out_proj"),
    ),
    "gpt2": Expected(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
        _layers("transformer.h", 3), 4, ("lm_head",), ("lm_head",),
        (("transformer.wte.weight", "lm_head.weight"),), in_first=12, packed=3,
    ),
    "gpt2 classifier": Expected(
        lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**_GPT2)),
        _layers("transformer.h", 3), 4, ("score",), ("score",), in_first=12, packed=3,
    ),
    "llama": Expected(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLM, tie_word_embeddings=True)),
        _layers("model.layers", 3), 7, ("lm_head",), ("lm_head",),
        (("model.embed_tokens.weight", "lm_head.weight"),),
    ),
    "mistral": Expected(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA)),
        _layers("model.layers", 3), 7, ("lm_head",), ("lm_head",),
    ),
    "qwen2": Expected(
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA)),
        _layers("model.layers", 3), 7, ("lm_head",), ("lm_head",),
    ),
    "t5": Expected(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
        _T5_BLOCKS, 10, ("lm_head",), ("lm_head",),
        (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
          "lm_head.weight"),),
    ),
    "flan-t5": Expected(
        lambda: _flan(),
        _T5_BLOCKS, 11, ("lm_head",), ("lm_head",),
        (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),),
    ),
    "torch's encoder": Expected(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24), 3,
                                      enable_nested_tensor=False),
        _layers("layers", 3), 4, packed=3,
    ),
    "by shapes alone": Expected(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)),
        ["0", "2"], 1, batchnorms=1,
    ),
}  # fmt: skip


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name].build()


@cache
def described(name: str) -> Architecture:
    return describe_module(model(name))


each = pytest.mark.parametrize("name", MODELS)


@each
def test_blocks_are_modules_in_running_order(name: str) -> None:
    paths = [block.path for block in described(name).blocks]
    if name == "by shapes alone":
        paths = paths[:2]  # the norm after them is numbered like a block
    assert paths == MODELS[name].blocks
    assert all(model(name).get_submodule(path) for path in paths)


@each
def test_linear_maps_are_found_inside_blocks_and_outside(name: str) -> None:
    found, expected = described(name), MODELS[name]
    last = [block.path for block in found.blocks].index(expected.blocks[-1])
    assert len(found.inside(last)) == expected.linears
    outside = tuple(x.module for x in found.linears.values() if x.block is None)
    assert outside == expected.outside


@each
def test_heads_ties_and_batchnorms(name: str) -> None:
    found, expected = described(name), MODELS[name]
    assert found.heads == expected.heads
    assert found.tied == expected.tied == found.layout.tied
    assert len(found.batchnorms) == expected.batchnorms


@each
def test_orientation_and_packing(name: str) -> None:
    found = described(name).linears.values()
    assert sum(linear.in_first for linear in found) == MODELS[name].in_first
    assert sum(linear.packed == (16, 16, 16) for linear in found) == MODELS[name].packed
    assert sum(bool(linear.packed) for linear in found) == MODELS[name].packed


@each
def test_inputs_and_outputs_are_those_of_the_modules(name: str) -> None:
    for linear in described(name).linears.values():
        owner = model(name).get_submodule(linear.module)
        stated = {
            "Linear": ("in_features", "out_features"), "Conv2d": ("in_channels", "out_channels"),
            "Conv1D": ("nx", "nf"),
        }.get(type(owner).__name__)  # fmt: skip
        if stated:
            expected = tuple(getattr(owner, attribute) for attribute in stated)
            assert (linear.inputs, linear.outputs) == expected, linear.weight
        assert (linear.bias is not None) == (getattr(owner, "bias", None) is not None or
                                             "in_proj" in linear.weight)  # fmt: skip


@each
def test_every_linear_module_is_described(name: str) -> None:
    kinds = (nn.Linear, nn.Conv2d, hf.pytorch_utils.Conv1D)
    modules = {path for path, m in model(name).named_modules() if isinstance(m, kinds)}
    found = {linear.module for linear in described(name).linears.values()}
    assert modules <= found
    others = {type(model(name).get_submodule(path)) for path in found - modules}
    assert others <= {nn.MultiheadAttention}


# --- What only the modules know -------------------------------------------------------------------


def test_square_weights_have_the_orientation_of_their_class() -> None:
    """Names and shapes say nothing of a square Conv1D without a bias's help."""
    net = nn.ModuleDict({"one": hf.pytorch_utils.Conv1D(6, 6), "two": nn.Linear(6, 6)})
    found = describe_module(net).linears
    assert found["one.weight"].in_first and not found["two.weight"].in_first


def test_a_bare_attention_is_packed_whatever_its_name() -> None:
    found = describe_module(nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2)})).linears
    assert found["mix.in_proj_weight"].packed == (8, 8, 8)
    assert found["mix.in_proj_weight"].bias == "mix.in_proj_bias"


def test_attention_with_other_keys_has_three_matrices() -> None:
    found = describe_module(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)).linears
    shapes = {name: (x.outputs, x.inputs) for name, x in found.items()}
    assert shapes == {"q_proj_weight": (8, 8), "k_proj_weight": (8, 4), "v_proj_weight": (8, 6),
                      "out_proj.weight": (8, 8)}  # fmt: skip


def test_convolutions_say_groups_and_window() -> None:
    net = nn.ModuleDict({"deep": nn.Conv2d(8, 16, (3, 5), groups=4),
                         "up": nn.ConvTranspose2d(8, 6, 2, groups=2)})  # fmt: skip
    found = describe_module(net).linears
    deep, up = found["deep.weight"], found["up.weight"]
    assert (deep.inputs, deep.outputs, deep.groups, deep.kernel) == (8, 16, 4, (3, 5))
    assert (up.inputs, up.outputs, up.groups, up.in_first) == (8, 6, 2, True)


def test_norms_over_images_and_embeddings_are_no_maps() -> None:
    net = nn.ModuleDict({"n": nn.LayerNorm((4, 5, 6)), "e": nn.Embedding(9, 4)})
    assert describe_module(net).linears == {}


def test_modules_that_are_one_are_tied() -> None:
    one = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": one, "b": one, "c": nn.Linear(4, 4)})
    assert set(describe_module(net).tied) == {("a.weight", "b.weight"), ("a.bias", "b.bias")}


def test_down_sampling_counts_with_the_block_after_it() -> None:
    block = described("convnext").blocks[2]
    assert block.beside == ("convnext.encoder.stages.1.downsampling_layer",)


def test_stages_without_a_number_of_their_own() -> None:
    """torchvision writes layer1.0.conv1."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))

    net = nn.ModuleDict({f"layer{s}": nn.Sequential(block(), block()) for s in (1, 2)})
    paths = [block.path for block in describe_module(net).blocks]
    assert paths == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def test_a_wrapper_passes_on_its_models_config() -> None:
    """Grouped-query sizes of a fused projection are known by the config alone."""
    config = hf.Phi3Config(**_GQA, **_IDS)
    with torch.device("meta"):
        net = nn.ModuleDict({"backbone": hf.Phi3Model(config), "head": nn.Linear(16, 5)})
    found = describe_module(net)
    assert found.linears["backbone.layers.0.self_attn.qkv_proj.weight"].packed == (16, 8, 8)
    assert found.heads == ("head",)
    assert found.layout["head.weight"].role is Role.HEAD


def test_the_outermost_config_counts() -> None:
    assert config_of(model("clip")) == model("clip").config.to_dict()
    assert config_of(nn.Linear(2, 2)) == {}


def test_a_module_at_two_places_is_known_at_both() -> None:
    one = hf.pytorch_utils.Conv1D(6, 6)
    found = describe_module(nn.ModuleDict({"a": one, "b": one})).linears
    assert found["a.weight"].in_first and found["b.weight"].in_first


def test_experts_stacked_in_one_tensor() -> None:
    with torch.device("meta"):
        net = hf.MixtralModel(hf.MixtralConfig(**_GQA, num_local_experts=5))
    found = describe_module(net).linears
    up = found["layers.0.mlp.experts.gate_up_proj"]
    assert (up.outputs, up.inputs, up.packed, up.packed_axis) == (48, 16, (24, 24), 1)
    assert found["layers.0.mlp.experts.down_proj"].kernel == ()


def test_blocks_of_a_unet_are_one_order_and_may_have_modules_beside_them() -> None:
    names = [
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.downsamplers.0.conv", "mid_block.resnets.0.conv1",
        "mid_block.resnets.1.conv1", "up_blocks.0.resnets.0.conv1",
    ]  # fmt: skip
    found = find_blocks(describe({f"{name}.weight": (4, 4, 3, 3) for name in names}))
    assert [block.path for block in found] == [
        "down_blocks.0.resnets.0", "mid_block", "up_blocks.0.resnets.0",
    ]  # fmt: skip
    assert found[0].beside == ("down_blocks.0.attentions.0", "down_blocks.0.downsamplers")


def test_a_stages_own_parameter_belongs_to_the_stage() -> None:
    shapes = {f"stages.{s}.layers.{b}.fc.weight": (4, 4) for s in (0, 1) for b in (0, 1)}
    found = find_blocks(describe({**shapes, "stages.1.scale": (4,)}))
    assert found[2].beside == ("stages.1",)


def test_a_model_without_tensors_has_nothing() -> None:
    found = describe_module(nn.ReLU())
    assert not found.blocks and not found.linears and not found.batchnorms

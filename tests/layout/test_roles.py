"""Every tensor of every family has the role that its architecture gives it."""

from __future__ import annotations

import re

import pytest
import tiny_models as tiny

from fusewright.layout import ModelLayout, Role, describe

# Ordered: the first pattern found in the name says what the tensor is.
EXPECTED: dict[str, list[tuple[str, Role]]] = {
    "llama": [
        (r"norm", Role.NORM), (r"embed_tokens", Role.EMBEDDING), (r"self_attn", Role.ATTENTION),
        (r"mlp", Role.MLP), (r"lm_head", Role.HEAD),
    ],
    "qwen3_moe": [
        (r"norm", Role.NORM), (r"embed_tokens", Role.EMBEDDING), (r"self_attn", Role.ATTENTION),
        (r"experts", Role.EXPERT), (r"mlp\.gate\.", Role.ROUTER), (r"lm_head", Role.HEAD),
    ],
    "gpt_oss": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"embed_tokens", Role.EMBEDDING),
        (r"self_attn", Role.ATTENTION), (r"experts", Role.EXPERT), (r"router", Role.ROUTER),
        (r"lm_head", Role.HEAD),
    ],
    "llama4": [
        (r"norm", Role.NORM), (r"embed_tokens", Role.EMBEDDING), (r"self_attn", Role.ATTENTION),
        (r"expert", Role.EXPERT), (r"router", Role.ROUTER), (r"lm_head", Role.HEAD),
    ],
    "gpt2": [
        (r"ln_", Role.NORM), (r"bias$", Role.BIAS), (r"wte", Role.EMBEDDING),
        (r"wpe", Role.POSITION), (r"\.attn\.", Role.ATTENTION), (r"mlp", Role.MLP),
        (r"lm_head", Role.HEAD),
    ],
    "bert": [
        (r"LayerNorm", Role.NORM), (r"bias$", Role.BIAS), (r"word_embeddings", Role.EMBEDDING),
        (r"position|token_type", Role.POSITION), (r"attention", Role.ATTENTION),
        (r"encoder", Role.MLP), (r"^cls", Role.HEAD),
    ],
    "bert_classifier": [
        (r"LayerNorm", Role.NORM), (r"bias$", Role.BIAS), (r"word_embeddings", Role.EMBEDDING),
        (r"position|token_type", Role.POSITION), (r"attention", Role.ATTENTION),
        (r"encoder", Role.MLP), (r"pooler", Role.OTHER), (r"^classifier", Role.HEAD),
    ],
    "roberta_classifier": [
        (r"LayerNorm", Role.NORM), (r"bias$", Role.BIAS), (r"word_embeddings", Role.EMBEDDING),
        (r"position|token_type", Role.POSITION), (r"attention", Role.ATTENTION),
        (r"encoder", Role.MLP), (r"^classifier", Role.HEAD),
    ],
    "vit": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"cls_token|position", Role.POSITION),
        (r"patch", Role.CONV), (r"attention", Role.ATTENTION), (r"mlp", Role.MLP),
        (r"^classifier", Role.HEAD),
    ],
    "dinov2": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"_token|position", Role.POSITION),
        (r"patch", Role.CONV), (r"attention", Role.ATTENTION), (r"mlp", Role.MLP),
        (r"layer_scale", Role.OTHER),
    ],
    "clip": [
        (r"norm|layrnorm", Role.NORM), (r"bias$", Role.BIAS),
        (r"class_emb|position", Role.POSITION),
        (r"token_embedding", Role.EMBEDDING), (r"patch", Role.CONV), (r"attn", Role.ATTENTION),
        (r"mlp", Role.MLP), (r"projection", Role.PROJECTION), (r"logit_scale", Role.OTHER),
    ],
    "siglip": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"position|probe", Role.POSITION),
        (r"token_embedding", Role.EMBEDDING), (r"patch", Role.CONV),
        (r"attn|head\.attention", Role.ATTENTION), (r"mlp", Role.MLP),
        (r"text_model\.head", Role.PROJECTION), (r"logit_scale", Role.OTHER),
    ],
    "t5": [
        (r"layer_norm", Role.NORM), (r"relative_attention_bias", Role.POSITION),
        (r"shared|embed_tokens", Role.EMBEDDING), (r"Attention", Role.ATTENTION),
        (r"DenseReluDense", Role.MLP), (r"lm_head", Role.HEAD),
    ],
    "bart": [
        (r"layer_?norm", Role.NORM), (r"bias$", Role.BIAS), (r"embed_positions", Role.POSITION),
        (r"shared|embed_tokens", Role.EMBEDDING), (r"attn", Role.ATTENTION), (r"fc\d", Role.MLP),
        (r"lm_head", Role.HEAD),
    ],
    "whisper": [
        (r"layer_norm", Role.NORM), (r"bias$", Role.BIAS), (r"embed_positions", Role.POSITION),
        (r"embed_tokens", Role.EMBEDDING), (r"attn", Role.ATTENTION), (r"fc\d", Role.MLP),
        (r"conv\d", Role.CONV), (r"proj_out", Role.HEAD),
    ],
    "resnet": [
        (r"running_", Role.STATISTIC), (r"num_batches", Role.BUFFER), (r"normalization", Role.NORM),
        (r"convolution", Role.CONV), (r"classifier\.1\.weight", Role.HEAD),
        (r"classifier\.1\.bias", Role.BIAS),
    ],
    "convnext": [
        (r"norm|downsampling_layer\.0", Role.NORM), (r"bias$", Role.BIAS),
        (r"patch|dwconv|downsampling_layer\.1", Role.CONV), (r"pwconv", Role.MLP),
        (r"layer_scale", Role.OTHER), (r"^classifier", Role.HEAD),
    ],
    "swin": [
        (r"norm", Role.NORM), (r"relative_position_bias_table", Role.POSITION),
        (r"relative_position_index", Role.BUFFER), (r"bias$", Role.BIAS), (r"patch", Role.CONV),
        (r"attention", Role.ATTENTION), (r"mlp", Role.MLP), (r"reduction", Role.OTHER),
        (r"^classifier", Role.HEAD),
    ],
    "mamba": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"embeddings", Role.EMBEDDING),
        (r"conv1d", Role.CONV), (r"mixer", Role.OTHER), (r"lm_head", Role.HEAD),
    ],
}  # fmt: skip
HAND_MADE: dict[str, list[tuple[str, Role]]] = {
    "open_clip": [
        (r"ln_", Role.NORM), (r"bias$", Role.BIAS), (r"positional|class_emb", Role.POSITION),
        (r"token_embedding", Role.EMBEDDING), (r"visual\.conv1", Role.CONV),
        (r"\.attn\.", Role.ATTENTION), (r"mlp", Role.MLP),
        (r"^visual\.proj|^text_projection", Role.PROJECTION), (r"logit_scale", Role.OTHER),
    ],
    "unet": [
        (r"norm", Role.NORM), (r"bias$", Role.BIAS), (r"conv|proj_in", Role.CONV),
        (r"attn1", Role.ATTENTION), (r"\.ff\.", Role.MLP), (r"time_emb", Role.OTHER),
    ],
    "torchvision_resnet": [
        (r"running_", Role.STATISTIC), (r"num_batches", Role.BUFFER),
        (r"bn1|downsample\.1", Role.NORM), (r"conv|downsample\.0", Role.CONV),
        (r"fc\.weight", Role.HEAD), (r"fc\.bias", Role.BIAS),
    ],
}  # fmt: skip


def _assert_roles(layout: ModelLayout, expected: list[tuple[str, Role]]) -> None:
    for name, tensor in layout.items():
        role = next(role for pattern, role in expected if re.search(pattern, name))
        assert tensor.role is role, name


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_of_real_models(name: str) -> None:
    _assert_roles(tiny.family(name).layout, EXPECTED[name])


@pytest.mark.parametrize("name", HAND_MADE)
def test_roles_of_names_as_other_libraries_write_them(name: str) -> None:
    _assert_roles(describe(getattr(tiny, name)()), HAND_MADE[name])


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_a_matrix_is_multiplied_with_and_nothing_else_is_one(name: str) -> None:
    family = tiny.family(name)
    maps = {Role.ATTENTION, Role.MLP, Role.EXPERT, Role.ROUTER, Role.CONV, Role.HEAD,
            Role.PROJECTION}  # fmt: skip
    for tensor_name, tensor in family.layout.items():
        shape = family.shapes[tensor_name]
        if tensor.role in maps:
            assert tensor.matrix == (len(shape) >= 2), tensor_name
        elif tensor.role is not Role.OTHER:
            assert not tensor.matrix, tensor_name


def test_a_two_dimensional_parameter_that_is_no_map_is_no_matrix() -> None:
    layout = tiny.family("mamba").layout
    assert not layout["backbone.layers.0.mixer.A_log"].matrix
    assert layout["backbone.layers.0.mixer.in_proj.weight"].matrix


@pytest.mark.parametrize("kind", ["int", "bool"])
def test_whatever_is_not_float_is_a_buffer(kind: str) -> None:
    layout = describe({"layers.0.mlp.fc1.weight": (4, 4)}, {"layers.0.mlp.fc1.weight": kind})
    assert layout["layers.0.mlp.fc1.weight"].role is Role.BUFFER
    assert not layout["layers.0.mlp.fc1.weight"].matrix


def test_a_gate_is_a_router_only_among_experts() -> None:
    shapes = {"layers.0.mlp.gate.weight": (4, 8), "layers.0.mlp.down.weight": (8, 4)}
    assert describe(shapes)["layers.0.mlp.gate.weight"].role is Role.MLP
    shapes["layers.0.mlp.experts.0.w1.weight"] = (4, 8)
    assert describe(shapes)["layers.0.mlp.gate.weight"].role is Role.ROUTER


def test_three_axes_of_which_the_first_counts_experts_are_experts_whatever_their_name() -> None:
    shapes = {"layers.0.block_sparse_moe.input_linear.weight": (4, 48, 16)}
    tensor = describe(shapes, {}, {"num_local_experts": 4})[next(iter(shapes))]
    assert tensor.role is Role.EXPERT and tensor.experts_first


def test_experts_are_matrices_whatever_the_parameter_is_called() -> None:
    tensor = describe({"blocks.0.ffn.experts.mlp.w1": (64, 16)})["blocks.0.ffn.experts.mlp.w1"]
    assert tensor.role is Role.EXPERT and tensor.matrix and not tensor.experts_first


def test_rows_of_the_vocabulary_are_marked_and_padding_is_allowed() -> None:
    for name in ("llama", "gpt2", "bert", "t5", "clip"):
        marked = {n for n, t in tiny.family(name).layout.items() if t.vocabulary}
        rows = {n for n, s in tiny.family(name).shapes.items() if s[:1] == (tiny.VOCAB,)}
        assert marked == rows, name
    padded = describe({"wte.weight": (64, 8), "lm_head.weight": (64, 8)}, {}, {"vocab_size": 50})
    assert all(tensor.vocabulary for tensor in padded.values())


def test_an_embedding_of_fewer_rows_is_no_vocabulary() -> None:
    shapes = {"word_embeddings.weight": (50, 8), "label_embedding.emb.weight": (10, 8)}
    layout = describe(shapes, {}, {"vocab_size": 50})
    assert [tensor.vocabulary for tensor in layout.values()] == [True, False]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", Role.EXPERT),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", Role.EXPERT),
        ("model.layers.0.block_sparse_moe.gate.weight", Role.ROUTER),
        ("vit.encoder.layer.0.attention.attention.query.weight", Role.ATTENTION),
        ("vit.encoder.layer.0.output.dense.weight", Role.MLP),
        ("gpt_neox.layers.0.attention.dense.weight", Role.ATTENTION),
        ("layers.0.attention.wq.weight", Role.ATTENTION),
        ("layers.0.feed_forward.w2.weight", Role.MLP),
        ("tok_embeddings.weight", Role.EMBEDDING),
        ("output.weight", Role.HEAD),
        ("multi_modal_projector.linear_1.weight", Role.PROJECTION),
        ("visual.merger.mlp.0.weight", Role.PROJECTION),
        ("heads.cars.weight", Role.HEAD),
    ],
)
def test_roles_of_names_on_disk(name: str, role: Role) -> None:
    shapes = {name: (8, 8), "model.layers.0.block_sparse_moe.experts.0.w2.weight": (8, 8)}
    assert describe(shapes)[name].role is role


def test_a_classifier_has_no_vocabulary() -> None:
    assert not tiny.family("bert_classifier").layout["classifier.weight"].vocabulary

"""Which block of which stack: from real models, other libraries' names, and names alone."""

from __future__ import annotations

import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st

from fusewright.layout import Role, block_order, describe

STACKS = {
    "llama": {"model.layers": 3},
    "mistral": {"model.layers": 3},
    "qwen3_moe": {"model.layers": 3},
    "gpt2": {"transformer.h": 3},
    "bert": {"bert.encoder.layer": 3},
    "roberta": {"roberta.encoder.layer": 3},
    "vit": {"vit.layers": 3},
    "dinov2": {"encoder.layer": 3},
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3},
    "t5": {"encoder.block": 2, "decoder.block": 3},
    "bart": {"model.encoder.layers": 2, "model.decoder.layers": 3},
    "resnet": {"resnet.encoder.stages": 3},
    "convnext": {"convnext.encoder.stages": 3},
    "swin": {"swin.encoder.layers": 3},
    "mamba": {"backbone.layers": 3},
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_and_depths_of_real_models(name: str) -> None:
    layout = tiny.family(name).layout
    found = {t.stack: t.depth for t in layout.values() if t.layer is not None}
    assert found == STACKS[name]
    assert set(block_order(layout)) == {(s, i) for s, d in STACKS[name].items() for i in range(d)}


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_every_matrix_that_recurs_has_a_layer(name: str) -> None:
    """Outside blocks there are only embeddings, positions, heads and what stands alone."""
    family = tiny.family(name)
    for tensor_name, tensor in family.layout.items():
        numbered = any(part.isdigit() for part in tensor_name.split("."))
        if len(family.shapes[tensor_name]) >= 2 and numbered and tensor.role is not Role.HEAD:
            assert tensor.layer is not None, tensor_name
            assert 0 <= tensor.layer < tensor.depth


def test_a_layer_is_the_outermost_number() -> None:
    layout = describe({f"layers.{i}.mlp.experts.{j}.w1.weight": (4, 4)
                       for i in range(3) for j in range(8)})  # fmt: skip
    tensor = layout["layers.2.mlp.experts.7.w1.weight"]
    assert (tensor.stack, tensor.layer, tensor.depth) == ("layers", 2, 3)


def test_stages_of_torchvision_are_one_order_of_blocks() -> None:
    layout = describe(tiny.torchvision_resnet())
    names = [f"layer{stage}.{block}.conv1.weight" for stage in range(1, 5) for block in range(2)]
    assert [layout[name].layer for name in names] == list(range(8))
    assert layout["layer3.0.downsample.0.weight"].layer == layout["layer3.0.conv1.weight"].layer
    assert layout["fc.weight"].layer is None and layout["conv1.weight"].layer is None


def test_a_unet_is_one_order_from_down_over_mid_to_up() -> None:
    layout = describe(tiny.unet())
    order = ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.1.resnets.0",
             "down_blocks.1.resnets.1", "mid_block.resnets.0", "up_blocks.0.resnets.0",
             "up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]  # fmt: skip
    assert [layout[f"{name}.conv1.weight"].layer for name in order] == list(range(9))
    assert layout["mid_block.resnets.1.conv1.weight"].layer == 4
    inner = "transformer_blocks.0.attn1.to_q.weight"
    assert layout[f"down_blocks.1.attentions.1.{inner}"].layer == 3
    assert layout["down_blocks.0.downsamplers.0.conv.weight"].layer == 1
    assert layout["time_embedding.linear_1.weight"].layer is None


def test_latent_diffusion_s_own_names_are_one_order_too() -> None:
    names = ["output_blocks.0.0", "input_blocks.1.0", "middle_block.0", "middle_block.2",
             "output_blocks.1.0", "input_blocks.2.0"]  # fmt: skip
    layout = describe({f"model.diffusion_model.{name}.conv.weight": (8, 8, 3, 3) for name in names})
    assert [tensor.layer for tensor in layout.values()] == [3, 0, 2, 2, 4, 1]


def test_a_stage_s_own_down_sampling_precedes_its_blocks_in_convnext_and_follows_in_swin() -> None:
    convnext, swin = tiny.family("convnext").layout, tiny.family("swin").layout
    assert convnext["convnext.encoder.stages.1.downsampling_layer.1.weight"].layer == 1
    assert swin["swin.encoder.layers.0.downsample.reduction.weight"].layer == 1


def test_towers_with_one_word_are_separate_stacks() -> None:
    layout = describe(tiny.open_clip())
    assert {(t.stack, t.depth) for t in layout.values() if t.layer is not None} == {
        ("visual.transformer.resblocks", 3), ("transformer.resblocks", 2)
    }  # fmt: skip


def test_unknown_words_are_found_by_repetition() -> None:
    shapes = {f"cells.{i}.{part}.weight": (4, 4) for i in range(5) for part in ("mix", "out")}
    layout = describe(shapes | {"readin.weight": (4, 2)})
    assert [layout[f"cells.{i}.mix.weight"].layer for i in range(5)] == list(range(5))
    assert layout["readin.weight"].layer is None


def test_a_sequential_model_is_one_stack_counted_in_order() -> None:
    layout = describe({"0.weight": (8, 4), "0.bias": (8,), "2.weight": (8, 8), "4.weight": (2, 8)})
    assert [layout[f"{i}.weight"].layer for i in (0, 2, 4)] == [0, 1, 2]
    assert any("gaps" in note for note in layout.notes)


def test_a_projector_beside_real_stacks_is_no_stack() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(2)}
    shapes |= {"mm_projector.0.weight": (4, 4), "mm_projector.2.weight": (4, 4)}
    layout = describe(shapes)
    assert layout["mm_projector.2.weight"].layer is None
    assert layout["mm_projector.2.weight"].role is Role.PROJECTION


def test_missing_layers_keep_their_number_where_the_config_states_the_depth() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in (2, 5)}
    layout = describe(shapes, {}, {"num_hidden_layers": 8})
    tensor = layout["model.layers.5.mlp.up_proj.weight"]
    assert (tensor.layer, tensor.depth) == (5, 8)
    assert any("2 of the config's 8 blocks" in note for note in layout.notes)


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_fraction_runs_from_embedding_to_head_and_never_falls(name: str) -> None:
    layout = tiny.family(name).layout
    for tensor in layout.values():
        assert 0.0 <= tensor.fraction <= 1.0
        if tensor.role in (Role.EMBEDDING, Role.POSITION) and not tensor.after:
            assert tensor.fraction == 0.0 or tensor.layer is not None
        if tensor.role is Role.HEAD:
            assert tensor.fraction == 1.0
    for stack in {t.stack for t in layout.values()}:
        placed = [t for t in layout.values() if t.stack == stack and t.layer is not None]
        fractions = [t.fraction for t in sorted(placed, key=lambda t: t.layer or 0)]
        assert fractions == sorted(fractions)
        assert not any(t.after for t in placed)
        if placed:
            assert fractions[-1] == 1.0
            assert fractions[0] == (0.0 if placed[0].depth > 1 else 1.0)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", "model.norm.weight"), ("gpt2", "transformer.ln_f.bias"),
     ("t5", "encoder.final_layer_norm.weight"), ("clip", "visual_projection.weight"),
     ("clip", "vision_model.post_layernorm.weight"), ("bert_classifier", "classifier.bias"),
     ("bert_classifier", "bert.pooler.dense.weight"), ("vit", "vit.layernorm.weight")],
)  # fmt: skip
def test_what_follows_the_last_block_is_after_it(name: str, tensor: str) -> None:
    assert tiny.family(name).layout[tensor].fraction == 1.0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("bert", "bert.embeddings.LayerNorm.weight"), ("clip", "vision_model.pre_layrnorm.weight"),
     ("resnet", "resnet.embedder.embedder.normalization.weight"),
     ("bart", "model.encoder.layernorm_embedding.weight"), ("whisper", "model.encoder.conv1.bias")],
)  # fmt: skip
def test_what_precedes_the_first_block_is_before_it(name: str, tensor: str) -> None:
    assert tiny.family(name).layout[tensor].fraction == 0.0


@given(st.integers(1, 40), st.permutations(range(40)))
def test_layers_do_not_depend_on_the_order_of_names(depth: int, order: list[int]) -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in order if i < depth}
    layout = describe(shapes)
    for i in range(depth):
        tensor = layout[f"model.layers.{i}.self_attn.q_proj.weight"]
        assert (tensor.layer, tensor.depth) == (i, depth)


@given(st.dictionaries(
    st.lists(st.sampled_from(["layers", "0", "12", "block", "mid_block", "down_blocks", "weight",
                              "attn", "bias", "layer1", "experts", "", "2a"]), min_size=1,
             max_size=6).map(".".join),
    st.lists(st.integers(0, 6), max_size=4).map(tuple), max_size=12,
))  # fmt: skip
def test_any_names_and_shapes_are_described(shapes: dict[str, tuple[int, ...]]) -> None:
    layout = describe(shapes, None, {})
    assert list(layout) == list(shapes)
    for name, tensor in layout.items():
        assert (tensor.layer is None) == (tensor.depth == 0)
        assert tensor.layer is None or 0 <= tensor.layer < tensor.depth
        if tensor.packed:
            assert sum(tensor.packed) == shapes[name][tensor.packed_axis]

"""How matrices are stored: which axis is the output, and how many matrices one tensor holds."""

from __future__ import annotations

import pytest
import tiny_models as tiny

from fusewright.layout import describe


def test_conv1d_is_in_by_out_and_square_weights_follow_their_block() -> None:
    layout = tiny.family("gpt2").layout
    inverted = {name for name, tensor in layout.items() if tensor.in_first}
    assert inverted == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(
    "name", sorted(set(tiny.BUILDERS) - {"gpt2", "gpt2_cross", "gpt_oss", "llama4"})
)
def test_linear_is_out_by_in(name: str) -> None:
    assert not [n for n, tensor in tiny.family(name).layout.items() if tensor.in_first]


def test_the_same_names_over_linear_are_out_by_in() -> None:
    """GPT-BigCode writes c_attn and c_fc too, over Linear: only the bias tells."""
    shapes = {"h.0.attn.c_attn.weight": (24, 16), "h.0.attn.c_attn.bias": (24,),
              "h.0.attn.c_proj.weight": (16, 16), "h.0.attn.c_proj.bias": (16,)}  # fmt: skip
    layout = describe(shapes)
    assert not any(tensor.in_first for tensor in layout.values())


def test_a_square_weight_in_a_block_of_mixed_evidence_is_out_by_in() -> None:
    shapes = {"h.0.a.weight": (8, 16), "h.0.a.bias": (16,), "h.0.b.weight": (16, 8),
              "h.0.b.bias": (16,), "h.0.s.weight": (8, 8), "h.0.s.bias": (8,)}  # fmt: skip
    assert {n for n, tensor in describe(shapes).items() if tensor.in_first} == {"h.0.a.weight"}


def test_bare_projections_of_openclip_are_in_by_out() -> None:
    layout = describe(tiny.open_clip())
    assert {n for n, t in layout.items() if t.in_first} == {"visual.proj", "text_projection"}


@pytest.mark.parametrize(
    ("name", "tensor", "sizes", "axis"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (16, 16, 16), 1),
        ("gpt2_cross", "transformer.h.0.crossattention.c_attn.weight", (16, 16), 1),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (16, 8, 8), 0),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (24, 24), 0),
        ("falcon", "transformer.h.0.self_attention.query_key_value.weight", (16, 4, 4), 0),
        ("siglip", "vision_model.head.attention.in_proj_weight", (16, 16, 16), 0),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", (12, 12), 1),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", (24, 24), 1),
        ("llama4", "model.layers.0.feed_forward.experts.gate_up_proj", (24, 24), 2),
    ],
)
def test_packed_sizes_and_axis(name: str, tensor: str, sizes: tuple[int, ...], axis: int) -> None:
    found = tiny.family(name).layout[tensor]
    assert (found.packed, found.packed_axis) == (sizes, axis)


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_packed_sizes_add_up_to_their_axis_and_only_matrices_are_packed(name: str) -> None:
    family = tiny.family(name)
    for tensor_name, tensor in family.layout.items():
        if tensor.packed:
            assert tensor.matrix
            assert sum(tensor.packed) == family.shapes[tensor_name][tensor.packed_axis]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "bert", "vit", "clip", "t5", "bart"])
def test_separate_projections_are_not_packed(name: str) -> None:
    assert not [n for n, tensor in tiny.family(name).layout.items() if tensor.packed]


@pytest.mark.parametrize(
    ("name", "part"), [("gpt_neox", "query_key_value"), ("gpt_oss", "gate_up_proj")]
)
def test_interleaved_matrices_stay_whole_and_are_noted(name: str, part: str) -> None:
    layout = tiny.family(name).layout
    assert not [n for n, tensor in layout.items() if tensor.packed]
    assert any(part in note for note in layout.notes)


def test_in_proj_of_openclip_is_three_matrices() -> None:
    layout = describe(tiny.open_clip())
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert layout[name].packed == (16, 16, 16)
    assert layout[f"visual.{name}"].packed == (24, 24, 24)


def test_a_gated_feed_forward_of_a_unet_is_two_matrices() -> None:
    layout = describe(tiny.unet())
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    assert layout[name].packed == (32, 32)


def test_a_plain_feed_forward_is_one_matrix() -> None:
    shapes = {"blocks.0.mlp.fc1.weight": (24, 8), "blocks.0.mlp.fc2.weight": (8, 24)}
    assert describe(shapes)["blocks.0.mlp.fc1.weight"].packed == ()


def test_a_vision_tower_s_qkv_is_split_by_its_own_heads() -> None:
    config = {
        "model_type": "both", "text_config": {"hidden_size": 8, "num_attention_heads": 4,
                                              "num_key_value_heads": 2, "head_dim": 6},
        "vision_config": {"hidden_size": 16, "num_attention_heads": 4},
    }  # fmt: skip
    shapes = {"visual.blocks.0.attn.qkv.weight": (48, 16), "layers.0.attn.qkv.weight": (48, 8)}
    layout = describe(shapes, {}, config)
    assert layout["visual.blocks.0.attn.qkv.weight"].packed == (16, 16, 16)
    assert layout["layers.0.attn.qkv.weight"].packed == (24, 12, 12)


def test_experts_first_and_their_orientation_follow_from_the_pair() -> None:
    for name, inverted in (("qwen3_moe", False), ("mixtral", False), ("llama4", True)):
        layout = tiny.family(name).layout
        stacks = [t for t in layout.values() if t.experts_first]
        assert len(stacks) == 6, name
        assert all(tensor.in_first is inverted for tensor in stacks), name


@pytest.mark.parametrize("inverted", [False, True])
def test_ambiguous_experts_are_settled_by_the_hidden_size(inverted: bool) -> None:
    up, down = ((4, 16, 24), (4, 24, 16)) if inverted else ((4, 24, 16), (4, 16, 24))
    shapes = {"layers.0.mlp.experts.up_proj": up, "layers.0.mlp.experts.down_proj": down}
    layout = describe(shapes, {}, {"hidden_size": 16})
    assert all(tensor.in_first is inverted for tensor in layout.values())
    assert any("nothing else tells" in note for note in describe(shapes).notes)

"""timm's and OpenCLIP's names: blocks, packed attention, what comes after the last block."""

from __future__ import annotations

from fusewright.layout import ModelLayout, Role, describe

VIT = {
    "cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "patch_embed.proj.weight": (32, 3, 8, 8),
    "blocks.0.norm1.weight": (32,), "blocks.0.attn.qkv.weight": (96, 32),
    "blocks.0.attn.qkv.bias": (96,), "blocks.0.attn.proj.weight": (32, 32),
    "blocks.0.ls1.gamma": (32,), "blocks.0.mlp.fc1.weight": (128, 32),
    "blocks.0.mlp.fc2.weight": (32, 128), "blocks.1.attn.qkv.weight": (96, 32),
    "norm.weight": (32,), "norm.bias": (32,), "head.weight": (3, 32), "head.bias": (3,),
}  # fmt: skip
CONVNEXT = {
    "stem.0.weight": (8, 3, 4, 4), "stem.1.weight": (8,),
    "stages.0.blocks.0.gamma": (8,), "stages.0.blocks.0.conv_dw.weight": (8, 1, 7, 7),
    "stages.0.blocks.0.norm.weight": (8,), "stages.0.blocks.0.mlp.fc1.weight": (32, 8, 1, 1),
    "stages.1.downsample.0.weight": (8,), "stages.1.downsample.1.weight": (16, 8, 2, 2),
    "stages.1.blocks.0.conv_dw.weight": (16, 1, 7, 7),
    "stages.1.blocks.1.conv_dw.weight": (16, 1, 7, 7),
    "head.norm.weight": (16,), "head.fc.weight": (3, 16), "head.fc.bias": (3,),
}  # fmt: skip
RESNET = {
    "conv1.weight": (8, 3, 7, 7), "bn1.weight": (8,), "bn1.running_mean": (8,),
    "layer1.0.conv1.weight": (8, 8, 3, 3), "layer1.1.conv1.weight": (8, 8, 3, 3),
    "layer2.0.conv1.weight": (16, 8, 3, 3), "layer2.0.downsample.0.weight": (16, 8, 1, 1),
    "layer2.0.downsample.1.running_var": (16,), "fc.weight": (3, 16), "fc.bias": (3,),
}  # fmt: skip
_BLOCK = {
    "ln_1.weight": (32,), "attn.in_proj_weight": (96, 32), "attn.in_proj_bias": (96,),
    "attn.out_proj.weight": (32, 32), "mlp.c_fc.weight": (128, 32), "mlp.c_proj.weight": (32, 128),
}  # fmt: skip
OPEN_CLIP = {
    "positional_embedding": (16, 32), "text_projection": (32, 24), "logit_scale": (),
    "visual.class_embedding": (32,), "visual.positional_embedding": (17, 32),
    "visual.proj": (32, 24), "visual.conv1.weight": (32, 3, 8, 8), "visual.ln_pre.weight": (32,),
    "visual.ln_post.weight": (32,), "token_embedding.weight": (100, 32), "ln_final.weight": (32,),
    **{f"{tower}transformer.resblocks.{at}.{name}": shape
       for tower in ("", "visual.") for at in (0, 1) for name, shape in _BLOCK.items()},
}  # fmt: skip
ATTENTION_POOL = {
    **{f"visual.layer{at}.0.conv1.weight": (8, 8, 3, 3) for at in (1, 2)},
    "visual.attnpool.positional_embedding": (5, 64), "visual.attnpool.q_proj.weight": (64, 64),
    "visual.attnpool.c_proj.weight": (24, 64), "visual.attnpool.c_proj.bias": (24,),
}  # fmt: skip
TIMM_TOWER = {
    **{f"visual.trunk.{name}": shape for name, shape in VIT.items() if "head" not in name},
    "visual.head.proj.weight": (24, 32), "text.logit_bias": (),
}  # fmt: skip


def roles(layout: ModelLayout) -> dict[str, str]:
    return {name: tensor.role.value for name, tensor in layout.items()}


def test_a_vit_of_timm_has_blocks_packed_attention_and_a_head():
    layout = describe(VIT)
    qkv = layout["blocks.1.attn.qkv.weight"]
    assert (qkv.stack, qkv.layer, qkv.depth) == ("blocks", 1, 2)
    assert (qkv.packed, qkv.packed_axis, qkv.matrix) == ((32, 32, 32), 0, True)
    assert roles(layout)["blocks.0.mlp.fc2.weight"] == Role.MLP
    assert roles(layout)["head.weight"] == Role.HEAD
    assert layout["patch_embed.proj.weight"].fraction == layout["cls_token"].fraction == 0
    assert layout["norm.weight"].fraction == layout["head.bias"].fraction == 1


def test_the_stages_of_timms_convnext_are_one_order_of_blocks():
    layout = describe(CONVNEXT)
    layers = [layout[f"stages.{s}.blocks.{b}.conv_dw.weight"].layer
              for s, b in ((0, 0), (1, 0), (1, 1))]  # fmt: skip
    assert layers == [0, 1, 2]
    assert layout["stages.1.downsample.1.weight"].layer == 1
    assert layout["stem.0.weight"].fraction == 0 and layout["head.norm.weight"].fraction == 1
    assert layout["head.fc.weight"].role is Role.HEAD


def test_timms_resnet_has_statistics_and_down_sampling_in_its_block():
    layout = describe(RESNET)
    assert layout["layer2.0.downsample.0.weight"].layer == 2
    assert layout["layer2.0.conv1.weight"].layer == 2
    assert layout["layer2.0.downsample.1.running_var"].role is Role.STATISTIC
    assert layout["bn1.weight"].fraction == 0 and layout["fc.weight"].fraction == 1


def test_both_towers_of_openclip_have_packed_blocks_and_projections_in_by_out():
    layout = describe(OPEN_CLIP)
    for stack in ("transformer.resblocks", "visual.transformer.resblocks"):
        packed = layout[f"{stack}.1.attn.in_proj_weight"]
        assert (packed.stack, packed.layer, packed.depth) == (stack, 1, 2)
        assert packed.packed == (32, 32, 32) and packed.role is Role.ATTENTION
    for name in ("visual.proj", "text_projection"):
        assert layout[name].role is Role.PROJECTION
        assert layout[name].in_first and layout[name].matrix and layout[name].after
    assert layout["token_embedding.weight"].vocabulary
    assert layout["visual.ln_pre.weight"].fraction == layout["positional_embedding"].fraction == 0
    for name in ("visual.ln_post.weight", "ln_final.weight", "logit_scale"):
        assert layout[name].fraction == 1


def test_an_attention_pool_is_attention_after_the_last_block():
    layout = describe(ATTENTION_POOL)
    for name in ("visual.attnpool.q_proj.weight", "visual.attnpool.c_proj.weight"):
        assert layout[name].role is Role.ATTENTION and layout[name].fraction == 1
    assert layout["visual.attnpool.positional_embedding"].fraction == 1


def test_a_tower_of_timm_inside_openclip_is_projected_rather_than_classified():
    layout = describe(TIMM_TOWER)
    assert layout["visual.trunk.blocks.1.attn.qkv.weight"].packed == (32, 32, 32)
    assert layout["visual.head.proj.weight"].role is Role.PROJECTION
    assert layout["visual.head.proj.weight"].fraction == layout["text.logit_bias"].fraction == 1

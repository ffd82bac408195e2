"""Every convention about names that this room relies on, as data; the code only applies it.

A convention is listed when two or more model families share it. What shapes, biases and config
can tell is never listed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fusewright.layout.spec import Role

# --- Blocks: where a stack of blocks is, and which part of it is one block -----------------------

#: A component that is followed by the number of a block: ``layers.3``, ``h.3``, ``down_blocks.3``.
STACK_WORD = re.compile(
    r"layers?|blocks?|h|resblocks|stages?|features|\w+_(layers?|blocks?|groups)"
)
#: A component that carries the number of its stage: ``layer1.0.conv1``.
NUMBERED_STAGE = re.compile(r"(layer|stage|block)(\d+)")
#: Blocks that have no number because there is one of them.
SINGLE_BLOCKS = frozenset({"mid_block", "middle_block"})
#: Stages of blocks: (component before the stage's number, what follows it up to the block's).
STAGES = (
    (re.compile(r"stages?|layer|stage|block|features|blocks"), re.compile(r"(\d+)\.")),
    (re.compile(r"stages?"), re.compile(r"(?:layers|blocks)\.(\d+)\.")),
    (re.compile(r"layers"), re.compile(r"blocks\.(\d+)\.")),
    (re.compile(r"(down|up)_blocks"), re.compile(r"\w*(?:resnets|attentions|modules)\.(\d+)\.")),
)
#: Stages in which a down-sampling precedes the blocks; elsewhere it follows them.
SAMPLES_FIRST = re.compile(r"stages?")
#: Stacks that are run one after the other and form one order of blocks.
CHAINS = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("double_blocks", "single_blocks"),
)
#: Config keys that state a number of blocks.
DEPTH_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip

# --- Roles: ordered, the first rule that holds decides -------------------------------------------


@dataclass(frozen=True)
class RoleRule:
    """``pattern`` searched in the lower-case name, for tensors of ``least`` to ``most`` axes.

    ``where``: "inside" blocks, "outside" them, "moe" for models that have experts, or "any".
    """

    role: Role
    pattern: re.Pattern[str]
    where: str = "any"
    least: int = 0
    most: int = 9


def _rule(role: Role, pattern: str, where: str = "any", dims: tuple[int, int] = (0, 9)) -> RoleRule:
    return RoleRule(role, re.compile(pattern), where, *dims)


ROLES = (
    _rule(Role.STATISTIC, r"running_(mean|var)$"),
    _rule(Role.BUFFER, r"(num_batches_tracked|inv_freq|position_ids|position_index|masked_bias)$"),
    _rule(Role.BUFFER, r"(^|\.)(attn|attention)\.bias$", dims=(3, 9)),  # a causal mask
    _rule(Role.NORM, r"(^|\.)weight$|(norm|ln)[^.]*\.(gamma|beta)$", dims=(1, 1)),
    _rule(Role.EXPERT, r"(^|[._])experts?\.(?!.*bias$)", dims=(2, 3)),
    _rule(Role.CONV, r"(^|\.)weight(_v)?$", dims=(3, 5)),
    _rule(
        Role.POSITION,
        r"(^|[._])(position|embed_positions|rel_pos|rel_embeddings|wpe\.)"
        r"|relative_(attention_bias|position)|pos(itional)?_?emb"
        r"|(cls|class|mask|dist|distillation|pos|register)_tokens?$|class_embedding$"
        r"|(token_type|segment)_emb|\.probe$",
    ),
    _rule(Role.BIAS, r"(^|[._])bias$"),
    _rule(Role.ROUTER, r"(^|[._])(router|gate)(\.\w+)*$", "moe", (2, 2)),
    _rule(
        Role.PROJECTION,
        r"(visual|vision|text|image|audio|multi_?modal|mm)_(projection|projector|proj)"
        r"|(^|[._])(merger|connector|aligner)\.|(^|\.)visual\.proj$"
        r"|(^|\.)visual\.head\.|(text|vision)_model\.head\.weight$|patch_embed|hidden_mapping"
        r"|embeddings_project",
        "outside",
    ),
    _rule(
        Role.EMBEDDING,
        r"(^|[._])(embed_tokens|wte|shared|embed_in|emb|tok\w*_emb\w*|word_emb\w*|embeddings?)"
        r"(_\w+)?\.weight$",
        "outside",
        (2, 2),
    ),
    _rule(
        Role.HEAD,
        r"(^|\.)(lm_head|embed_out|classifier\w*|score|cls|predictions|qa_outputs|vocab_\w+"
        r"|\w+_head)(\.|$)",
        "outside",
    ),
    _rule(
        Role.ATTENTION,
        r"(^|[._])\w*(attn|attention)(pool|\d*)([._]|$)|(^|\.)att\."
        r"|(^|[._])(q|k|v|o|qkv|kv)_(proj|lin|linear)([._]|$)",
    ),
    _rule(
        Role.MLP,
        r"(^|[._])(\w*mlp|\w*ffn|ffw?|feed_?forward|densereludense|intermediate|fc\d|fc_in|fc_out"
        r"|c_fc|(gate|up|down|gate_up)_proj|w[123]|lin(ear)?[12]|pwconv\d|net)([._]|$)",
    ),
    _rule(Role.MLP, r"(^|\.)output\.dense\.", "inside"),
    _rule(Role.HEAD, r"(^|\.)(heads?|fc|output|proj_out|last_linear)(\.|$)", "outside"),
)

#: Outside blocks, used after the last one. Norms are, unless BEFORE says otherwise.
AFTER = re.compile(
    r"(^|[._])(pooler|visual_projection|text_projection|visual\.(proj|head)|final|post|conv_out"
    r"|norm_out|attn_?pool\.|logit_(scale|bias))"
    r"|(text|vision)_model\.head\.|(^|\.)(cls|predictions|lm_head|classifier)\."
)
BEFORE = re.compile(
    r"emb|stem|(^|[._])(ln_pre|pre_?la?y|conv_?\d*\.|conv1|bn1\b|norm_?pre|projector)"
)

#: The last component of weights that act as linear maps.
MATRIX_LEAF = re.compile(r"weight(_v)?|\w+_weight|(\w+_)?proj(ection)?")

# --- Several matrices stored as one --------------------------------------------------------------

QKV = frozenset(
    {"qkv", "qkv_proj", "qkv_lin", "to_qkv", "wqkv", "query_key_value", "c_attn", "in_proj",
     "in_proj_weight"}
)  # fmt: skip
KV = frozenset({"kv", "kv_proj", "to_kv"})
#: Stored head by head (q, k, v of the first head, then of the second …): nothing in the shapes
#: tells, so the ``model_type`` must. (Not with ``multi_query``: one head needs no interleaving.)
INTERLEAVED_QKV = frozenset(
    {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "fuyu", "internlm2",
     "codegen", "deberta", "gpt_bigcode"}
)  # fmt: skip
#: Gate and up projection stored element by element rather than one after the other.
INTERLEAVED_GATE = frozenset({"gpt_oss"})
#: (first, second) projection of a feed-forward. Where the first makes twice what the second takes,
#: it is two matrices.
FEED_FORWARD = (
    ("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("gate_proj", "down_proj"),
    ("input_linear", "output_linear"), ("weights_in", "weights_out"), ("net.0.proj", "net.2"),
    ("dense_h_to_4h", "dense_4h_to_h"), ("Wi", "Wo"), ("wi", "wo"), ("w12", "w3"),
    ("w1", "w2"), ("w3", "w2"), ("fc1", "fc2"),
)  # fmt: skip

# --- Config keys under which families say the same thing -----------------------------------------

HEADS_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
KV_HEADS_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

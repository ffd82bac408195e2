"""Shapes, dtype kinds and configs of small models of many families; no weights are made."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import transformers as hf

from fusewright.layout import ModelLayout, describe

VOCAB = 50
_LLM = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    vocab_size=VOCAB,
)  # fmt: skip
_GQA = dict(_LLM, num_key_value_heads=2)
_BERT = dict(_LLM, max_position_embeddings=12)
_VIT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    image_size=8, patch_size=4,
)  # fmt: skip
_MOE = dict(_GQA, head_dim=8, num_experts=4, moe_intermediate_size=12, num_experts_per_tok=2)
_SEQ2SEQ = dict(
    vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
)  # fmt: skip
_SPECIAL = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
_GPT2 = dict(n_embd=16, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=12, **_SPECIAL)
_T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=3,
           num_heads=4)  # fmt: skip

BUILDERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLM)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**_GQA, head_dim=8, tie_word_embeddings=True)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_MOE)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GQA, num_local_experts=4)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_GQA, head_dim=4, num_local_experts=4, **_SPECIAL)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**_GQA, head_dim=4, num_local_experts=4, **_SPECIAL)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GQA, **_SPECIAL)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_LLM)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_LLM, multi_query=True, new_decoder_architecture=False)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt2_cross": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, add_cross_attention=True)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
    "roberta_classifier": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**_VIT, use_swiglu_ffn=True)),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config=dict(_BERT, num_hidden_layers=2, **_SPECIAL), vision_config=_VIT,
            projection_dim=8,
        )
    ),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config=dict(_BERT, **_SPECIAL), vision_config=_VIT)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_SEQ2SEQ, max_position_embeddings=12)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_SEQ2SEQ, **_SPECIAL, decoder_start_token_id=0)
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
    ),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2],
                      window_size=4)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, state_size=4)
    ),
}  # fmt: skip


class Family(NamedTuple):
    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    config: dict[str, Any]

    @property
    def layout(self) -> ModelLayout:
        return describe(self.shapes, self.kinds, self.config)


@cache
def family(name: str) -> Family:
    """What describe() is given for a tiny model of this family."""
    with torch.device("meta"):
        model = BUILDERS[name]()
    tensors = model.state_dict()
    return Family(
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: "float" if tensor.is_floating_point() else "int" for key, tensor in tensors.items()},
        model.config.to_dict(),
    )


def unet() -> dict[str, tuple[int, ...]]:
    """A diffusion UNet as diffusers names it: two levels, attention in the second."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv_in.weight": (8, 4, 3, 3),
        "time_embedding.linear_1.weight": (32, 8),
        "time_embedding.linear_2.weight": (32, 32),
        "conv_norm_out.weight": (8,),
        "conv_out.weight": (4, 8, 3, 3),
    }
    for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"):
        for unit in range(2):
            shapes |= _resnet(f"{block}.resnets.{unit}")
            if block in ("down_blocks.1", "up_blocks.0") or (block == "mid_block" and not unit):
                shapes |= _transformer(f"{block}.attentions.{unit}")
    shapes["down_blocks.0.downsamplers.0.conv.weight"] = (8, 8, 3, 3)
    shapes["up_blocks.0.upsamplers.0.conv.weight"] = (8, 8, 3, 3)
    return shapes


def _resnet(at: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.norm1.weight": (8,), f"{at}.norm1.bias": (8,), f"{at}.conv1.weight": (8, 8, 3, 3),
        f"{at}.time_emb_proj.weight": (8, 32), f"{at}.time_emb_proj.bias": (8,),
    }  # fmt: skip


def _transformer(at: str) -> dict[str, tuple[int, ...]]:
    inner = f"{at}.transformer_blocks.0"
    return {
        f"{at}.proj_in.weight": (8, 8, 1, 1), f"{inner}.attn1.to_q.weight": (8, 8),
        f"{inner}.attn1.to_out.0.weight": (8, 8), f"{inner}.attn1.to_out.0.bias": (8,),
        f"{inner}.ff.net.0.proj.weight": (64, 8), f"{inner}.ff.net.0.proj.bias": (64,),
        f"{inner}.ff.net.2.weight": (8, 32), f"{inner}.norm1.weight": (8,),
    }  # fmt: skip


def open_clip() -> dict[str, tuple[int, ...]]:
    """CLIP as OpenCLIP names it: packed in_proj_weight, projections as bare parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (12, 16), "text_projection": (16, 8), "logit_scale": (),
        "visual.class_embedding": (24,), "visual.positional_embedding": (5, 24),
        "visual.proj": (24, 8), "visual.conv1.weight": (24, 3, 4, 4),
        "visual.ln_pre.weight": (24,), "visual.ln_post.weight": (24,),
        "token_embedding.weight": (VOCAB, 16), "ln_final.weight": (16,), "ln_final.bias": (16,),
    }  # fmt: skip
    for tower, width, depth in (("visual.", 24, 3), ("", 16, 2)):
        for block in range(depth):
            at = f"{tower}transformer.resblocks.{block}"
            shapes |= {
                f"{at}.ln_1.weight": (width,), f"{at}.ln_1.bias": (width,),
                f"{at}.attn.in_proj_weight": (3 * width, width),
                f"{at}.attn.in_proj_bias": (3 * width,),
                f"{at}.attn.out_proj.weight": (width, width),
                f"{at}.attn.out_proj.bias": (width,),
                f"{at}.mlp.c_fc.weight": (4 * width, width), f"{at}.mlp.c_fc.bias": (4 * width,),
                f"{at}.mlp.c_proj.weight": (width, 4 * width), f"{at}.mlp.c_proj.bias": (width,),
            }  # fmt: skip
    return shapes


def torchvision_resnet() -> dict[str, tuple[int, ...]]:
    """A ResNet as torchvision names it: layer1 … layer4, two blocks each."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (8, 3, 7, 7), "bn1.weight": (8,), "bn1.bias": (8,),
        "bn1.running_mean": (8,), "bn1.num_batches_tracked": (), "fc.weight": (10, 8),
        "fc.bias": (10,),
    }  # fmt: skip
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            shapes |= {
                f"{at}.conv1.weight": (8, 8, 3, 3),
                f"{at}.bn1.weight": (8,),
                f"{at}.bn1.bias": (8,),
            }
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (8, 8, 1, 1)
            shapes[f"layer{stage}.0.downsample.1.weight"] = (8,)
    return shapes

"""The small text models that are trained here, with fresh weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusewright.bench.pools.texts import TextRecipe
from fusewright.extras import needs


def new_model(recipe: TextRecipe, seed: int, tokenizer: Any) -> Any:
    """A model of the recipe's ``architecture`` for a tokenizer's vocabulary, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[recipe.architecture](recipe, tokenizer)


def _bert(recipe: TextRecipe, tokenizer: Any) -> Any:
    """``transformers.BertModel`` (Devlin et al. 2019, arXiv:1810.04805) without a pooler: heads
    see mean hidden states."""
    transformers, width = needs("transformers", "demo"), recipe.width
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=recipe.layers,
        num_attention_heads=_heads(recipe), intermediate_size=4 * width,
        max_position_embeddings=recipe.length, hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=0.0, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def _gpt2(recipe: TextRecipe, tokenizer: Any) -> Any:
    """``transformers.GPT2Model`` (Radford et al. 2019, "Language Models are Unsupervised
    Multitask Learners")."""
    transformers = needs("transformers", "demo")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=recipe.width, n_layer=recipe.layers,
        n_head=_heads(recipe), n_positions=recipe.length, embd_pdrop=recipe.dropout,
        resid_pdrop=recipe.dropout, attn_pdrop=0.0, initializer_range=0.05, use_cache=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def _t5(recipe: TextRecipe, tokenizer: Any) -> Any:
    """``transformers.T5ForConditionalGeneration`` (Raffel et al. 2020, arXiv:1910.10683):
    ``layers`` blocks in the encoder, and as many in the decoder."""
    transformers, width = needs("transformers", "demo"), recipe.width
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // _heads(recipe), d_ff=4 * width,
        num_layers=recipe.layers, num_heads=_heads(recipe), dropout_rate=recipe.dropout,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _heads(recipe: TextRecipe) -> int:
    return max(1, recipe.width // 32)


ARCHITECTURES: dict[str, Callable[[TextRecipe, Any], Any]] = {
    "bert": _bert, "gpt2": _gpt2, "t5": _t5,
}  # fmt: skip
"""Each called with a recipe and the tokenizer."""

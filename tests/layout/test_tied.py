"""Which tensors are one in the model: as the config says, and as the model class does."""

from __future__ import annotations

import pytest
import tiny_models as tiny
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright.layout import describe, ties_embeddings

TIED = {
    "llama": set(),
    "qwen3": {("model.embed_tokens.weight", "lm_head.weight")},
    "gpt2": {("transformer.wte.weight", "lm_head.weight")},
    "bert": {("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
             ("cls.predictions.bias", "cls.predictions.decoder.bias")},
    "bert_classifier": set(),
    "roberta": {("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
                ("lm_head.bias", "lm_head.decoder.bias")},
    "t5": {("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight",
            "lm_head.weight")},
    "bart": {("model.shared.weight", "model.decoder.embed_tokens.weight",
              "model.encoder.embed_tokens.weight", "lm_head.weight")},
    "whisper": {("model.decoder.embed_tokens.weight", "proj_out.weight")},
    "clip": set(),
    "resnet": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_tied_groups_the_stored_one_first(name: str) -> None:
    assert set(tiny.family(name).layout.tied) == TIED[name]


@pytest.mark.parametrize("tie", [True, False])
def test_groups_are_those_that_share_storage_in_the_model(tie: bool) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=9, tie_word_embeddings=tie)  # fmt: skip
    state = LlamaForCausalLM(config).state_dict()
    layout = describe({n: tuple(t.shape) for n, t in state.items()}, {}, config.to_dict())
    storages: dict[int, list[str]] = {}
    for name, tensor in state.items():
        storages.setdefault(tensor.data_ptr(), []).append(name)
    assert {frozenset(g) for g in layout.tied} == {
        frozenset(names) for names in storages.values() if len(names) > 1
    }


def test_an_untied_head_leaves_the_shared_embedding_tied() -> None:
    family = tiny.family("t5")
    layout = describe(family.shapes, family.kinds, {**family.config, "tie_word_embeddings": False})
    assert layout.tied == (
        ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    )


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama", "tie_word_embeddings": False}, False),
        ({"model_type": "x", "text_config": {"tie_word_embeddings": False}}, False),
        ({"model_type": "x", "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_what_the_config_says_of_ties(config: dict[str, object], tied: bool) -> None:
    assert ties_embeddings(config) is tied


def test_a_head_of_another_shape_is_not_tied() -> None:
    shapes = {"wte.weight": (50, 8), "lm_head.weight": (50, 16)}
    assert describe(shapes, {}, {"model_type": "x", "vocab_size": 50}).tied == ()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_head_is_tied_to_the_embedding_beside_it(side: str) -> None:
    shapes = {f"{s}.embed_tokens.weight": (50, 8) for s in ("encoder", "decoder")}
    shapes[f"{side}.lm_head.weight"] = (50, 8)
    assert describe(shapes, {}, {"tie_word_embeddings": True}).tied == (
        (f"{side}.embed_tokens.weight", f"{side}.lm_head.weight"),
    )


def test_an_absent_tied_head_is_noted() -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50}
    layout = describe({"transformer.wte.weight": (50, 8)}, {}, config)
    assert any("transformer.wte.weight serves as one" in note for note in layout.notes)

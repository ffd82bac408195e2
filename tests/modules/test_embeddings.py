"""A change of tokens' embeddings is the model called with those embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusewright.modules.embeddings import embedded, embedding_size, input_embeddings

hf = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 50}  # fmt: skip
IDS = torch.arange(24).reshape(3, 8)
DELTA = torch.linspace(-1, 1, 16).expand(3, 1, 16) * torch.tensor([1.0, 0.5, 2.0]).view(3, 1, 1)


def made(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if family == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**TINY)).eval(), {}
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50,
                                                bos_token_id=1, eos_token_id=1)).eval(), {}
    model = hf.T5ForConditionalGeneration(hf.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)).eval()
    if family == "one table":  # as releases before 5 have it
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return model, {"decoder_input_ids": IDS[:, :2]}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "one table"])
def test_it_is_the_model_called_with_other_embeddings(family: str) -> None:
    model, beside = made(family)
    table = input_embeddings(model)
    assert table is not None and table.weight.shape == (50, 16)
    with torch.no_grad():
        clean = model(input_ids=IDS, **beside).logits
        wanted = model(inputs_embeds=table(IDS) + DELTA, **beside).logits
        with embedded(model, lambda vectors: vectors + DELTA):
            found = model(input_ids=IDS, **beside).logits
        assert model(input_ids=IDS, **beside).logits.equal(clean), "a hook is left behind"
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, clean, atol=1e-4)


def test_models_without_tokens_have_none() -> None:
    sizes = {**TINY, "image_size": 8, "patch_size": 4}
    del sizes["vocab_size"]
    resnet = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    for model in (hf.ViTForImageClassification(hf.ViTConfig(**sizes)), nn.Linear(2, 2),
                  hf.ResNetForImageClassification(resnet)):  # fmt: skip
        assert input_embeddings(model) is None


def test_the_size_is_of_embeddings_as_the_model_gets_them() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(ids)

    table = Scaled(10, 4)
    assert embedding_size(table) == pytest.approx(3 * table.weight.square().mean().sqrt().item())

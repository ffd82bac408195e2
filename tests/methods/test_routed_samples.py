"""No sample's answer depends on what else is in the batch, or on what was asked before."""

from __future__ import annotations

import copy

import pytest
import torch
from routed_toys import IDS, PIXELS, TEXT, TINY, base_of, experts_of, gpt2, hf, llama, loud
from torch import nn

import fusewright as fw
from fusewright.errors import PlanError
from fusewright.methods.routed import WEMoE

LEARNT = fw.Twin(epochs=1, batch=16)
ROUTED = WEMoE(steps=0)
ASKED = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False}


def longformer():
    return hf.LongformerForSequenceClassification(hf.LongformerConfig(
        **TEXT, num_labels=4, attention_window=4, max_position_embeddings=32))  # fmt: skip


def xlnet():
    return hf.XLNetForSequenceClassification(hf.XLNetConfig(
        d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=50, num_labels=4))  # fmt: skip


def opt():
    return hf.OPTForCausalLM(hf.OPTConfig(
        **TINY, ffn_dim=32, vocab_size=50, word_embed_proj_dim=16, max_position_embeddings=32,
        pad_token_id=1))  # fmt: skip


SIDES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
         "vocab_size": 50, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # fmt: skip


def led():
    return hf.LEDForConditionalGeneration(hf.LEDConfig(
        **SIDES, attention_window=4, max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32))  # fmt: skip


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SIDES, max_position_embeddings=32))


def whisper():
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        **{**SIDES, "decoder_start_token_id": 3}, num_mel_bins=8, max_source_positions=10,
        max_target_positions=20, suppress_tokens=None, begin_suppress_tokens=None))  # fmt: skip


def two_towers():
    text = {**TINY, "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 16,
            "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 0}  # fmt: skip
    vision = {**TINY, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def merged(make, method):
    base, draw, data = base_of(make), torch.Generator().manual_seed(0), {}
    for name in ("a", "b"):
        batch = {"input_ids": torch.randint(3, 48, (4, 8), generator=draw)}
        if make in (led, bart, whisper):
            batch["decoder_input_ids"] = batch["input_ids"][:, :3]
        if make is whisper:
            batch["input_features"] = torch.randn(4, 8, 20, generator=draw)
            del batch["input_ids"]
        if make is two_towers:
            batch["pixel_values"] = torch.randn(4, 3, 8, 8, generator=draw)
        data[name] = [batch, batch]
    heads = dict.fromkeys("ab", lambda model, batch: model(**batch)[0])
    return fw.merge(method, base=base, experts=experts_of(base), data=data, heads=heads)


def alike(model: nn.Module, ids: torch.Tensor, **more) -> None:
    """A batch is answered as its samples are."""
    with torch.no_grad():
        whole = model(input_ids=ids, **more)[0]
        for row in range(len(ids)):
            one = {name: value[row : row + 1] for name, value in more.items()}
            torch.testing.assert_close(whole[row], model(input_ids=ids[row : row + 1], **one)[0][0],
                                       rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("make", "layer"), [
    (longformer, "encoder.layer.0.attention.self.query"), (xlnet, "transformer.word_embedding"),
    (led, "longformer_self_attn.query"),
], ids=["longformer", "xlnet", "led"])  # fmt: skip
def test_tokens_first_are_refused_when_twin_is_built(make, layer) -> None:
    with pytest.raises(PlanError, match=rf"other samples[\s\S]*{layer}"):
        merged(make, LEARNT)


@pytest.mark.parametrize("mask", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("shape", [(3, 8), (1, 8)], ids=["some", "one"])
def test_a_module_whose_tokens_come_first_is_refused(shape, mask) -> None:
    made = merged(xlnet, ROUTED)
    model, ids = loud(made.module()), IDS.flatten()[: shape[0] * shape[1]].reshape(shape)
    more = {"attention_mask": torch.ones_like(ids)} if mask else {}
    for _ in range(2):
        with pytest.raises(PlanError, match=r"other samples[\s\S]*transformer.layer.0.ff"):
            model(input_ids=ids, **more)
    with torch.no_grad():
        assert merged(xlnet, WEMoE(steps=0, router=0)).module()(ids, **more)[0].isfinite().all()


@pytest.mark.parametrize("make", [longformer, opt])
def test_as_many_samples_as_tokens_are_kept_apart(make) -> None:
    alike(loud(merged(make, ROUTED).module()), IDS.flatten()[:16].reshape(4, 4))


@pytest.mark.parametrize("method", [LEARNT, ROUTED], ids=["twin", "wemoe"])
@pytest.mark.parametrize("make", [opt, bart], ids=["opt", "bart"])
def test_others_go_on_beams_too(make, method) -> None:
    model = loud(merged(make, method).module())
    ids = IDS + 3
    more = {"decoder_input_ids": ids[:, :3]} if make is bart else {}
    alike(model, ids, **more)
    alike(copy.deepcopy(model), ids, **more)
    whole = model.generate(input_ids=ids, **ASKED)
    for row in range(3):
        alone = model.generate(input_ids=ids[row : row + 1], **ASKED)
        assert whole[row : row + 1, : alone.shape[1]].equal(alone)


def test_an_encoder_of_other_things_has_beams_too() -> None:
    model = loud(merged(whisper, LEARNT).module())
    heard = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(2))
    whole = model.generate(input_features=heard, **ASKED)
    for row in range(3):  # of other numbers of samples than came before
        alone = model.generate(input_features=heard[row : row + 1], **ASKED)
        assert whole[row : row + 1, : alone.shape[1]].equal(alone)
    with torch.no_grad():
        two = [model(input_features=heard[:n], decoder_input_ids=IDS[:n, :4])[0] for n in (3, 2)]
    torch.testing.assert_close(two[0][:2], two[1], rtol=1e-4, atol=1e-5)


def test_one_w_for_two_towers_is_refused() -> None:
    with pytest.raises(PlanError, match=r"in several places[\s\S]*vision_model"):
        merged(two_towers, LEARNT)
    with torch.no_grad():
        still = merged(two_towers, fw.Twin(epochs=0)).module()
        assert still.get_image_features(PIXELS).pooler_output.isfinite().all()
        model, found = loud(merged(two_towers, ROUTED).module()), []
        for words in (IDS, IDS + 9):
            model.get_text_features(words)
            found.append(model.get_image_features(PIXELS).pooler_output)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("method", [LEARNT, ROUTED], ids=["twin", "wemoe"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_cache_goes_on_with_the_w_of_its_own_prompt_or_not_at_all(make, method) -> None:
    model = loud(merged(make, method).module())
    with torch.no_grad():
        one, two = (model(input_ids=ids, use_cache=True).past_key_values for ids in (IDS, IDS + 9))
        with pytest.raises(PlanError, match=r"not the last[\s\S]*of another"):
            model(input_ids=IDS[:, :1], past_key_values=one)
        copied = copy.deepcopy(two)
        found = [model(input_ids=IDS[:, :1], past_key_values=cache)[0] for cache in (two, copied)]
        model(input_ids=IDS[:, :1], past_key_values=two)  # what was filled further, too
        assert found[0].equal(found[1])
        with pytest.raises(PlanError, match=r"not the last[\s\S]*of another"):
            model(input_ids=IDS[:, :1], past_key_values=one)
        model(input_ids=IDS, use_cache=True)
    still = merged(make, WEMoE(steps=0, router=0)).module()
    with torch.no_grad():
        one, _ = (still(input_ids=ids, use_cache=True).past_key_values for ids in (IDS, IDS + 9))
        assert still(input_ids=IDS[:, :1], past_key_values=one)[0].isfinite().all()


class Towers(nn.Module):
    """Of which nobody knows what reads what."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.looks = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, words: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
        return self.words(words) * self.looks(looks)


def test_a_w_ends_with_the_call_that_it_was_routed_for() -> None:
    base, draw = Towers(), torch.Generator().manual_seed(0)
    data = {name: [torch.randn(6, 8, generator=draw)] for name in ("a", "b")}
    heads = dict.fromkeys("ab", lambda model, batch: model(batch, batch))
    model = fw.merge(LEARNT, base=base, experts=experts_of(base), data=data, heads=heads).module()
    with torch.no_grad():
        model(torch.ones(2, 8), torch.ones(2, 8))
        with pytest.raises(PlanError, match=r"outside of the model's call[\s\S]*looks"):
            model.looks(torch.ones(2, 8))

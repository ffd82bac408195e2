"""Batches of one's own: language models answer with next tokens; padding and -100 say nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from routed_toys import TEXT, base_of, bert, experts_of, gpt2, hf, llama, t5
from torch import nn
from torch.nn.functional import cross_entropy

import fusewright as fw
from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.learned.objectives import OBJECTIVES
from fusewright.tasks.adaptation import Question, adaptation
from fusewright.tasks.errors import DataError
from fusewright.tasks.language_modelling import LanguageModelling

CODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
         "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1,
         "decoder_start_token_id": 49}  # fmt: skip
IDS = torch.randint(2, 48, (4, 8), generator=torch.Generator().manual_seed(0))
RIGHT = (torch.arange(8) < torch.tensor([[8], [5], [3], [2]])).long()


def masked_bert():
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT))


def tagging_bert():
    return hf.BertForTokenClassification(hf.BertConfig(**TEXT, num_labels=4))


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**CODER))


def decoder_of_bart():
    return hf.BartForCausalLM(hf.BartConfig(**CODER))


def texts(mask: torch.Tensor = RIGHT, prompt: int = 0) -> dict[str, torch.Tensor]:
    """As a collator makes them: labels are the tokens, -100 for padding and of a prompt."""
    labels = IDS.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": IDS * mask, "attention_mask": mask, "labels": labels}


def question_of(*batches: Any, heads: Any = None) -> Question:
    return adaptation({"a": list(batches)}, heads).questions["a"]


def loss(model: nn.Module, batch: Any) -> float:
    asked = question_of(batch)
    with torch.no_grad():
        asked.check_labels(model, batch)
        return float(cross_entropy(asked.logits(model, batch), asked.labels(model, batch)))


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [0, 1], ids=["whole", "after a prompt"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_causal_models_loss_is_its_own(make, padded: bool, prompt: int) -> None:
    model, batch = base_of(make), texts(RIGHT if padded else torch.ones_like(RIGHT), prompt)
    if prompt:
        batch["labels"][0, :5] = -100
    assert loss(model, batch) == pytest.approx(own_loss(model, batch), rel=1e-5)
    with torch.no_grad():
        logits = model(**batch).logits
    same = float(cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
    assert abs(same - own_loss(model, batch)) > 1e-3  # of the same places it is another


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_padding_on_the_left_predicts_is_left_out(make) -> None:
    model, batch = base_of(make), texts(RIGHT.flip(1))
    batch["labels"] = batch["input_ids"]  # of padding, too
    kept = torch.full_like(IDS, -100)
    kept[:, 1:] = torch.where(RIGHT.flip(1)[:, :-1] == 1, IDS[:, 1:], -100)
    assert loss(model, batch) == pytest.approx(own_loss(model, {**batch, "labels": kept}), rel=1e-5)


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_decoder_answers_its_labels_where_they_are(make) -> None:
    model, batch = base_of(make), texts()
    batch["labels"] = IDS[:, 2:7].masked_fill(RIGHT[:, 2:7] == 0, -100)
    batch["labels"][3, 0] = 7
    assert loss(model, batch) == pytest.approx(own_loss(model, batch), rel=1e-5)
    given = {**batch, "decoder_input_ids": IDS[:, :5]}
    assert loss(model, given) == pytest.approx(own_loss(model, given), rel=1e-5)
    assert len(question_of(given).logits(model, given)) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("make", [masked_bert, tagging_bert])
def test_answers_of_the_same_place_are_not_moved(make) -> None:
    model, batch = base_of(make), texts(prompt=1)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, (batch["labels"] + 1) % 4)
    assert loss(model, batch) == pytest.approx(own_loss(model, batch), rel=1e-5)


def test_classes_of_whole_texts_are_as_they_were() -> None:
    model, labels = base_of(bert), torch.tensor([0, 1, -100, 3])
    batch = {**texts(), "labels": labels}
    assert question_of(batch).labels(model, batch).equal(labels)
    assert question_of(batch).logits(model, batch).shape == (4, 4)


def test_several_classes_of_whole_texts_are_no_tokens() -> None:
    model = base_of(lambda: hf.BartForSequenceClassification(hf.BartConfig(**CODER, num_labels=3)))
    batch = {"input_ids": IDS.clone(), "labels": torch.ones(4, 3)}
    batch["input_ids"][:, -1] = 49
    assert question_of(batch).logits(model, batch).shape == (4, 3)


def test_a_head_of_ones_own_says_what_its_labels_are_of() -> None:
    model, batch = base_of(gpt2), texts()
    asked = question_of(batch, heads={"a": lambda m, b: m(input_ids=b["input_ids"]).logits})
    assert asked.labels(model, batch).equal(batch["labels"])
    assert asked.logits(model, batch).shape == (4, 8, 50)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_it_is_what_language_modelling_asks(make) -> None:
    model, batch = base_of(make), texts()
    task, asked = LanguageModelling("a", tokenizer=None), question_of(batch)
    with torch.no_grad():
        torch.testing.assert_close(asked.logits(model, batch), task.answered(model, batch))
    assert asked.labels(model, batch).equal(task.targets(batch))
    if make is llama:  # arguments have the names that the model gives them
        both = batch["input_ids"], batch["attention_mask"]
        assert asked.logits(model, both).equal(asked.logits(model, batch))


# -- what cannot be told -------------------------------------------------------------------------


def merged(objective: str, base: nn.Module, *batches: Any, **params: Any):
    how = {"steps": 1, "guard": 0, "start": 0.0, "batch": 4, **params}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusewrightWarning)
        return fw.merge(fw.AdaMerging(objective=objective, **how), base=base,
                        experts=experts_of(base), data={"a": [*batches], "b": [*batches]})


def test_a_model_whose_own_loss_does_not_move_labels_is_refused() -> None:
    base = base_of(decoder_of_bart)
    with pytest.raises(PlanError, match=r"same places[\s\S]*task a[\s\S]*tasks.LanguageModelling"):
        merged("cross_entropy", base, texts())
    merged("entropy", base, texts())


@pytest.mark.parametrize("changed", [
    {"attention_mask": torch.ones(4, 9, dtype=torch.long)},
    {"labels": torch.tensor([0, 1, 2, 3])}, {"labels": IDS[:, :7]},
])  # fmt: skip
def test_other_places_are_refused(changed: dict[str, torch.Tensor]) -> None:
    model, batch = base_of(gpt2), {**texts(), **changed}
    with pytest.raises(PlanError, match=r"predicts where[\s\S]*task a[\s\S]*LanguageModelling"):
        question_of(batch).labels(model, batch)


class Plain(nn.Module):
    """A language model that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hf.GPT2LMHeadModel(hf.GPT2Config(**{
            "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}))  # fmt: skip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask).logits


def test_labels_that_repeat_what_an_unknown_model_is_shown_are_refused() -> None:
    with pytest.raises(PlanError, match=r"labels repeat[\s\S]*task a[\s\S]*LanguageModelling"):
        merged("cross_entropy", base_of(Plain), texts())
    merged("cross_entropy", base_of(Plain), {**texts(), "labels": texts()["labels"].roll(1)})


def test_a_batch_whose_labels_are_all_ignored_asks_for_nothing() -> None:
    with pytest.raises(DataError, match=r"asks for no answer[\s\S]*-100"):
        merged("cross_entropy", base_of(gpt2), texts(prompt=8))


# -- fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, masked_bert])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_looks_at_padding(objective: str, make) -> None:
    """What is padded, and what is there instead, changes no loss and no agreement."""
    base, found = base_of(make), []
    batch = {k: v.clone() for k, v in texts().items()}
    if make is masked_bert:
        batch["labels"][:, ::2] = -100
        batch["labels"] = torch.where(batch["labels"] == -100, -100, 5)
    if objective != "cross_entropy":
        del batch["labels"]
    longer = {k: torch.nn.functional.pad(v, (0, 6), value=-100 if k == "labels" else 0)
              for k, v in batch.items()}  # fmt: skip
    for each in (batch, longer):
        report = merged(objective, base, each, guard=4, start=0.3).report["fitted"]
        found.append([*report["losses"], *(v for of in report["guard"].values()
                                           for v in of.values())])  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_entropy_is_that_of_predicted_tokens() -> None:
    base, batch = base_of(gpt2), texts()
    with torch.no_grad():
        logs = base(**batch).logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)[:, :-1][RIGHT[:, 1:] == 1].mean()
    del batch["labels"]
    losses = merged("entropy", base, batch).report["fitted"]["tasks"]
    assert losses["a"] == pytest.approx([float(entropy)], rel=1e-5)


def test_who_says_the_next_token_is_preferred_to_who_repeats_the_last() -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 1, "vocab_size": 50}
    base = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            if "c_proj" in name or "wpe" in name or "lm_head" in name:
                tensor.zero_()
        base.transformer.wte.weight.copy_(3 * torch.eye(50, 64))
    experts = {"next": copy.deepcopy(base), "same": copy.deepcopy(base)}
    with torch.no_grad():
        experts["same"].lm_head.weight.copy_(torch.eye(50, 64))
        experts["next"].lm_head.weight.copy_(torch.eye(50, 64).roll(1, 0))
    ids = torch.arange(0, 24, 3)[:, None] + torch.arange(8)
    found = fw.merge(fw.FWMerging(start=0.0, steps=2, size=0.5), base=base, experts=experts,
                     data={n: [{"input_ids": ids, "labels": ids}] for n in experts})  # fmt: skip
    assert all(each["next"] and not each["same"] for each in found.report["fitted"]["chosen"])

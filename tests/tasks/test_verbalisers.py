"""Words that classes are answered with, on models of every kind, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from routed_toys import base_of, bert, experts_of, gpt2, hf, llama, loud, t5

import fusewright as fw
from fusewright.tasks import DataError, Rows, VerbaliserClassification, evaluate, verbalisers
from fusewright.tasks.adaptation import Adaptation, Question

CLASSES = ("good", "so so bad", "maybe no")
TEXTS = ["the cat sat on the mat", "a dog", "run and saw the dog", "so"]
LABELS = [0, 1, 2, 1]
KINDS = pytest.mark.parametrize("make", [gpt2, llama, t5], ids=lambda make: make.__name__)
SPLIT = Rows({"text": TEXTS, "label": LABELS}, CLASSES)


def toy(words, **options) -> VerbaliserClassification:
    given = {"tokenizer": words, "template": "{text} is"} | options
    return VerbaliserClassification("toy", CLASSES, **given)


def lively(make):
    """A model whose answers depend plainly on what it reads."""
    model = base_of(make)
    with torch.no_grad():
        for parameter in model.parameters() if make is not t5 else ():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def asked(task: VerbaliserClassification, size: int = 4):
    return next(task.batches(SPLIT, size))


def label_of(words, label: str, end: bool = True) -> list[int]:
    return [*words(label)["input_ids"], *([1] if end else [])]


def alone(model, words, text: str, label: list[int]) -> torch.Tensor:
    """log p of each token of a label after a prompt, read off one pass without any padding."""
    prompt = words(f"{text} is")["input_ids"]
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([prompt]),
                       decoder_input_ids=torch.tensor([[0, *label[:-1]]])).logits[0]  # fmt: skip
    else:
        logits = model(input_ids=torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.tensor(label)[:, None])[:, 0]


def by_hand(model, words, score: str = "sum", end: bool = True) -> torch.Tensor:
    each = [[alone(model, words, text, label_of(words, label, end)) for label in CLASSES]
            for text in TEXTS]  # fmt: skip
    return torch.stack([torch.stack([getattr(logs, score)() for logs in row]) for row in each])


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"score": "mean"}, {"end": False}], ids=str)
def test_it_is_a_plain_loop_over_labels(tokenizer, make, side, options) -> None:
    model, words = lively(make).double(), tokenizer(side)
    with torch.no_grad():
        found = toy(words, **options).logits(model, asked(toy(words)))
        expected = by_hand(model, words, **options)
    assert found.dtype == torch.float64 and expected.std(dim=0).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@KINDS
def test_gradients_are_those_of_the_loop(tokenizer, make) -> None:
    words, weights, found = tokenizer(), torch.arange(12.0).reshape(4, 3), []
    for ours in (True, False):
        model = lively(make).double()
        logits = toy(words).logits(model, asked(toy(words))) if ours else by_hand(model, words)
        (logits * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(found[1]) > 10
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)  # RMS norms are in float32


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_on_the_true_labels_tokens(tokenizer, make, side) -> None:
    model, words = lively(make).double(), tokenizer(side)
    with torch.no_grad():
        logs = [alone(model, words, text, label_of(words, CLASSES[label]))
                for text, label in zip(TEXTS, LABELS, strict=True)]  # fmt: skip
        found = toy(words).loss(model, asked(toy(words)))
    assert found.item() == pytest.approx(-torch.cat(logs).mean().item(), rel=1e-6)


@KINDS
def test_a_text_is_answered_alike_in_any_batch(tokenizer, make, monkeypatch) -> None:
    model, task = lively(make), toy(tokenizer())
    whole = evaluate(model, task, SPLIT)
    single = evaluate(model, task, SPLIT, batch_size=1)
    monkeypatch.setattr(verbalisers, "ROWS", 1)
    by_label = evaluate(model, task, SPLIT)
    for other in (single, by_label):
        np.testing.assert_allclose(whole.columns["loss"], other.columns["loss"], rtol=1e-4)
        assert (whole.columns["prediction"] == other.columns["prediction"]).all()


def test_a_model_that_cannot_be_asked_is_refused(tokenizer) -> None:
    task = toy(tokenizer())
    with pytest.raises(DataError, match=r"no key-value cache[\s\S]*BertForSeq[\s\S]*CausalLM"):
        evaluate(base_of(bert), task, SPLIT)
    headless = hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(DataError, match=r"no logits[\s\S]*GPT2Model[\s\S]*CausalLM"):
        evaluate(headless, task, SPLIT)


def test_labels_that_are_the_same_tokens_are_refused(tokenizer) -> None:
    unknown = toy(tokenizer(), verbalisers=("good", "splendid", "superb"))
    with pytest.raises(DataError, match=r"tokens of its own[\s\S]*toy[\s\S]*'superb': \[2, 1\]"):
        evaluate(base_of(gpt2), unknown, SPLIT)
    empty = toy(tokenizer(), verbalisers=("good", "bad", ""), end=False)
    with pytest.raises(DataError, match=r"tokens of its own[\s\S]*'': \[\]"):
        evaluate(base_of(gpt2), empty, SPLIT)


# -- merges --------------------------------------------------------------------------------------


FIT = {"steps": 2, "batch": 4, "every": 1, "guard": 4}
LEARNT = [
    fw.AdaMerging(**FIT), fw.Concrete(**FIT), fw.AdaRank(**FIT), fw.WEMoE(router=1, **FIT),
    fw.EWEMoE(router=1, **FIT), fw.RankOneMoE(rank=4, **FIT), fw.Twin(epochs=2, mask_rate=0.5),
    fw.Smile(rank=2, gate=1),
]  # fmt: skip


def learnt_from(task: VerbaliserClassification) -> Adaptation:
    def epoch(size, seed):
        return [{k: v for k, v in batch.items() if k != "labels"}
                for batch in task.batches(SPLIT, size, seed=seed)]  # fmt: skip

    return Adaptation({name: Question(name, task.answered, epoch) for name in ("a", "b")})


def made(method, make, task):
    base = lively(make)
    return fw.merge(method, base=base, experts=experts_of(base), data=learnt_from(task))


@pytest.mark.parametrize("method", LEARNT, ids=lambda method: method.name)
@pytest.mark.parametrize("make", [gpt2, t5], ids=["gpt2", "t5"])
@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
def test_methods_learn_and_are_evaluated_by_words(tokenizer, make, method) -> None:
    task = toy(tokenizer())
    found = made(method, make, task)
    if method.name != "smile":
        losses = found.report["fitted"]["losses"]
        assert np.isfinite(losses).all() and len(losses) >= 2
    seen = evaluate(found.module(), task, SPLIT)
    assert np.isfinite(seen.columns["loss"]).all()


@pytest.mark.parametrize("name", ["wemoe", "twin"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_a_routed_model_is_routed_by_the_prompt_alone(tokenizer, make, name) -> None:
    words = tokenizer("left")
    task = toy(words)
    method = fw.WEMoE(steps=0, router=1) if name == "wemoe" else fw.Twin(epochs=2, mask_rate=0.5)
    merged = made(method, make, task)
    model = merged.module()
    if name == "wemoe":
        loud(model)
    else:
        with torch.no_grad():
            last = model.get_submodule("routing").mixture.router.layers[-1]
            last.weight.copy_(torch.randn(last.weight.shape, generator=torch.Generator()) * 3)
    with torch.no_grad():
        found = task.logits(model, asked(task))
        for row, text in zip(found, TEXTS, strict=True):
            prompt = words(f"{text} is", return_tensors="pt")["input_ids"]
            plain = base_of(make)
            plain.load_state_dict(merged.unload({"input_ids": prompt}).state_dict())
            for seen, label in zip(row, CLASSES, strict=True):
                expected = alone(plain, words, text, label_of(words, label)).sum()
                torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
        assert task.loss(model, asked(task)).isfinite()  # in one pass: the label is read, too


@torch.no_grad()
def test_the_routers_of_a_decoder_that_reads_an_encoder_do_not_see_the_label(tokenizer) -> None:
    task = toy(tokenizer())
    model = loud(made(fw.WEMoE(steps=0, router=1), t5, task).module())
    found = task.logits(model, asked(task))
    other = toy(tokenizer(), verbalisers=(CLASSES[0], "cat", "dog on the mat"))
    torch.testing.assert_close(other.logits(model, asked(other))[:, 0], found[:, 0],
                               rtol=1e-5, atol=1e-5)  # fmt: skip

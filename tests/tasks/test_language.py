"""Perplexity and generated text, against plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusewright.errors import RecipeError
from fusewright.tasks import DataError, Generation, LanguageModelling, Rows, evaluate

t = pytest.importorskip("transformers")

LINES = ["the cat sat on the mat\n", "and saw a dog\n", "so good\n", "the dog run\n"]


def gpt2():
    config = t.GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=64, vocab_size=30,
                          bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = t.GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wte.weight, std=1.0)
    return model.eval()


def stream(words) -> list[int]:
    return words("".join(LINES))["input_ids"]


@pytest.mark.parametrize("length", [4, 5, 7, 100])
@torch.no_grad()
def test_every_token_but_the_first_is_predicted_once(tokenizer, length) -> None:
    words, model = tokenizer(), gpt2()
    task = LanguageModelling("toy", tokenizer=words, length=length)
    seen = evaluate(model, task, Rows({"text": LINES}), batch_size=2)
    ids, total = stream(words), 0.0
    for at in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[at : at + length + 1]])
        logits = model(window[:, :-1]).logits[0]
        total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert seen.weight.sum() == seen.columns["tokens"].sum() == len(ids) - 1
    assert seen.metric == "log_likelihood"
    assert seen.value == pytest.approx(-total / (len(ids) - 1), rel=1e-5)
    assert seen.shown == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)


def test_the_loss_of_a_batch_is_its_mean_over_tokens(tokenizer) -> None:
    task, model = LanguageModelling("toy", tokenizer=tokenizer(), length=4), gpt2()
    split = Rows({"text": LINES})
    loss = task.loss(model, next(task.batches(split, 100)))
    loss.backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    assert loss.item() == pytest.approx(-evaluate(model, task, split).value, rel=1e-5)


@torch.no_grad()
def test_entropy_is_the_mean_of_the_predicted_distributions(tokenizer) -> None:
    words, model = tokenizer(), gpt2()
    found = evaluate(
        model, LanguageModelling("toy", tokenizer=words, length=7), Rows({"text": LINES})
    ).columns["entropy"]
    ids, exact = stream(words), model.double()
    windows = [ids[at : at + 7] for at in range(0, len(ids) - 1, 7)]
    windows[-1] = windows[-1][: len(ids) - 1 - 7 * (len(windows) - 1)]
    for window, entropy in zip(windows, found, strict=True):
        shares = exact(torch.tensor([window])).logits[0].softmax(1)
        assert entropy == pytest.approx(-(shares * shares.log()).sum(1).mean().item(), rel=1e-5)


def test_a_certain_model_has_no_entropy(tokenizer) -> None:
    words, first = tokenizer(), stream(tokenizer())[0]

    class Certain(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            logits = torch.full((*input_ids.shape, 30), -torch.inf)
            logits[..., first] = 0
            return logits

    task = LanguageModelling("toy", tokenizer=words, length=7)
    found = evaluate(Certain(), task, Rows({"text": LINES})).columns
    assert found["entropy"].tolist() == [0.0] * len(found["entropy"])


def test_windows_are_items_and_limits_count_them(tokenizer) -> None:
    task, split = LanguageModelling("toy", tokenizer=tokenizer(), length=4), Rows({"text": LINES})
    windows = task.ready(split)
    assert len(windows) == math.ceil((len(stream(tokenizer())) - 1) / 4)
    assert task.ready(windows) is windows
    heard: list[tuple[int, int]] = []
    seen = evaluate(gpt2(), task, windows, limit=3, batch_size=2,
                    progress=lambda *at: heard.append(at))  # fmt: skip
    assert len(seen) == 3 and heard == [(2, 3), (3, 3)]
    assert len(task.prepared(split, limit=2)) == 2


def test_documents_end_in_the_end_of_text_token(tokenizer) -> None:
    words = tokenizer()
    task = LanguageModelling("toy", tokenizer=words, length=100, documents=True)
    (window,) = task.ready(Rows({"text": ["the cat", "a dog"]})).examples
    assert words.decode(window) == "the cat </s> a dog </s>"


def test_a_text_too_short_to_predict_is_refused(tokenizer) -> None:
    task = LanguageModelling("toy", tokenizer=tokenizer())
    with pytest.raises(DataError, match="two tokens"):
        evaluate(gpt2(), task, Rows({"text": ["cat"]}))
    with pytest.raises(DataError, match="'text'"):
        evaluate(gpt2(), task, Rows({"words": ["cat"]}))


class Scripted(torch.nn.Module):
    """A model that writes what it is told, and records what it was asked."""

    def __init__(self, words, answers, encoder_decoder: bool = False) -> None:
        super().__init__()
        self.words, self.answers = words, answers
        self.config = t.PretrainedConfig(
            is_encoder_decoder=encoder_decoder, decoder_start_token_id=0
        )

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        assert options["do_sample"] is False
        asked = [self.words.decode(ids, skip_special_tokens=True) for ids in input_ids]
        written = [self.words(self.answers[a])["input_ids"][:max_new_tokens] for a in asked]
        longest = max(map(len, written))
        padded = torch.tensor([w + [0] * (longest - len(w)) for w in written])
        first = torch.zeros(len(padded), 1, dtype=torch.long)
        return torch.cat([first if self.config.is_encoder_decoder else input_ids, padded], dim=1)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_exact_match_of_what_was_written(tokenizer, encoder_decoder) -> None:
    words = tokenizer()
    model = Scripted(
        words, {"the cat": "sat on </s> no", "a dog": "run </s>", "so": "yes no yes no yes"},
        encoder_decoder,
    )  # fmt: skip
    split = Rows({"text": ["cat", "dog", "so"], "text2": ["sat  On", "sat", "yes no yes no"]})
    rows = split.columns | {"text": ["the cat", "a dog", "so"]}
    task = Generation("toy", tokenizer=words, max_new_tokens=4)
    seen = evaluate(model, task, Rows(rows), batch_size=2)
    assert seen.metric == "exact_match"
    assert seen.score.tolist() == [1.0, 0.0, 1.0]
    assert seen.columns["prediction"].tolist() == ["sat on", "run", "yes no yes no"]
    assert seen.columns["truncated"].tolist() == [0, 0, 1]
    assert seen.columns["unparsed"].tolist() == [0, 0, 0]


def test_references_may_be_classes_that_words_stand_for(tokenizer) -> None:
    words = tokenizer()
    model = Scripted(words, {"the cat": "yes </s>", "a dog": "yes </s>", "so": "no </s>"}, True)
    task = Generation("toy", tokenizer=words, reference="label", words=("no", "yes"))
    rows = {"text": ["the cat", "a dog", "so"], "label": [1, 0, 0]}
    seen = evaluate(model, task, Rows(rows))
    assert seen.score.tolist() == [1.0, 0.0, 1.0]
    assert seen.columns["reference"].tolist() == ["yes", "no", "no"]
    with pytest.raises(DataError, match=r"row 1") as refused:
        evaluate(model, task, Rows({"text": ["so", "so"], "label": [0, 2]}))
    assert "0 to 1" in str(refused.value) and "words: [...]" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 5 and then #### 1,234.", "1234"), ("#### 7 no #### -8", "-8"), ("seven", None),
     ("#### 0.50", "0.50")],
)  # fmt: skip
def test_answers_are_extracted_by_a_pattern(tokenizer, text, answer) -> None:
    task = Generation("toy", tokenizer=tokenizer(), extract=r"#### (-?[\d.,]+)")
    assert task.extracted(text, task.extract) == answer


def test_answers_are_extracted_by_the_group_that_matched(tokenizer) -> None:
    task = Generation("toy", tokenizer=tokenizer(), extract=r"(yes)|(no)|so( \d)?")
    found = [task.extracted(text, task.extract) for text in ("a yes", "a no", "so 5", "so")]
    assert found == ["yes", "no", "5", None]


def test_references_have_the_form_of_extracted_answers(tokenizer) -> None:
    words = tokenizer()
    for text, reference in (("1,234.", "1,234"), ("good yes", "yes."), ("12", "12")):
        split = Rows({"text": ["so"], "text2": [reference]})
        task = Generation("toy", tokenizer=words, extract=r"[\d.,]+|yes")
        ((_, _, wanted),) = task.encode(split.rows([0]), [0], "toy")
        assert task.extracted(text, task.extract) == wanted
    plain = Generation("toy", tokenizer=words)
    ((_, _, wanted),) = plain.encode({"text": ["so"], "text2": ["1,234."]}, [0], "toy")
    assert wanted == "1,234."  # what is not extracted stays as it is written


def test_what_has_no_answer_scores_zero_and_is_counted(tokenizer) -> None:
    words = tokenizer()
    model = Scripted(words, {"the cat": "good so yes </s>", "a dog": "maybe </s>"})
    split = Rows({"text": ["the cat", "a dog"], "text2": ["mat yes", "mat yes"]})
    task = Generation("toy", tokenizer=words, extract="yes|no", extract_reference="yes|no")
    seen = evaluate(model, task, split)
    assert seen.score.tolist() == [1.0, 0.0]
    assert seen.columns["unparsed"].tolist() == [0, 1]
    bad = Rows({"text": ["the cat"], "text2": ["mat"]}, name="answers")
    with pytest.raises(DataError, match=r"reference has no answer[\s\S]*answers, row 0"):
        evaluate(model, task, bad)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(tokenizer) -> None:
    pytest.importorskip("rouge_score")
    words = tokenizer()
    model = Scripted(words, {"so": "the cat on mat </s>", "a": "yes </s>"})
    split = Rows({"text": ["so", "a"], "text2": ["the cat sat on the mat", "no"]})
    seen = evaluate(model, Generation("toy", tokenizer=words, metric="rouge_l"), split)
    precision, recall = 4 / 4, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert seen.score.tolist() == pytest.approx([expected, 0.0])


@torch.no_grad()
def test_a_real_decoder_writes_as_it_does_alone(tokenizer) -> None:
    words, model = tokenizer("left"), gpt2()
    texts = ["the cat sat on", "dog", "a good"]
    task = Generation("toy", tokenizer=words, max_new_tokens=6)
    seen = evaluate(model, task, Rows({"text": texts, "text2": ["x", "x", "x"]}), batch_size=3)
    for text, found in zip(texts, seen.columns["prediction"], strict=True):
        ids = words(text, return_tensors="pt")["input_ids"]
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            pad_token_id=0, eos_token_id=1,
        )[0, ids.shape[1] :]  # fmt: skip
        assert found == words.decode(written, skip_special_tokens=True)


@torch.no_grad()
def test_the_loss_of_a_decoder_is_on_the_reference_alone(tokenizer) -> None:
    words, model = tokenizer(), gpt2()
    pairs = [("the cat", "sat on the mat"), ("dog", "run")]
    split = Rows({"text": [p for p, _ in pairs], "text2": [r for _, r in pairs]})
    task = Generation("toy", tokenizer=words)
    total, count = 0.0, 0
    for prompt, reference in pairs:
        before = words(prompt)["input_ids"]
        after = [*words(reference)["input_ids"], 1]
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(after), reduction="sum").item()
        count += len(after)
    found = task.loss(model, next(task.batches(split, 2))).item()
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_metric_or_pattern_that_is_not_understood(tokenizer) -> None:
    with pytest.raises(RecipeError, match="bleu"):
        Generation("toy", tokenizer=tokenizer(), metric="bleu")
    with pytest.raises(RecipeError, match="regular expression"):
        Generation("toy", tokenizer=tokenizer(), extract="(")


def test_scores_are_numbers_of_each_item(tokenizer) -> None:
    task = LanguageModelling("toy", tokenizer=tokenizer(), length=4)
    seen = evaluate(gpt2(), task, Rows({"text": LINES}))
    assert seen.score.dtype == np.float64 and (seen.score < 0).all()
    np.testing.assert_allclose(seen.columns["loss"], -seen.score)


# -- what methods that learn are shown -----------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("written", [False, True])
def test_the_loss_is_of_the_answers_that_are_asked_for(tokenizer, written: bool) -> None:
    words, model = tokenizer(), gpt2()
    task = (Generation("toy", tokenizer=words, max_new_tokens=4) if written
            else LanguageModelling("toy", tokenizer=words, length=9))  # fmt: skip
    rows = {"text": ["the cat", "dog"], "text2": ["sat on the mat", "run"]}
    batch = next(task.batches(Rows(rows if written else {"text": LINES}), 100))
    answers, targets = task.answered(model, batch), task.targets(batch)
    assert task.logits(model, batch)[..., 0].numel() > len(targets), "nothing was padded"
    assert answers.shape == (len(targets), 30)
    assert F.cross_entropy(answers, targets).item() == pytest.approx(task.loss(model, batch).item())


@torch.no_grad()
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_without_references_the_first_token_is_asked_for(tokenizer, encoder_decoder) -> None:
    model = t5() if encoder_decoder else gpt2()
    task = Generation("toy", tokenizer=tokenizer(), max_new_tokens=4)
    split = Rows({"text": ["the cat", "dog"], "text2": ["sat on the mat", "run"]})
    batch = next(task.batches(split, 2))
    shown = {name: batch[name] for name in ("input_ids", "attention_mask")}
    first = task.logits(model, batch)[:, 0]
    torch.testing.assert_close(task.answered(model, shown), first)


def t5():
    config = t.T5Config(d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, vocab_size=30,
                        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
    return t.T5ForConditionalGeneration(config).eval()

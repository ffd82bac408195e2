"""Texts: encoders, decoders on either side of padding, and label words of text-to-text models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusewright.tasks import (
    DataError,
    DecoderClassification,
    EncoderClassification,
    Generation,
    LanguageModelling,
    Rows,
    VerbaliserClassification,
    evaluate,
)

t = pytest.importorskip("transformers")

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 8, "vocab_size": 30, "max_position_embeddings": 24}  # fmt: skip
TEXTS = ["the cat sat on the mat", "a dog", "good", "the dog saw the cat and the mat so"]
CLASSES = ("no", "yes", "maybe so")


@pytest.fixture
def split() -> Rows:
    return Rows({"text": TEXTS, "label": [0, 1, 2, 1]}, CLASSES, "texts")


@pytest.fixture
def pairs() -> Rows:
    return Rows({"text": TEXTS, "text2": TEXTS[::-1], "label": [0, 1, 2, 1]}, CLASSES, "pairs")


def bert(kind=None):
    config = t.BertConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return (kind or t.BertModel)(config).eval()


def gpt2():
    return t.GPT2Model(t.GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=24, vocab_size=30))


def t5():
    config = t.T5Config(d_model=12, d_kv=6, d_ff=8, num_layers=2, num_heads=2, vocab_size=30,
                        dropout_rate=0, decoder_start_token_id=0, pad_token_id=0,
                        eos_token_id=1)  # fmt: skip
    model = t.T5ForConditionalGeneration(config)
    for parameter in model.parameters():  # fresh T5 weights answer nearly the same to everything
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def head(width: int = 12):
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", [None, t.BertForSequenceClassification])
@torch.no_grad()
def test_an_encoder_sees_each_text_as_if_it_were_alone(tokenizer, split, pooling, kind) -> None:
    model, words = bert(kind), tokenizer()
    task = EncoderClassification("toy", CLASSES, head=head(), tokenizer=words, pooling=pooling)
    logits = task.logits(model, next(task.batches(split, 4)))
    below = model.bert if kind else model
    for row, text in zip(logits, TEXTS, strict=True):
        hidden = below(**words(text, return_tensors="pt")).last_hidden_state[0]
        feature = hidden[0] if pooling == "first" else hidden.mean(dim=0)
        torch.testing.assert_close(row, head() @ feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("make", [gpt2, lambda: t.LlamaModel(t.LlamaConfig(**SMALL))])
@torch.no_grad()
def test_a_decoder_answers_the_same_whichever_side_is_padded(
    tokenizer, split, make, pooling
) -> None:
    model = make().eval()
    answers = []
    for side in ("left", "right"):
        words = tokenizer(side)
        task = DecoderClassification(
            "toy", CLASSES, head=head(), tokenizer=words, pooling=pooling
        )
        batch = next(task.batches(split, 4))
        assert (batch["attention_mask"][2, 0] == 0).item() == (side == "left")
        answers.append(task.logits(model, batch))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    for row, text in zip(answers[0], TEXTS, strict=True):
        hidden = model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
        feature = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        torch.testing.assert_close(row, head() @ feature, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_decoder_with_a_head_of_its_own_is_asked_below_it(tokenizer, split) -> None:
    config = t.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=30, num_labels=3,
                          pad_token_id=0)  # fmt: skip
    model = t.GPT2ForSequenceClassification(config).eval()
    words = tokenizer()
    task = DecoderClassification(
        "toy", CLASSES, head=model.score.weight.detach(), tokenizer=words
    )
    theirs = model(**words(TEXTS, padding=True, return_tensors="pt")).logits
    ours = task.logits(model, next(task.batches(split, 4)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_language_model_is_asked_below_its_head(tokenizer, split) -> None:
    config = t.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=30)
    model = t.GPT2LMHeadModel(config).eval()
    task = DecoderClassification("toy", CLASSES, head=head(), tokenizer=tokenizer())
    batch = next(task.batches(split, 4))
    below = task.logits(model.transformer, batch)
    assert torch.equal(task.logits(model, batch), below)


@pytest.mark.parametrize("text", [None, 3])
def test_a_row_without_a_text_is_named(tokenizer, text) -> None:
    words = tokenizer()
    rows = Rows({"text": ["a", "b", text], "label": [0, 1, 2]}, CLASSES, "texts")
    both = {"text": list("abc"), "text2": ["a", "b", text], "label": [0, 1, 2]}
    pairs = Rows(both, CLASSES, "texts")
    encoder = EncoderClassification("toy", CLASSES, head=head(), tokenizer=words)
    running = LanguageModelling("toy", tokenizer=words)
    for task, split in ((encoder, rows), (encoder, pairs), (running, rows)):
        with pytest.raises(DataError, match=r"text2?\b[\s\S]*texts, row 2"):
            list(task.batches(split, 2, seed=1))


def test_nothing_in_a_row_is_not_asked_as_a_word(tokenizer) -> None:
    rows = Rows({"text": ["a", None], "text2": [None, "b"], "label": [0, 1]}, CLASSES, "texts")
    words = tokenizer()
    asked = VerbaliserClassification("toy", CLASSES, tokenizer=words, template="the {text}")
    written = Generation("toy", tokenizer=words, template="the cat")
    for task, row in ((asked, 1), (replace(written, template="{text}"), 1),
                      (replace(written, template="the {label}"), 0)):  # fmt: skip
        with pytest.raises(DataError, match=rf"has no text[\s\S]*texts, row {row}"):
            list(task.batches(rows, 2))


def test_a_template_that_is_none_is_refused(tokenizer, split) -> None:
    task = VerbaliserClassification("toy", CLASSES, tokenizer=tokenizer(), template="the {text")
    with pytest.raises(DataError, match=r"template is not understood[\s\S]*the {text"):
        list(task.batches(split, 2))


def test_a_label_that_is_no_class_is_named_by_its_own_row(tokenizer) -> None:
    rows = Rows({"text": list("abc"), "label": [0, 1, "never"]}, CLASSES, "texts")
    task = EncoderClassification("toy", CLASSES, head=head(), tokenizer=tokenizer())
    with pytest.raises(DataError, match=r"texts, row 2[\s\S]*'never'"):
        list(task.batches(rows, 1))


def test_pairs_are_told_apart_by_their_types(pairs) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "cat": 4},
                                       unk_token="[UNK]"))  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    words = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    task = EncoderClassification("toy", CLASSES, head=head(), tokenizer=words)
    batch = next(task.batches(pairs, 2))
    assert batch["token_type_ids"][1].tolist()[:8] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert evaluate(bert(), task, pairs).columns["label"].tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("score", ["sum", "mean"])
@torch.no_grad()
def test_label_words_are_scored_as_each_alone(tokenizer, pairs, score) -> None:
    model, words = t5(), tokenizer()
    task = VerbaliserClassification(
        "toy", CLASSES, tokenizer=words, template="the {text} and {text2}", score=score
    )
    found = task.logits(model, next(task.batches(pairs, 4)))
    for i, (one, two) in enumerate(zip(TEXTS, TEXTS[::-1], strict=True)):
        prompt = words(f"the {one} and {two}", return_tensors="pt")["input_ids"]
        for c, label in enumerate(CLASSES):
            target = torch.tensor([[*words(label)["input_ids"], 1]])
            mean = -model(input_ids=prompt, labels=target).loss
            expected = mean * (target.shape[1] if score == "sum" else 1)
            torch.testing.assert_close(found[i, c], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_more_labels_than_pass_at_once(tokenizer, monkeypatch) -> None:
    from fusewright.tasks import verbalisers

    classes = tuple(f"{a} {b}" for a in ("cat", "dog", "mat") for b in ("yes", "no", "so", "a"))
    split = Rows({"text": TEXTS, "label": [0, 5, 11, 8]}, classes)
    task = VerbaliserClassification("toy", classes, tokenizer=tokenizer())
    model, batch = t5(), next(task.batches(split, 4))
    few = task.logits(model, batch)
    assert few.shape == (4, 12)
    monkeypatch.setattr(verbalisers, "ROWS", 1)
    torch.testing.assert_close(few, task.logits(model, batch), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_starts_with_the_models_own_token(tokenizer, split) -> None:
    model, words = t5(), tokenizer()
    task = VerbaliserClassification("toy", CLASSES, tokenizer=words)
    batch = next(task.batches(split, 4))
    zero = task.logits(model, batch)
    model.config.decoder_start_token_id = 5
    five = task.logits(model, batch)
    assert not torch.allclose(zero, five)
    given = VerbaliserClassification("toy", CLASSES, tokenizer=words, start=0)
    torch.testing.assert_close(given.logits(model, batch), zero)
    model.config.decoder_start_token_id = None
    with pytest.raises(DataError, match="start=TOKEN_ID"):
        task.logits(model, batch)


def test_the_loss_is_transformers_own_on_the_true_label(tokenizer, split) -> None:
    model, words = t5(), tokenizer()
    task = VerbaliserClassification("toy", CLASSES, tokenizer=words)
    targets = words([CLASSES[y] + " </s>" for y in split.columns["label"]], padding=True,
                    return_tensors="pt")["input_ids"]  # fmt: skip
    prompts = words(TEXTS, padding=True, return_tensors="pt")
    theirs = model(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"],
                   labels=targets.masked_fill(targets == 0, -100)).loss  # fmt: skip
    ours = task.loss(model, next(task.batches(split, 4)))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert model.shared.weight.grad.abs().sum() > 0


def test_evaluation_takes_prepared_rows_and_any_batch_size(tokenizer, split) -> None:
    for task, model in [
        (EncoderClassification("t", CLASSES, head=head(), tokenizer=tokenizer()), bert()),
        (DecoderClassification("t", CLASSES, head=head(), tokenizer=tokenizer()), gpt2()),
        (VerbaliserClassification("t", CLASSES, tokenizer=tokenizer()), t5()),
    ]:
        plain = evaluate(model, task, split)
        again = evaluate(model, task, task.prepared(split), batch_size=1)
        assert plain.columns["label"].tolist() == [0, 1, 2, 1]
        np.testing.assert_allclose(plain.columns["loss"], again.columns["loss"], rtol=1e-4)


def test_confidences_of_label_words_are_over_the_labels(tokenizer, split) -> None:
    task = VerbaliserClassification("toy", CLASSES, tokenizer=tokenizer())
    model = t5()
    seen = evaluate(model, task, split)
    with torch.no_grad():
        shares = task.logits(model, next(task.batches(split, 4))).softmax(dim=1)
    np.testing.assert_allclose(seen.columns["confidence"], shares.max(dim=1).values, rtol=1e-5)


def test_texts_are_cut_at_the_length(tokenizer, split) -> None:
    task = EncoderClassification("t", CLASSES, head=head(), tokenizer=tokenizer(), length=3)
    assert next(task.batches(split, 4))["input_ids"].shape == (4, 3)


def test_words_that_are_the_same_are_refused(tokenizer) -> None:
    with pytest.raises(DataError, match="word of its own"):
        VerbaliserClassification(
            "t", CLASSES, tokenizer=tokenizer(), verbalisers=("yes", "yes", "no")
        )


def test_a_text_without_tokens_is_named_by_its_row(tokenizer) -> None:
    split = Rows({"text": ["cat", ""], "label": [0, 1]}, CLASSES, "texts")
    task = DecoderClassification("t", CLASSES, head=head(), tokenizer=tokenizer())
    with pytest.raises(DataError, match="texts, row 1"):
        evaluate(gpt2(), task, split)


def test_a_template_with_an_unknown_column_is_refused(tokenizer, split) -> None:
    task = VerbaliserClassification("t", CLASSES, tokenizer=tokenizer(), template="{premise}")
    with pytest.raises(DataError, match=r"'premise'[\s\S]*text, label"):
        evaluate(t5(), task, split)


def test_targets_are_log_probabilities(tokenizer, split) -> None:
    task = VerbaliserClassification("toy", CLASSES, tokenizer=tokenizer())
    with torch.no_grad():
        logits = task.logits(t5(), next(task.batches(split, 4)))
    assert (logits < 0).all() and F.softmax(logits, dim=1).sum() == pytest.approx(4)

"""Windows whose beginning is given: run once, and gone on from by its key-value cache."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from routed_toys import experts_of, gpt2, llama, loud

import fusewright as fw
from fusewright.errors import FusewrightWarning
from fusewright.tasks import DataError, LanguageModelling, Rows, evaluate
from fusewright.tasks.adaptation import Adaptation, Question

LINES = ["the cat sat on the mat\n", "and saw a dog\n", "so good\n", "the dog run\n"]
PLAIN = pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
METHODS = {
    "wemoe": fw.WEMoE(steps=0, router=1), "e_wemoe": fw.EWEMoE(steps=0, router=1),
    "rank_one_moe": fw.RankOneMoE(steps=0, rank=4),
    "twin": fw.Twin(mask_rate=0.5, epochs=4, rate=5e-3),
}  # fmt: skip
ROUTED = pytest.mark.parametrize("name", METHODS)


def base_of(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model


def windows(words, **options) -> tuple[LanguageModelling, list]:
    task = LanguageModelling("toy", tokenizer=words, **options)
    return task, list(task.batches(Rows({"text": LINES}), 2))


def learnt_from(task: LanguageModelling) -> Adaptation:
    """Two tasks with the same question about other lines."""
    def epoch(lines):
        return lambda size, seed: list(task.batches(Rows({"text": lines}), size, seed=seed))

    return Adaptation({name: Question(name, task.answered, epoch(lines))
                       for name, lines in (("a", LINES), ("b", LINES[::-1] * 2))})  # fmt: skip


def routed(name: str, make, task: LanguageModelling):
    base = base_of(make)
    model = fw.merge(METHODS[name], base=base, experts=experts_of(base),
                     data=learnt_from(task)).module()  # fmt: skip
    return loud(model) if name != "twin" else _apart(model)


def _apart(model):
    """Twin's router, telling texts apart plainly."""
    with torch.no_grad():
        last = model.get_submodule("routing").mixture.router.layers[-1]
        last.weight.copy_(torch.randn(last.weight.shape, generator=torch.Generator()) * 3)
    return model


@PLAIN
@pytest.mark.parametrize("prompt", [1, 3, 6, 7])
def test_a_plain_model_scores_the_rest_as_it_does_in_whole_windows(tokenizer, make, prompt) -> None:
    model = base_of(make)
    whole, batches = windows(tokenizer(), length=7)
    given, same = windows(tokenizer(), length=7, prompt=prompt)
    left = len(given.ready(Rows({"text": LINES})))
    with torch.no_grad():
        expected, targets = [], []
        for batch in batches:
            logits, real = whole.logits(model, batch), batch["attention_mask"][:, 1:] == 1
            rows = [(r[prompt - 1 :][m[prompt - 1 :]], i[prompt:][m[prompt - 1 :]])
                    for r, i, m in zip(logits, batch["input_ids"], real, strict=True)]  # fmt: skip
            expected += [row for row, _ in rows if len(row)]
            targets += [row for _, row in rows if len(row)]
        found = [row for batch in same for row in given.answered(model, batch)]
    torch.testing.assert_close(torch.stack(found), torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert torch.cat([given.targets(b) for b in same]).equal(torch.cat(targets))
    seen = evaluate(model, given, Rows({"text": LINES}), batch_size=2)
    assert len(seen) == left == len(expected)
    for score, row, ids in zip(seen.score, expected, targets, strict=True):
        assert score == pytest.approx(-F.cross_entropy(row, ids).item(), rel=1e-4)
    assert seen.columns["tokens"].tolist() == [len(ids) for ids in targets]


def test_a_last_window_that_ends_in_its_prompt_is_left_out(tokenizer) -> None:
    ids = tokenizer()("".join(LINES))["input_ids"]
    for prompt in range(8):
        task, _ = windows(tokenizer(), length=7, prompt=prompt)
        cut = [ids[at : at + 8] for at in range(0, len(ids) - 1, 7)]
        assert [w.tolist() for w in task.ready(Rows({"text": LINES})).examples] == [
            window for window in cut if len(window) > prompt
        ]


def test_prompts_that_leave_nothing_are_refused(tokenizer) -> None:
    for prompt in (-1, 8):
        with pytest.raises(DataError, match=r"toy[\s\S]*0 to 7[\s\S]*at most L"):
            LanguageModelling("toy", tokenizer=tokenizer(), length=7, prompt=prompt)
    short = Rows({"text": ["the cat sat"]}, name="short")
    task = LanguageModelling("toy", tokenizer=tokenizer(), length=7, prompt=3)
    with pytest.raises(DataError, match=r"short[\s\S]*at least 4 tokens"):
        task.ready(short)
    whole = LanguageModelling("toy", tokenizer=tokenizer(), length=7)
    with pytest.raises(DataError, match=r"no token after its prompt[\s\S]*toy"):
        next(task.batches(whole.ready(short), 1))


def test_a_model_without_a_cache_is_refused(tokenizer) -> None:
    class Bare(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return torch.zeros(*input_ids.shape, 30)

    task, _ = windows(tokenizer(), length=7, prompt=3)
    with pytest.raises(DataError, match=r"key-value cache[\s\S]*Bare"):
        evaluate(Bare(), task, Rows({"text": LINES}))


def test_gradients_flow_through_the_cache(tokenizer) -> None:
    whole, (batch, *_) = windows(tokenizer(), length=7)
    given, _ = windows(tokenizer(), length=7, prompt=3)
    found = []
    for task in (given, whole):
        model = base_of(llama).double()
        rest = task.logits(model, batch)[:, 3 - task.given :]
        loss = F.cross_entropy(rest.flatten(0, 1), batch["input_ids"][:, 3:].flatten())
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_training_is_on_whole_windows(tokenizer) -> None:
    whole, (batch, *_) = windows(tokenizer(), length=7)
    given, _ = windows(tokenizer(), length=7, prompt=3)
    model = base_of(llama)
    assert given.loss(model, batch).item() == whole.loss(model, batch).item()


@ROUTED
@PLAIN
def test_what_comes_after_the_prompt_changes_nothing_before_it(tokenizer, make, name) -> None:
    moves = {}
    for prompt in (0, 3):
        task, (batch, *_) = windows(tokenizer(), length=7, prompt=prompt)
        model = routed(name, make, task)
        other = copy.copy(batch) | {"input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, 5:] = (other["input_ids"][:, 5:] + 9) % 19
        with torch.no_grad():
            now, then = (task.logits(model, each) for each in (batch, other))
        before = 5 - max(1, prompt)  # places of which no input has changed
        moves[prompt] = (now - then)[:, :before].abs().max()
        assert (now - then)[:, before:].abs().max() > 1e-2
    assert moves[3] == 0 and moves[0] > 1e-4


@ROUTED
def test_routed_models_that_see_what_they_are_scored_on_are_told_of(tokenizer, name) -> None:
    task, _ = windows(tokenizer(), length=7)
    prompted, _ = windows(tokenizer(), length=7, prompt=3)
    model, split = routed(name, llama, task), Rows({"text": LINES})
    with pytest.warns(FusewrightWarning, match=r"toy: .*no likelihoods[\s\S]*prompt: N"):
        evaluate(model, task, split)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, task, split)  # once
        evaluate(routed(name, llama, task), prompted, split)
        evaluate(base_of(llama), task, split)
        fixed = fw.WEMoE(steps=0, router=0)
        base = base_of(llama)
        same = fw.merge(fixed, base=base, experts=experts_of(base)).module()
        evaluate(same, task, split)
        smile = fw.merge(fw.Smile(rank=2, gate=1), base=base, experts=experts_of(base)).module()
        evaluate(smile, task, split)


@ROUTED
@PLAIN
def test_methods_learn_by_prompts(tokenizer, make, name) -> None:
    task, (batch, *_) = windows(tokenizer(), length=7, prompt=3)
    base = base_of(make)
    method = METHODS[name]
    if name != "twin":
        method = method.model_copy(update={"steps": 3, "rate": 1e-2, "guard": 4, "every": 2})
    made = fw.merge(method, base=base, experts=experts_of(base), data=learnt_from(task))
    losses = torch.tensor(made.report["fitted"]["losses"])
    assert losses.isfinite().all() and len(losses) > 2
    with torch.no_grad():
        assert task.answered(made.module(), batch).isfinite().all()
    if name == "twin":  # of each window the prompt alone was seen
        routing = made.module().get_submodule("routing")
        with routing.heard(made.module()) as seen, torch.no_grad():
            task.answered(made.module(), batch)
        assert len(seen) == 1

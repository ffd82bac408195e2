"""Benchmarks of lm-eval: the same scores as its own run, and what it does not say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fusewright.errors import FusewrightError
from fusewright.tasks import DataError, Rows, evaluate
from fusewright.tasks.data import sliced

t = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fusewright.tasks.harness import LmEval  # noqa: E402
from fusewright.tasks.harness_documents import Benchmark  # noqa: E402

QUESTIONS = ["the cat sat", "the dog", "a cat saw a dog", "good mat", "so so so", "the run",
             "a dog sat on"]  # fmt: skip
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}} "
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["mat"], do_sample: false, max_gen_toks: 6}
filter_list:
  - name: animal
    filter:
      - {function: regex, regex_pattern: "(cat|dog|saw|good|on)"}
      - {function: take_first}
  - {name: all, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSES = """
task: chooses
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, more: more.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: more
doc_to_text: "{{question}}"
doc_to_choice: ["cat", "dog", "mat saw"]
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    answers = ["cat", "dog", "saw", "good", "on", "cat", "dog"]
    rows = [{"question": q, "answer": a, "gold": i % 3}
            for i, (q, a) in enumerate(zip(QUESTIONS, answers, strict=True))]  # fmt: skip
    for name, some in (("rows", rows), ("more", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    (tmp_path / "writes.yaml").write_text(WRITES)
    (tmp_path / "chooses.yaml").write_text(CHOOSES)
    return tmp_path


def llama(window: int = 64):
    config = t.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=19, max_position_embeddings=window, bos_token_id=1,
        eos_token_id=1, initializer_range=0.6,
    )  # fmt: skip
    torch.manual_seed(3)
    return t.LlamaForCausalLM(config).eval()


PROMPTS = ("fewshot", "max_new_tokens", "chat", "system", "turns")
TEMPLATE = ("{% for m in messages %}{{ {'user': 'the ', 'assistant': 'so ', 'system': 'run '}"
            "[m.role] }}{{ m.content }} {% endfor %}{% if add_generation_prompt %}so {% endif %}")


def task_of(folder: Path, name: str, tokenizer, **options) -> LmEval:
    prompts = {k: options.pop(k) for k in PROMPTS if k in options}
    said = Benchmark(file=folder / f"{name}.yaml", **prompts)
    return LmEval(name, benchmark=said, tokenizer=tokenizer(), **options)


def asked(task: LmEval, model, part: str | None = None, **options):
    documents = task.benchmark.documents()
    return evaluate(model, task, sliced(documents, part) if part else documents, **options)


def direct(folder: Path, name: str, tokenizer, model, monkeypatch, **options):
    """lm-eval's own run."""
    monkeypatch.chdir(folder)  # where it looks for data_files
    manager = TaskManager(include_path=folder, include_defaults=False)
    reader = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=8)
    return lm_eval.simple_evaluate(
        reader, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize("filter_", ["animal", "all"])
def test_written_answers_score_as_in_lm_eval(folder, tokenizer, monkeypatch, filter_) -> None:
    model = llama()
    seen = asked(task_of(folder, "writes", tokenizer, filter=filter_), model)
    found = direct(folder, "writes", tokenizer, model, monkeypatch)
    samples = [s for s in found["samples"]["writes"] if s["filter"] == filter_]
    assert seen.metric == "exact_match"
    assert seen.score.tolist() == [s["exact_match"] for s in samples]
    assert seen.value == pytest.approx(found["results"]["writes"][f"exact_match,{filter_}"])
    assert seen.columns["prediction"].tolist() == [s["filtered_resps"][0] for s in samples]


@pytest.mark.parametrize("fewshot", [0, 2])
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_score_as_in_lm_eval(folder, tokenizer, monkeypatch, fewshot, metric) -> None:
    model = llama()
    seen = asked(task_of(folder, "chooses", tokenizer, fewshot=fewshot, metric=metric), model)
    found = direct(folder, "chooses", tokenizer, model, monkeypatch, num_fewshot=fewshot)
    assert seen.score.tolist() == [s[metric] for s in found["samples"]["chooses"]]
    assert set(seen.columns) == {"truncated"}  # nothing was written that could be unreadable


@pytest.mark.parametrize("system", [None, "good dog"])
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("name", ["writes", "chooses"])
def test_chats_score_as_in_lm_eval(folder, tokenizer, monkeypatch, name, turns, system) -> None:
    def chatting():
        words = tokenizer()
        words.chat_template = TEMPLATE
        return words

    chatting().save_pretrained(folder / "words")
    model, fewshot = llama(), 2 * (name == "chooses")
    task = task_of(folder, name, chatting, chat=folder / "words", turns=turns, system=system,
                   fewshot=fewshot)  # fmt: skip
    seen = asked(task, model)
    found = direct(folder, name, chatting, model, monkeypatch, apply_chat_template=True,
                   fewshot_as_multiturn=turns, system_instruction=system,
                   num_fewshot=fewshot)  # fmt: skip
    metric = {"writes": "exact_match", "chooses": "acc"}[name]
    samples = found["samples"][name][: len(seen)]
    assert seen.score.tolist() == [s[metric] for s in samples]
    prompts = task.benchmark.documents().rows(range(7))["requests"]
    assert [p[0].args[0] for p in prompts] == [s["arguments"][0][0] for s in samples]
    plain = task_of(folder, name, chatting, fewshot=fewshot).benchmark
    assert plain.documents().digest() != task.benchmark.documents().digest()


def test_a_chat_needs_a_template(folder, tokenizer) -> None:
    tokenizer().save_pretrained(folder / "words")
    file = folder / "writes.yaml"
    with pytest.raises(DataError, match="no chat template"):
        Benchmark(file=file, chat=folder / "words").documents()
    with pytest.raises(DataError, match="need a chat template"):
        Benchmark(file=file, system="be brief").documents()


@torch.no_grad()
def test_choices_score_as_computed_by_hand(folder, tokenizer) -> None:
    model, words = llama(), tokenizer()
    seen = asked(task_of(folder, "chooses", tokenizer), model)
    for number, question in enumerate(QUESTIONS):
        prompt = words(question)["input_ids"]
        sums = []
        for choice in ("cat", "dog", "mat saw"):
            more = words(choice)["input_ids"]
            logits = model(torch.tensor([prompt + more])).logits[0].log_softmax(-1)
            sums.append(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(more)))
        assert seen.score[number] == (int(np.argmax(sums)) == number % 3)


@torch.no_grad()
def test_written_answers_score_as_computed_by_hand(folder, tokenizer) -> None:
    model, words = llama(), tokenizer()
    seen = asked(task_of(folder, "writes", tokenizer), model)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    unread = 0
    for number, row in enumerate(rows):
        ids = words(row["question"])["input_ids"]
        text: list[str] = []
        for _ in range(6):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            word = words.decode([token])
            if token == 1 or "mat" in word.split():
                break
            ids, text = [*ids, token], [*text, word]
        animal = next((w for w in text if w in ("cat", "dog", "saw", "good", "on")), None)
        unread += animal is None
        assert seen.columns["unparsed"][number] == (animal is None)
        assert seen.score[number] == (animal == row["answer"])
    assert 0 < unread < len(rows)  # otherwise the test says nothing


def test_a_document_is_asked_the_same_in_every_part(folder, tokenizer) -> None:
    task, model = task_of(folder, "chooses", tokenizer, fewshot=2), llama()
    whole = asked(task, model).score
    assert asked(task, model, "all[:2]").score.tolist() == whole[:2].tolist()
    assert asked(task, model, "all[2:]").score.tolist() == whole[2:].tolist()
    assert asked(task, model, "all[2:]", limit=3).score.tolist() == whole[2:5].tolist()
    prompts = [each[0].args[0] for each in task.benchmark.documents().rows(range(7))["requests"]]
    other = Benchmark(file=task.benchmark.file, fewshot=2, root=folder).documents()
    assert other.rows([6])["requests"][0][0].args[0] == prompts[6]
    assert len({prompt.rsplit("\n\n", 1)[0] for prompt in prompts}) > 1  # examples are drawn anew
    prepared = task.prepared(sliced(task.benchmark.documents(), "all[2:]"))
    assert evaluate(model, task, prepared, batch_size=1).score.tolist() == whole[2:].tolist()


def test_an_evaluation_leaves_nothing_for_the_next_model(folder, tokenizer) -> None:
    task, model, other = task_of(folder, "writes", tokenizer), llama(), llama()
    torch.nn.init.normal_(other.lm_head.weight, std=2.0)
    first = asked(task, model).columns["prediction"].tolist()
    assert asked(task, other).columns["prediction"].tolist() != first
    assert asked(task, model).columns["prediction"].tolist() == first


@pytest.mark.parametrize("name", ["writes", "chooses"])
def test_prompts_longer_than_the_window_are_counted(folder, tokenizer, name) -> None:
    length = {"writes": 9, "chooses": 5}[name]
    seen = asked(task_of(folder, name, tokenizer, length=length), llama())
    room = length - 6 if name == "writes" else length + 1 - 2  # the longest choice has two words
    sizes = [len(question.split()) for question in QUESTIONS]
    assert seen.columns["truncated"].tolist() == [size > room for size in sizes]
    assert room in sizes and room + 1 in sizes


def test_few_shot_examples_count_towards_the_window(folder, tokenizer) -> None:
    assert asked(task_of(folder, "chooses", tokenizer, fewshot=2, length=9), llama()).columns[
        "truncated"
    ].all()


def test_nothing_is_said_and_nothing_stays_changed(folder, tokenizer, capfd, caplog) -> None:
    task, model, level = task_of(folder, "writes", tokenizer), llama(), t.logging.get_verbosity()
    task.tokenizer.pad_token = None
    before = torch.random.get_rng_state()
    steps: list[tuple[int, int]] = []
    asked(task, model, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (7, 7)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert task.tokenizer.pad_token is None and torch.equal(before, torch.random.get_rng_state())
    assert t.logging.get_verbosity() == level
    assert logging.getLogger("lm_eval").level != logging.CRITICAL


def test_data_lie_beside_the_file_or_in_the_data_folder(folder, tokenizer) -> None:
    own = folder / "tasks"
    own.mkdir()
    (own / "writes.yaml").write_text(WRITES)
    here, there = (Benchmark(file=f / "writes.yaml", root=folder) for f in (folder, own))
    assert here.documents().docs[0] == there.documents().docs[0]
    assert here.documents().digest() == there.documents().digest()  # wherever it lies


def test_the_digest_follows_documents_and_prompts(folder) -> None:
    file = folder / "chooses.yaml"
    before = Benchmark(file=file).documents().digest()
    assert Benchmark(file=file, fewshot=1).documents().digest() != before
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("the cat sat", "the cat ran"))
    assert Benchmark(file=file).documents().digest() != before


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("chooses", {"metric": "acc_nrm"}, "acc_norm"),
        ("chooses", {"metric": "mcc"}, "no mean over documents"),
        ("writes", {"filter": "animals"}, "did you mean 'animal'"),
        ("writes", {"length": 6}, "max_new_tokens: 1"),
        ("missing", {}, "no such task file"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, tokenizer, name, options, says) -> None:
    with pytest.raises(DataError, match=says):
        asked(task_of(folder, name, tokenizer, **options), llama())


def test_rows_that_are_no_documents_are_refused(folder, tokenizer) -> None:
    with pytest.raises(DataError, match="no documents of lm-eval"):
        evaluate(llama(), task_of(folder, "writes", tokenizer), Rows({"text": ["a"]}))


def test_a_file_without_its_data_is_refused(folder) -> None:
    (folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="cannot open a task"):
        Benchmark(file=folder / "writes.yaml").documents()


def test_a_file_that_is_no_task_is_refused(folder) -> None:
    (folder / "writes.yaml").write_text("just: text\n")
    with pytest.raises(DataError, match="holds no such task"):
        Benchmark(file=folder / "writes.yaml").documents()


def test_code_that_a_model_wrote_is_not_run(folder) -> None:
    (folder / "writes.yaml").write_text(WRITES + "unsafe_code: true\n")
    with pytest.raises(DataError, match="runs code"):
        Benchmark(file=folder / "writes.yaml").documents()


def test_there_are_no_logits_and_no_loss(folder, tokenizer) -> None:
    task = task_of(folder, "writes", tokenizer)
    batch = next(task.batches(task.benchmark.documents(), 2))
    for ask in (task.logits, task.loss):
        with pytest.raises(FusewrightError, match="outcomes only"):
            ask(llama(), batch)

"""A suite with benchmarks of lm-eval: measured, kept, reported with what scores leave unsaid."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
t = pytest.importorskip("transformers")
for needed in ("lm_eval", "optuna", "jinja2", "scipy"):
    pytest.importorskip(needed)

from fusewright.bench.report.files import to_csv, to_json, to_latex, to_markdown  # noqa: E402
from fusewright.bench.report.html import render  # noqa: E402
from fusewright.bench.report.summary import summarise  # noqa: E402
from fusewright.bench.suite import suite as open_suite  # noqa: E402
from fusewright.bench.suite_file import SuiteError  # noqa: E402
from fusewright.bench.sweep.cells import _digests  # noqa: E402
from fusewright.bench.sweep.run import bench  # noqa: E402
from fusewright.bench.sweep.store import load_results  # noqa: E402
from fusewright.errors import FusewrightError  # noqa: E402
from fusewright.tasks import DataError  # noqa: E402

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "good", "bad", "yes",
         "no", "maybe", "so"]  # fmt: skip
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}} "
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["mat"], do_sample: false}
filter_list:
  - name: animal
    filter: [{function: regex, regex_pattern: "(cat|dog|saw|good|on)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSES = """
task: chooses
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["cat", "dog"]
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SUITE = """
suite: 1
title: Tiny benchmarks
opens: {model: AutoModelForCausalLM}
base: org/base
experts: {writes: org/one, chooses: org/two}
tasks:
  writes:
    kind: lm-eval
    question: which animal
    data: own/writes.yaml
    splits: {validation: "all[:4]", test: "all[4:]"}
    options: {max_new_tokens: 5, length: 10}
  chooses:
    kind: lm-eval
    data: own/chooses.yaml
    splits: {validation: "all[:4]", test: "all[4:]"}
    options: {metric: acc, fewshot: 0}
"""


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>",
                                     pad_token="<pad>")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data, models and the suite's file."""
    root = tmp_path_factory.mktemp("benchmarks")
    own = root / "data" / "own"
    own.mkdir(parents=True)
    (own / "writes.yaml").write_text(WRITES)
    (own / "chooses.yaml").write_text(CHOOSES)
    rows = [{"question": " ".join(WORDS[i % 9 : i % 9 + 2 + i % 6]), "gold": i % 2,
             "answer": ("cat", "dog", "saw")[i % 3]} for i in range(20)]  # fmt: skip
    (own / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = t.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=19, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=1, initializer_range=0.6,
    )  # fmt: skip
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        t.LlamaForCausalLM(config).save_pretrained(root / "pool" / name)
        words().save_pretrained(root / "pool" / name)
    (root / "suite.yaml").write_text(SUITE)
    return root


def opened(root, text: str | None = None):
    path = root / "suite.yaml"
    if text is not None:
        path = root / "changed.yaml"
        path.write_text(text)
    return open_suite(path, pool=root / "pool", data=root / "data")


@pytest.fixture(scope="module")
def swept(root):
    """(results, folder) of a sweep, tuned on the validation documents."""
    out = root / "results"
    return bench(opened(root), ["ties"], out=out, tune=2, progress=False), out


def test_experts_and_merges_are_measured_on_the_test_documents(swept):
    results, out = swept
    rows = results.rows()
    assert {"base", "own expert", "average", "ties", "ties, tuned"} <= set(rows)
    assert results.facts["failed"] == {}
    for cell in results.cells:
        for task in cell.outcomes:
            assert len(cell.outcomes[task]["clean"]) == 16
    kept = {c.row: c.outcomes["writes"]["clean"] for c in load_results(out).cells}
    for cell in results.cells:
        found = cell.outcomes["writes"]["clean"]
        assert kept[cell.row].columns["unparsed"].tolist() == found.columns["unparsed"].tolist()


def test_what_such_tasks_cannot_do_is_left_out_and_told(swept):
    results, _ = swept
    told = results.facts["left out"]
    assert "writes, chooses" in told["ensembles of outputs"] and "joint training" in told
    assert not any("ensemble" in row or "joint" in row for row in results.rows())
    assert all("slowdown" not in cell.costs for cell in results.of("own expert"))


def test_nothing_has_to_be_tuned_on_what_it_is_measured_by(root):
    suite = opened(root)
    parts = [suite.split("writes", part) for part in ("validation", "test")]
    said = [{r[0].args[0] for r in part.rows(range(len(part)))["requests"]} for part in parts]
    numbers = [{r[0].doc_id for r in part.rows(range(len(part)))["requests"]} for part in parts]
    assert all(said) and numbers == [set(range(4)), set(range(4, 20))]


@pytest.fixture(scope="module")
def summary(swept):
    return summarise(swept[0], resamples=200)


def test_rates_are_means_of_what_was_measured(swept, summary):
    (cell,) = swept[0].of("ties")
    columns = cell.outcomes["writes"]["clean"].columns
    line = summary.sections[0].line("ties")
    assert line.rates["writes"] == {
        name: pytest.approx(100 * columns[name].mean()) for name in ("truncated", "unparsed")
    }
    assert 0 < line.rates["writes"]["truncated"] < 100
    assert line.rates["chooses"] == {"truncated": 0}


def test_every_table_has_the_rates_beside_the_score(summary):
    line = summary.sections[0].line("ties")
    truncated = line.rates["writes"]["truncated"]
    table = to_markdown(summary).splitlines()
    head = next(one for one in table if one.startswith("| model"))
    assert "| writes | writes truncated | writes unparsed | chooses | mean |" in head  # not zeros
    cells = next(one for one in table if one.startswith("| ties |")).split("|")
    assert cells[3].strip() == f"{truncated:.1f}" and len(cells) == len(head.split("|"))
    assert "Truncated: percent of items that a limit cut" in table[2]
    ties = next(r for r in csv.DictReader(io.StringIO(to_csv(summary))) if r["row"] == "ties")
    assert float(ties["writes truncated"]) == pytest.approx(truncated)
    rows = to_json(summary)["sections"][0]["rows"]
    assert next(r for r in rows if r["row"] == "ties")["rates"]["writes"]["truncated"] == truncated
    page = render(summary)
    assert "Cut and unreadable answers" in page and "writes unparsed" in page
    assert "writes unparsed" in to_latex(summary)


def test_cells_depend_on_documents_prompts_and_data(root):
    before = _digests(opened(root))["data"]
    assert _digests(opened(root))["data"] == before
    file = root / "data" / "own" / "writes.yaml"
    try:
        file.write_text(WRITES.replace("{{question}} ", "{{question}} and "))
        assert _digests(opened(root))["data"] != before
    finally:
        file.write_text(WRITES)
    assert _digests(opened(root))["data"] == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("own/writes.yaml", "own/nothing.yaml", "no such task file"),
        ('test: "all[4:]"', 'test: "test[4:]"', "no part of lm-eval's documents"),
        ('test: "all[4:]"', 'test: "all[40:]"', "empty"),
        ("max_new_tokens: 5", "max_tokens: 5", "max_new_tokens"),
        ("metric: acc,", "metric: accuracy,", "no metric 'accuracy'"),
    ],
)
def test_a_suite_that_is_wrong_is_refused(root, old, new, says):
    with pytest.raises((SuiteError, DataError), match=says):
        suite = opened(root, SUITE.replace(old, new))
        for task in suite.spec.tasks:
            suite.evaluate(suite.base, task)


def test_a_task_file_needs_a_data_folder(root, monkeypatch):
    monkeypatch.delenv("FUSEWRIGHT_DATA", raising=False)
    suite = open_suite(root / "suite.yaml", pool=root / "pool")
    with pytest.raises(FusewrightError, match="--data DIR"):
        suite.split("writes")


def test_an_expert_that_scores_nothing_normalises_nothing(swept):
    results, _ = swept
    none = [replace(c, outcomes={**c.outcomes, "writes": {"clean": zeros(c)}})
            for c in results.cells if "writes" in c.outcomes]  # fmt: skip
    section = summarise(replace(results, cells=tuple(none)), resamples=200).sections[0]
    for line in section.lines:
        assert line.normalised is None and not line.shares
        assert line.versus is None or line.versus.measure == "mean"
        assert line.versus is None or line.versus.value.low <= line.versus.value.high


def zeros(cell):
    found = cell.outcomes["writes"]["clean"]
    return replace(found, score=0 * found.score)

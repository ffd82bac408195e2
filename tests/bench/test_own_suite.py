"""A suite of one's own: texts as JSON lines, and a variant of another base."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import fusewright as fw
from fusewright.bench.results import CLEAN
from fusewright.bench.suite_file import SuiteError
from fusewright.errors import PlanError
from fusewright.tasks.text_classification import EncoderClassification

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

TASKS = ("one", "two")
WORDS = [f"w{number}" for number in range(20)]


def write_model(at, words, seed, start=None):
    """A BERT, a step away from where it starts; the numbers of its words are its own."""
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.BertModel(config, add_pooling_layer=False)
    if start is not None:
        steps = [0.05 * torch.randn(p.shape) for p in model.parameters()]
        model.load_state_dict(start)
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), steps, strict=True):
                parameter += step
    model.save_pretrained(at)
    numbers = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(at)
    return model.state_dict()


def models(folder, tag, words):
    base = write_model(folder / f"base-{tag}", words, 0)
    for number, task in enumerate(TASKS, 1):
        write_model(folder / f"{task}-{tag}", words, number, base)
    save_file({task: torch.randn(2, 8) for task in TASKS}, folder / f"heads-{tag}.safetensors")
    return {"base": str(folder / f"base-{tag}"), "heads": str(folder / f"heads-{tag}.safetensors"),
            "experts": {task: str(folder / f"{task}-{tag}") for task in TASKS}}  # fmt: skip


def write_rows(path, labels):
    draw = random.Random(path.parent.name)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=5)), "label": label})
             for label in labels]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture
def opened(tmp_path):
    """The suite, opened anew at every call."""
    for task in TASKS:
        write_rows(tmp_path / "data" / task / "rows.jsonl", [0, 1] * 10)
    other = models(tmp_path, "b", WORDS[::-1]) | {"axes": {"words": "others"}}
    fields = models(tmp_path, "a", WORDS) | {
        "suite": 1, "title": "Texts of one's own", "variants": {"other": other},
        "opens": {"model": "BertModel", "arguments": {"add_pooling_layer": False}},
        "tasks": {
            name: {"kind": "text-classification", "data": name, "classes": ["no", "yes"],
                   "splits": {"validation": "rows[:8]", "test": "rows[8:]"}}
            for name in TASKS
        },
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(fields), "utf-8")
    return partial(fw.suite, tmp_path / "own.yaml", data=tmp_path / "data")


def sweep(suite, **options):
    given = {"methods": ["average"], "joint": "none", "progress": False}
    return fw.bench(suite, **given | options)


def losses(results, row, **axes):
    (cell,) = (c for c in results.of(row) if c.axes == axes)
    return np.stack([cell.outcomes[task][CLEAN].columns["loss"] for task in TASKS])


def test_other_rows_in_json_lines_are_other_cells(opened, tmp_path):
    before = sweep(opened(), out=tmp_path / "out")
    write_rows(tmp_path / "data" / "one" / "rows.jsonl", [1, 0] * 10)
    after = sweep(opened(), out=tmp_path / "out")
    assert not np.array_equal(losses(after, "base"), losses(before, "base"))
    assert np.array_equal(losses(after, "base"), losses(sweep(opened()), "base"))


def test_a_variant_of_another_base_reads_texts_by_its_own_tokenizer(opened):
    both = sweep(opened(), variants=[None, "other"])
    alone = sweep(opened(variant="other"))
    for row in ("base", "expert one", "average"):
        expected = losses(alone, row, words="others")
        assert np.array_equal(losses(both, row, words="others"), expected)


class Picky(fw.Mean):
    """The mean, at one density only."""

    name: ClassVar[str] = "picky"
    density: float = 0.5

    def merge(self, vectors, base, at):
        if self.density != 0.5:
            raise PlanError("no other density")
        return super().merge(vectors, base, at)


def test_of_a_method_that_fails_when_tuned_the_tuned_row_is_named(opened):
    results = sweep(opened(), methods=[Picky()], tune=2)
    assert set(results.facts["failed"]) == {"picky, tuned"} and "picky" in results.rows()


def test_bits_of_masks_are_no_parameters(opened):
    (emr,) = sweep(opened(), methods=["emr"]).of("emr")
    (base,) = sweep(opened()).of("base")
    assert emr.costs["extra_parameters"] == emr.costs["stored"] - base.costs["stored"]
    assert emr.costs["extra_parameters"] == base.costs["stored"] + len(TASKS)  # vector, scales


def test_of_a_limited_split_no_more_rows_are_prepared(opened, monkeypatch):
    asked = []
    encode = EncoderClassification.encode
    monkeypatch.setattr(EncoderClassification, "encode", lambda self, rows, numbers, where: (
        asked.extend(numbers), encode(self, rows, numbers, where))[1])  # fmt: skip
    batches = list(opened().unlabelled(part="test", limit=4))
    assert {n for batch in batches for n in batch["items"].tolist()} == {0, 1, 2, 3}
    assert set(asked) == {0, 1, 2, 3}


def test_a_split_that_is_missing_is_refused_before_anything_is_measured(opened, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(path.read_text("utf-8").replace("validation: rows[:8]", "train: rows[:8]"))
    with pytest.raises(SuiteError, match="'one' has no validation split"):
        sweep(opened(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variant_that_says_nothing_of_itself_is_not_mixed_with_the_others(opened, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(path.read_text("utf-8").replace("axes:\n      words: others", "axes: {}"))
    assert opened().axes == {} and opened(variant="other").axes == {"variant": "other"}

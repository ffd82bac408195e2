"""Suites of public checkpoints, on tiny models of the same classes saved in the same layout."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import yaml

import fusewright as fw
from fusewright.bench.suite_file import SuiteError, find_suite, read_suite
from tiny_clip_pool import pictures, tiny_clip

transformers = pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
tokenizers = pytest.importorskip("tokenizers")

GLUE = {"cola": ("sentence",), "mnli": ("premise", "hypothesis")}
TEXTS = ["a b", "c", "b a c c"]


# -- CLIP: 8, 14 and 20 tasks --------------------------------------------------------------------


@pytest.mark.parametrize("size, model", [("b32", "base-patch32"), ("b16", "base-patch16"),
                                         ("l14", "large-patch14")])  # fmt: skip
def test_larger_clip_suites_add_tasks_to_the_smaller(size, model):
    names = [f"clip-vit-{size}", f"clip-vit-{size}-14", f"clip-vit-{size}-20"]
    specs = [read_suite(find_suite(name)) for name in names]
    assert [len(spec.merged) for spec in specs] == [8, 14, 20]
    for spec in specs:
        assert spec.base == spec.zero_shot.model == f"openai/clip-vit-{model}"
        assert spec.experts == {t: f"tanganke/clip-vit-{model}_{t}" for t in spec.tasks}
    for less, more in itertools.pairwise(specs):
        assert more.merged[: len(less.merged)] == less.merged
        assert {t: more.tasks[t] for t in less.tasks} == less.tasks


def test_sizes_of_clip_share_their_tasks():
    for more in ("", "-14", "-20"):
        specs = [read_suite(find_suite(f"clip-vit-{size}{more}")) for size in ("b32", "b16", "l14")]
        assert specs[0].tasks == specs[1].tasks == specs[2].tasks


def test_labels_and_columns_of_the_added_data_sets_are_read(tmp_path):
    pytest.importorskip("optuna")
    tiny_clip(tmp_path / "pool", ("pcam", "fer2013"))
    whole = fw.suite("clip-vit-b32-14", pool=tmp_path / "pool", data=tmp_path / "data")
    suite = restricted(whole, "pcam", "fer2013")
    at = tmp_path / "data" / "vision"
    pictures(at / "pcam" / "test.parquet", 9, 2, 0)
    pictures(at / "fer2013" / "test.parquet", 9, 7, 1, names=("jpg", "cls"))
    model = suite.open(suite.base)
    for name, classes in (("pcam", 2), ("fer2013", 7)):
        task = suite.tasks[name]
        batch = next(task.batches(suite.split(name), 9))
        with torch.inference_mode():
            assert task.logits(model, batch).shape == (9, classes)
        assert batch["labels"].max() < classes


def restricted(suite, *names):
    from fusewright.bench.suite import Suite

    spec = suite.spec
    some = {key: {n: getattr(spec, key)[n] for n in names} for key in ("tasks", "experts")}
    spec = spec.model_copy(update=some | {"merged": list(names), "unseen": []})
    return Suite(suite.name, spec, suite.pool, suite.data)


# -- suites that start from another --------------------------------------------------------------


def written(folder, name, **fields):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"title": name, **fields}))
    return path


def test_an_extended_suite_adds_tasks_and_experts_and_replaces_the_rest(tmp_path):
    path = written(tmp_path, "more", extends="digits", base="other",
                   experts={"digit": "mine"})  # fmt: skip
    found, below = read_suite(path), read_suite(find_suite("digits"))
    assert found.base == "other" and found.tasks == below.tasks
    assert found.experts == {**below.experts, "digit": "mine"}
    assert found.digest() != below.digest()


def test_an_extension_is_a_merge_patch(tmp_path):
    """Mappings are merged at every depth, null removes, anything else is replaced."""
    tasks = {"one": {"kind": "digits", "options": {"a": 1, "b": [1, 2]}}, "two": {"kind": "digits"}}
    written(tmp_path, "below", base="base", experts={"one": "x"}, tasks=tasks, heads="heads",
            build={"builder": "digits", "parameters": {"depth": 1, "width": 2}})  # fmt: skip
    found = read_suite(written(
        tmp_path, "above", extends="below.yaml", heads=None, build={"parameters": {"width": 3}},
        tasks={"one": {"options": {"a": None, "b": [3]}, "question": "?"}, "two": None},
        experts={"three": "y"}, merged=["one"], variants={"v": {"heads": None, "axes": {"s": "1"}}},
    ))  # fmt: skip
    assert list(found.tasks) == ["one"] and found.heads is None
    assert (found.tasks["one"].options, found.tasks["one"].question) == ({"b": [3]}, "?")
    assert found.build.parameters == {"depth": 1, "width": 3}
    assert found.experts == {"one": "x", "three": "y"}
    assert found.variants["v"].axes == {"s": "1"}


def test_what_a_pool_can_be_given_later_names_no_other_pool(tmp_path):
    one = read_suite(find_suite("vision-mini"))
    both = one.build.model_copy(update={"parameters": {**one.build.parameters,
                                                       "tunings": ["full", "lora"]}})  # fmt: skip
    more = one.model_copy(update={"variants": {}, "build": both})
    assert (more.digest(), more.pool_digest()) == (one.digest(), one.pool_digest())


def test_a_suite_beside_the_file_can_be_extended(tmp_path):
    written(tmp_path, "first", extends="digits", base="near")
    assert read_suite(written(tmp_path, "second", extends="first.yaml")).base == "near"


@pytest.mark.parametrize("name, part", [("digit", "did you mean 'digits'"),
                                        ("round.yaml", "extend each other")])  # fmt: skip
def test_what_cannot_be_extended_is_refused(tmp_path, name, part):
    with pytest.raises(SuiteError, match=part):
        read_suite(written(tmp_path, "round", extends=name))


def test_heads_come_from_one_place(tmp_path):
    path = written(tmp_path, "two", extends="gpt2-glue", heads="heads.safetensors")
    with pytest.raises(SuiteError, match="heads come from one place"):
        read_suite(path)


def test_own_heads_need_an_expert_for_every_task(tmp_path):
    task = {"kind": "decoder-classification"}
    path = written(tmp_path, "more", extends="gpt2-glue", tasks={"unseen": task})
    with pytest.raises(SuiteError, match="own_heads names 'unseen', which is no expert"):
        read_suite(path)


# -- GPT-2 ---------------------------------------------------------------------------------------


def word_tokenizer(folder):
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(folder)


def tiny_gpt2(folder):
    """The base as its authors published it: no prefix, with the masks of causal attention. Experts
    are classifiers, each with its own head."""
    from safetensors.torch import load_file, save_file

    config = transformers.GPT2Config(
        vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_ctx=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = folder / "gpt2"
    transformers.GPT2Model(config).save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    stored |= {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32).tril() for n in range(2)}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer(base)
    for task, classes in (("cola", 2), ("mnli", 3)):
        expert = transformers.GPT2ForSequenceClassification.from_pretrained(
            base, num_labels=classes, pad_token_id=0
        )
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.005 * torch.randn(parameter.shape))
        expert.save_pretrained(folder / f"gpt2_{task}")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2(folder / "pool")
    fields = yaml.safe_load(find_suite("gpt2-glue").read_text("utf-8"))
    for key in ("tasks", "experts"):
        fields[key] = {name: fields[key][name] for name in GLUE}
    for task, columns in GLUE.items():
        splits = fields["tasks"][task]["splits"]
        splits["validation"] = "train"
        at = folder / "data" / "glue" / task
        at.mkdir(parents=True)
        for part in ("train", splits["test"]):
            rows = {name: TEXTS for name in columns} | {"label": [0, 1, 1]}
            pq.write_table(pa.table(rows), at / f"{part}.parquet")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return fw.suite(folder / "tiny.yaml", pool=folder / "pool", data=folder / "data")


@pytest.mark.parametrize("task", GLUE)
def test_an_expert_under_its_own_head_is_the_public_classifier(gpt2, task):
    path = gpt2.experts[task]
    whole = transformers.GPT2ForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2.base, pad_token="<|endoftext|>")
    pairs = [TEXTS] * len(GLUE[task])
    tokens = tokenizer(*pairs, padding="max_length", max_length=32, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    batch = next(gpt2.tasks[task].batches(gpt2.split(task), 3))
    with torch.inference_mode():
        expected = whole(**tokens).logits
        found = gpt2.tasks[task].logits(gpt2.open(path), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_sweep_merges_what_lies_below_the_heads(gpt2, tmp_path):
    results = fw.bench(gpt2, ["ties"], out=tmp_path, progress=False)
    assert results.facts["failed"] == {}
    experts = [gpt2.open(gpt2.experts[task]).state_dict() for task in GLUE]
    module = gpt2.open(gpt2.base)
    module.load_state_dict({n: (experts[0][n] + experts[1][n]) / 2 for n in experts[0]})
    (found,) = results.of("average")
    for task in GLUE:
        expected = gpt2.evaluate(module, task).columns["loss"]
        np.testing.assert_allclose(found.outcomes[task]["clean"].columns["loss"], expected,
                                   rtol=1e-4)  # fmt: skip


def changed(gpt2, tmp_path, **changes):
    from fusewright.bench.suite import Suite

    spec = gpt2.spec.model_copy(update=changes)
    return Suite(gpt2.name, spec, gpt2.pool, gpt2.data)


def test_an_expert_without_the_head_is_named(gpt2, tmp_path):
    with pytest.raises(SuiteError, match=r"the expert 'cola' has no head(?s:.)*classifier.weight"):
        _ = changed(gpt2, tmp_path, own_heads="classifier.weight").heads


def test_a_head_for_other_classes_is_refused(gpt2, tmp_path):
    tasks = {n: t.model_copy(update={"classes": 3}) for n, t in gpt2.spec.tasks.items()}
    with pytest.raises(SuiteError, match="the head of 'cola' is for other classes"):
        _ = changed(gpt2, tmp_path, tasks=tasks).heads


# -- Llama ---------------------------------------------------------------------------------------

DOMAINS = {"math": "response", "multilingual": "targets"}


def tiny_llama(folder):
    """Bfloat16 and tied, as Llama 3.2 3B; one expert's embeddings are padded."""
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    base = folder / "Llama-3.2-3B"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    word_tokenizer(base)
    for domain, rows in (("math", 64), ("multilingual", 8)):
        expert = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        expert.resize_token_embeddings(rows)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape).to(parameter))
        expert.save_pretrained(folder / f"Llama-3.2-3B_{domain}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder / "pool")
    fields = yaml.safe_load(find_suite("llama-3.2-3b-mergebench").read_text("utf-8"))
    for key in ("tasks", "experts"):
        fields[key] = {name: fields[key][name] for name in DOMAINS}
    for domain, column in DOMAINS.items():
        task = fields["tasks"][domain]
        task["splits"] = {"train": "train[:3]", "validation": "train[:3]", "test": "train[3:]"}
        task["options"]["length"] = 4
        at = folder / "data" / "mergebench" / domain
        at.mkdir(parents=True)
        pq.write_table(pa.table({column: TEXTS * 3}), at / "train.parquet")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return fw.suite(folder / "tiny.yaml", pool=folder / "pool", data=folder / "data")


def test_an_expert_with_padded_embeddings_is_cut_to_the_bases_vocabulary(llama):
    padded = transformers.LlamaForCausalLM.from_pretrained(llama.pool / "Llama-3.2-3B_math")
    module = llama.open(llama.experts["math"])
    assert padded.config.vocab_size == 64 and module.config.vocab_size == 8
    found, expected = module.state_dict(), padded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name][: len(tensor)].to(tensor.dtype))
    assert llama.experts["multilingual"] == llama.pool / "Llama-3.2-3B_multilingual"


def test_a_sweep_merges_causal_models(llama, tmp_path):
    results = fw.bench(llama, ["ties"], out=tmp_path, progress=False)
    assert results.facts["failed"] == {}
    merged = fw.merge("average", experts=llama.experts, out=tmp_path / "average")
    (found,) = results.of("average")
    for domain in DOMAINS:
        expected = llama.evaluate(merged.path, domain).columns["loss"]
        np.testing.assert_allclose(found.outcomes[domain]["clean"].columns["loss"], expected,
                                   rtol=1e-2)  # fmt: skip


LEARNED = ("adamerging(steps=2, batch=2)", "adamerging(objective=self_label, steps=2, batch=2)",
           "adamerging(objective=cross_entropy, steps=2, batch=2)",
           "fw_merging(steps=2, batch=2)", "twin")  # fmt: skip


def test_a_sweep_learns_on_causal_models(llama, tmp_path):
    results = fw.bench(llama, list(LEARNED), out=tmp_path, progress=False)
    assert results.facts["failed"] == {}
    for method in LEARNED:
        for found in results.of(method):
            assert all(np.isfinite(of["clean"].score).all() for of in found.outcomes.values())


def test_references_are_labels(llama):
    """What is to be written is not shown to methods that learn without labels."""
    from fusewright.bench.suite import Suite

    written = llama.spec.tasks["math"].model_copy(update={
        "kind": "generation",
        "options": {"length": 8, "template": "{text}", "reference": "text"},
    })  # fmt: skip
    spec = llama.spec.model_copy(update={
        "tasks": {**llama.spec.tasks, "math": written},
    })  # fmt: skip
    suite = Suite("written", spec, llama.pool, llama.data)
    unlabelled, labelled = (asked.questions["math"] for asked in
                            (suite.unlabelled(part="test"), suite.labelled(part="test")))
    model = suite.open(suite.base)
    shown = next(iter(unlabelled.epoch(2, 0)))
    assert shown.keys() == {"input_ids", "attention_mask", "items"}
    assert unlabelled.logits(model, shown).shape == (2, 8)
    whole = next(iter(labelled.epoch(2, 0)))
    assert len(labelled.logits(model, whole)) == len(labelled.labels(model, whole)) > 2


def test_a_smaller_vocabulary_is_refused(llama, tmp_path):
    from fusewright.bench.vocabulary import cropped

    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps({"vocab_size": 4}))
    with pytest.raises(SuiteError, match="smaller than the base's"):
        cropped(small, llama.base, llama.spec.opens, tmp_path)
    (small / "config.json").write_text("{}")
    with pytest.raises(SuiteError, match="vocab_size"):
        cropped(small, llama.base, llama.spec.opens, tmp_path)

"""Pools of small BERT, GPT-2 and T5 models: what they are trained on is what evaluation asks."""

from __future__ import annotations

import json
import random
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tokenizers")

import numpy as np  # noqa: E402
import pyarrow  # noqa: E402

import fusewright as fw  # noqa: E402
from fusewright.bench.finetuning.recipe import recipe_for  # noqa: E402
from fusewright.bench.joint.recipe import joint_recipe  # noqa: E402
from fusewright.bench.pools import architectures, build, text, texts  # noqa: E402
from fusewright.bench.pools.text_to_text import groups, text_task  # noqa: E402
from fusewright.bench.pools.texts import encoded, load_corpora  # noqa: E402
from fusewright.bench.report.files import to_markdown  # noqa: E402
from fusewright.bench.report.summary import summarise  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import (  # noqa: E402
    SuiteError,
    SuiteSpec,
    find_suite,
    read_suite,
    shipped,
)
from fusewright.tasks import TEXT_CORRUPTIONS  # noqa: E402
from fusewright.tasks.heads import linear  # noqa: E402

SMALL = {
    "width": 32, "layers": 1, "vocabulary": 290, "length": 16, "base_rows": 8, "base_epochs": 1,
    "expert_epochs": 15, "batch": 8, "threads": 1, "shots": 2, "dropout": 0.0, "bfloat16": False,
    "expert_rate": 1e-2, "lora_rate": 2e-2, "lora_rank": 4,
}  # fmt: skip
WORDS = {"colours": ("red blue", "green pink"), "same": ("sun moon", "star sky")}
KINDS = {
    "gpt2": ("decoder-classification",
             {"length": 16, "scale": 16.0, "normalise": True, "pooling": "mean"}),
    "t5": ("text-to-text-classification",
           {"length": 16, "template": "is it: {text}", "verbalisers": ["no", "yes"]}),
}  # fmt: skip
RATES = {"gpt2": {}, "t5": {"base_epochs": 8, "base_rate": 2e-2, "expert_rate": 3e-2}}
"""A T5's are relative, but for adapters."""
OPENS = {"gpt2": "GPT2Model", "t5": "T5ForConditionalGeneration"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, words in WORDS.items():
        draw, folder = random.Random(name), root / name
        folder.mkdir()
        for split, count in (("train", 72), ("test", 40)):
            labels = [row % 2 for row in range(count)]
            chosen = [" ".join(draw.choices(words[y].split(), k=draw.randint(1, 4)))
                      for y in labels]  # fmt: skip
            table = pyarrow.table({"text": chosen, "label": labels})
            parquet.write_table(table, folder / f"{split}.parquet")
    return root


def suite(name, /, pooling=None, **parameters):
    kind, options = KINDS[name]
    if pooling:
        options = options | {"pooling": pooling}
        parameters["pooling"] = pooling
    tasks = {
        task: {"kind": kind, "data": task, "classes": ["no", "yes"], "options": options,
               "splits": {"train": "train[8:]", "validation": "train[:8]", "test": "test"}}
        for task in WORDS
    }  # fmt: skip
    return SuiteSpec(
        title="tiny", base="base", tasks=tasks, opens={"model": OPENS[name]},
        heads="heads.safetensors" if name == "gpt2" else None,
        experts={task: f"experts/{task}" for task in WORDS},
        variants={"lora": {"axes": {"tuning": "LoRA"},
                           "experts": {task: f"lora/{task}" for task in WORDS}}},
        build={"builder": "text",
               "parameters": {**SMALL, **RATES[name], "architecture": name, **parameters}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pools(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("pools")
    for architecture in KINDS:
        for variant in (None, "lora"):
            opened = Suite("tiny", suite(architecture), root / architecture, data, variant=variant)
            opened.build(progress=False)
    return root


@pytest.fixture(params=sorted(KINDS))
def opened(request, pools, data):
    return Suite("tiny", suite(request.param), pools / request.param, data)


@pytest.fixture
def adapted(opened):
    pytest.importorskip("peft")
    return opened.at(opened.seed, "lora")


def test_models_are_ordinary_folders_of_their_class(opened):
    model = getattr(transformers, opened.spec.opens.model).from_pretrained(opened.experts["same"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(opened.experts["same"])
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    ids = tokenizer(["red sun"])["input_ids"][0]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("variant", [None, "lora"])
def test_experts_learn_their_task_and_only_theirs(opened, variant):
    if variant:
        pytest.importorskip("peft")
    models = opened.at(opened.seed, variant)
    for task in WORDS:
        base, own = (models.evaluate(m, task) for m in (models.base, models.experts[task]))
        assert own.score.mean() > 0.9
        assert own.columns["loss"].mean() < 0.7 * base.columns["loss"].mean()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_decoder_is_trained_by_the_features_that_evaluation_takes(pools, data, pooling):
    """Padding on the right, of other lengths in the same batch, changes none."""
    opened = Suite("tiny", suite("gpt2", pooling), pools / "gpt2", data)
    model = opened.open(opened.experts["same"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(opened.base)
    recipe = text.read_recipe(opened.spec)
    for name, corpus in load_corpora(opened.spec.tasks, data).items():
        rows = encoded(corpus, tokenizer, recipe, name)
        assert len(set(rows.lengths.tolist())) > 1
        task = opened.tasks[name]
        batch = next(task.batches(opened.split(name, "train"), 64))
        with torch.no_grad():
            features, logits = rows.features(model, recipe), task.logits(model, batch)
        head = opened.heads[name]
        ours = linear(features, head, scale=recipe.scale, normalise=True)
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(rows.labels, batch["labels"])


def test_a_t5s_rates_are_relative_to_its_tensors_but_for_adapters(opened):
    model = opened.open(opened.base)
    found = groups(model, 0.02)
    assert [id(p) for group in found for p in group["params"]] == [*map(id, model.parameters())]
    for group in found:
        (p,) = group["params"]
        assert group["lr"] == pytest.approx(0.02 * p.detach().norm().item() / p.numel() ** 0.5)
        assert group["weight_decay"] == 0
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    assert all("lr" not in group for group in groups(model, 0.02))
    assert all(p.dim() == 1 for group in groups(model, 0.02) for p in group["params"])


def test_joint_training_and_fine_tuning_take_a_t5s_rates_as_its_experts_do(opened):
    joint = joint_recipe(opened, list(WORDS))
    assert joint.relative == joint.said()["relative"] == (opened.spec.opens.model == OPENS["t5"])
    for how, relative in (("full", joint.relative), ("lora", False)):
        assert recipe_for(opened, "same", how)[0].relative == relative


def test_a_step_of_fine_tuning_moves_a_t5s_tensors_by_the_same_share(pools, data, tmp_path):
    opened = Suite("tiny", suite("t5"), pools / "t5", data)
    made = fw.finetune(opened, "same", out=tmp_path / "expert", steps=1, rate=0.01, progress=False)
    before, after = (dict(opened.open(at).named_parameters()) for at in (opened.base, made.path))
    shares = [(after[n] - p).abs().max().item() / p.square().mean().sqrt().item()
              for n, p in before.items()]  # fmt: skip
    assert max(shares) == pytest.approx(min(shares), rel=0.05) and max(shares) > 0


def test_tasks_and_training_agree_on_the_pooling(tmp_path, data):
    spec = suite("gpt2")
    spec.build.parameters["pooling"] = "last"
    with pytest.raises(SuiteError, match=r"another pooling[\s\S]*options\.pooling") as said:
        build(spec, tmp_path / "pool", data, progress=False)
    assert re.search(r"expected: last[\s\S]*found: +mean", str(said.value))


def test_a_t5_is_trained_by_the_loss_of_its_tasks(pools, data, monkeypatch, tmp_path):
    """Base and experts: cross-entropy of the right verbaliser's tokens and the end of text."""
    spec = suite("t5", base_epochs=1, expert_epochs=1)
    opened = Suite("tiny", spec, pools / "t5", data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(opened.base)
    asked = {name: text_task(spec, name, tokenizer) for name in WORDS}
    assert asked == opened.tasks

    seen, cls = [], type(asked["same"])
    whole = cls.loss

    def watched(task, model, batch):
        found = whole(task, model, batch)
        labels = [[*tokenizer(task.words[c], add_special_tokens=False)["input_ids"],
                   tokenizer.eos_token_id] for c in batch["labels"].tolist()]  # fmt: skip
        longest = max(map(len, labels))
        target = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in labels])
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                    labels=target).loss  # fmt: skip
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        seen.append(task.name)
        return found

    monkeypatch.setattr(cls, "loss", watched)
    build(spec, tmp_path / "seed-0", data, progress=False)
    assert sorted(seen[:2]) == ["colours", "same"]  # of 8 rows each, in batches of 8
    assert seen[2:] == ["colours"] * 8 + ["same"] * 8  # of 64 rows


def test_another_suite_has_the_same_models_write_their_answers(pools, data, tmp_path, monkeypatch):
    trained = suite("t5").model_dump(exclude_none=True)
    (tmp_path / "chosen.yaml").write_text(json.dumps(trained))
    options = {"verbalisers": None, "reference": "label", "words": ["no", "yes"],
               "max_new_tokens": 4}  # fmt: skip
    tasks = {task: {"kind": "generation", "options": options} for task in WORDS}
    said = {"suite": 1, "extends": "chosen.yaml", "models_of": "chosen.yaml", "build": None,
            "title": "written", "tasks": tasks}  # fmt: skip
    (tmp_path / "written.yaml").write_text(json.dumps(said))
    written = fw.suite(tmp_path / "written.yaml", pool=pools / "t5", data=data)
    chosen = fw.suite(tmp_path / "chosen.yaml", pool=pools / "t5", data=data)
    written.build(progress=False)  # all there: nothing is trained
    assert written.base == chosen.base
    found = written.evaluate(written.experts["colours"], "colours")
    expected = chosen.evaluate(chosen.experts["colours"], "colours")
    assert found.metric == "exact_match" and found.value >= 0.8
    answers = [("no", "yes")[label] for label in expected.columns["prediction"]]
    wrote = [text.strip() for text in found.columns["prediction"]]
    assert np.mean([a == b for a, b in zip(answers, wrote, strict=True)]) > 0.9
    monkeypatch.setenv("FUSEWRIGHT_POOLS", str(tmp_path / "pools"))
    default = fw.suite(tmp_path / "written.yaml", data=data)
    assert default.pool == fw.suite(tmp_path / "chosen.yaml", data=data).pool
    with pytest.raises(SuiteError, match=r"suite build .*written.yaml"):
        _ = default.base
    said["models_of"] = "written.yaml"
    (tmp_path / "again.yaml").write_text(json.dumps(said))
    with pytest.raises(SuiteError, match=r"trains none"):
        fw.suite(tmp_path / "again.yaml", data=data)


def test_adapters_are_those_of_peft(adapted):
    """Also where the base's matrices are transposed, as GPT-2's are."""
    peft = pytest.importorskip("peft")
    path = adapted.experts["same"]
    whole = peft.PeftModel.from_pretrained(adapted.open(adapted.base), path).merge_and_unload()
    found = adapted.open(path).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [None, "lora"])
def test_a_sweep_merges_them(opened, variant, tmp_path):
    if variant:
        pytest.importorskip("peft")
    results = fw.bench(Suite("tiny", opened.spec, opened.pool, opened.data), ["ties"],
                       out=tmp_path, variants=[variant], joint="none", limit=16,
                       progress=False)  # fmt: skip
    assert results.facts["failed"] == {}
    models = opened.at(opened.seed, variant)
    base, *experts = (models.open(p).state_dict() for p in (models.base, *models.experts.values()))
    base = {n: t.clone() for n, t in base.items()}
    module = models.open(models.base)
    module.load_state_dict({n: sum(e[n] for e in experts) / len(experts) for n in base})
    (found,) = results.of("average")
    assert found.axes.get("tuning") == ("LoRA" if variant else None)
    for task in WORDS:
        expected = models.evaluate(module, task, limit=16).columns["loss"]
        assert found.outcomes[task]["clean"].columns["loss"] == pytest.approx(expected, rel=1e-3)


def test_corrupted_texts_are_conditions_of_their_own(opened):
    results = fw.bench(opened, ["average"], joint="none", limit=12, corruptions=True,
                       progress=False)  # fmt: skip
    for cell in results.cells:
        for each in cell.outcomes.values():
            assert list(each) == ["clean", *TEXT_CORRUPTIONS]
    (found,) = results.of("average")
    for task in WORDS:
        losses = {name: tuple(o.columns["loss"]) for name, o in found.outcomes[task].items()}
        assert losses["lost_letters"] != losses["clean"] != losses["lost_words"]
    assert "inputs corrupted" in to_markdown(summarise(results, resamples=50))
    with pytest.raises(fw.FusewrightError, match="write lost_words"):
        fw.bench(opened, ["average"], corruptions=["lost_word"], progress=False)
    with pytest.raises(fw.FusewrightError, match="corrupted so"):
        fw.bench(opened, ["average"], corruptions=["contrast"], progress=False)


def test_joint_training_of_them_takes_the_experts_steps(opened):
    recipe = joint_recipe(opened, list(WORDS))
    assert recipe.steps == 2 * SMALL["expert_epochs"] * 64 // 8
    assert type(recipe.opens(opened.base)).__name__ == opened.spec.opens.model


def test_an_architecture_that_is_not_known_is_refused(data, tmp_path):
    with pytest.raises(SuiteError, match=r"gpt3[\s\S]*did you mean 'gpt2'"):
        build(suite("gpt2", architecture="gpt3"), tmp_path / "pool", data, progress=False)
    assert not (tmp_path / "pool").exists()


def test_a_t5_needs_tasks_that_are_answered_in_words(data, tmp_path):
    with pytest.raises(SuiteError, match=r"colours[\s\S]*text-to-text-classification"):
        build(suite("gpt2", architecture="t5"), tmp_path / "pool", data, progress=False)


def test_options_that_a_task_does_not_take_are_refused(data, tmp_path):
    spec = suite("t5")
    tasks = {n: t.model_copy(update={"options": {"scale": 16.0}}) for n, t in spec.tasks.items()}
    with pytest.raises(SuiteError, match=r"colours[\s\S]*verbalisers[\s\S]*scale"):
        build(spec.model_copy(update={"tasks": tasks}), tmp_path / "p", data, progress=False)


MINI = sorted(name for name, path in shipped().items()
              if name.startswith("text-mini") and read_suite(path).build is not None)  # fmt: skip


@pytest.mark.parametrize("name", MINI)
def test_the_shipped_suites_are_of_two_to_four_million_parameters(name):
    spec = read_suite(find_suite(name))
    recipe = text.read_recipe(spec)
    tokens = texts.train_tokenizer({}, recipe)
    tokens.add_tokens([f"word {n}" for n in range(recipe.vocabulary - len(tokens))])
    model = architectures.new_model(recipe, 0, tokens)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert len(spec.merged) >= 4 and len(spec.unseen) >= 2
    assert type(model).__name__ == spec.opens.model or spec.opens.model == "AutoModel"
    asked = [task.options for task in spec.tasks.values()]
    assert all(o["length"] == recipe.length for o in asked)
    assert all(o.get("scale", recipe.scale) == recipe.scale for o in asked)


def test_the_three_suites_ask_the_same_questions_of_the_same_rows():
    specs = [read_suite(find_suite(name)) for name in MINI]
    assert len(specs) == 3
    for spec in specs[1:]:
        for name, task in spec.tasks.items():
            first = specs[0].tasks["clinc150" if task.groups else name]
            assert (task.data, task.splits) == (first.data, first.splits)
            fine = sorted(n for own in (task.groups or {}).values() for n in own) or task.classes
            assert fine == first.classes

"""The builder of text pools: a tokenizer, ordinary folders, and training as evaluation reads."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tokenizers")

import pyarrow  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fusewright.bench.joint.recipe import joint_recipe  # noqa: E402
from fusewright.bench.pools import architectures, build, text, training  # noqa: E402
from fusewright.bench.pools.texts import (  # noqa: E402
    Corpus,
    TextRecipe,
    encoded,
    load_corpora,
    start_from_cooccurrence,
    staying,
    train_tokenizer,
)
from fusewright.bench.regime import check_suite  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import SuiteError, SuiteSpec  # noqa: E402
from fusewright.errors import FusewrightError, OutputError  # noqa: E402

SMALL = {
    "width": 16, "layers": 1, "vocabulary": 290, "length": 10, "base_rows": 24, "base_epochs": 2,
    "expert_epochs": 2, "batch": 8, "threads": 1, "shots": 2, "dropout": 0.2,
}  # fmt: skip
RECIPE = TextRecipe(**SMALL)
WORDS = {"colours": ("red blue", "green pink"), "numbers": ("one two", "three four"),
         "same": ("sun moon", "star sky")}  # fmt: skip
PAIRED = "same"
"""Its rows are pairs."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, words in WORDS.items():
        draw, folder = random.Random(name), root / name
        folder.mkdir()
        for split, count in (("train", 40), ("test", 12)):
            labels = [row % 2 for row in range(count)]
            columns = {key: [" ".join(draw.choices(words[y].split(), k=draw.randint(1, 5)))
                             for y in labels] for key in ("text", "text2")}  # fmt: skip
            if name != PAIRED:
                del columns["text2"]
            table = pyarrow.table({**columns, "label": labels})
            parquet.write_table(table, folder / f"{split}.parquet")
    return root


def suite(**parameters):
    tasks = {
        name: {"kind": "text-classification", "data": name, "classes": ["no", "yes"],
               "splits": {"train": "train[8:]", "validation": "train[:8]", "test": "test"},
               "options": {"pooling": "mean", "length": 10, "scale": 16.0, "normalise": True}}
        for name in WORDS
    }  # fmt: skip
    return SuiteSpec(
        title="tiny", base="base", heads="heads.safetensors", tasks=tasks,
        opens={"model": "AutoModel", "arguments": {"add_pooling_layer": False}},
        experts={name: f"experts/{name}" for name in ("colours", "same")},
        variants={"lora": {"experts": {n: f"lora/{n}" for n in ("colours", "same")}}},
        build={"builder": "text", "parameters": SMALL | parameters},
    )  # fmt: skip


BOTH = {"tunings": ["full", "lora"]}


@pytest.fixture(scope="module")
def pool(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    build(suite(**BOTH), root / "seed-0", data, seed=0, progress=False)
    return root


@pytest.fixture(scope="module")
def corpora(data):
    return load_corpora(suite().tasks, data)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_models_are_ordinary_folders_with_their_tokenizer(pool):
    root = pool / "seed-0"
    for folder in (root / "base", root / "experts" / "colours"):
        model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        given = tokenizer(["red sun"], return_tensors="pt")
        assert model(**given).last_hidden_state.shape == (*given["input_ids"].shape, 16)
    assert weights(root / "base") != weights(root / "experts" / "colours")


def test_every_task_has_a_head_and_only_those_of_the_suite_an_expert(pool):
    heads = load_file(pool / "seed-0" / "heads.safetensors")
    assert {name: tuple(head.shape) for name, head in heads.items()} == dict.fromkeys(
        WORDS, (2, 16)
    )
    assert all(torch.allclose(h.norm(dim=1), torch.ones(2)) for h in heads.values())
    assert sorted(p.name for p in (pool / "seed-0" / "experts").iterdir()) == ["colours", "same"]


def test_training_sees_what_evaluation_sees(pool, data, corpora):
    """Features of one padded table are those of the task's own batches, pairs included."""
    opened = Suite("tiny", suite(), pool, data)
    model, tokenizer = opened.open(opened.base), transformers.AutoTokenizer.from_pretrained(
        opened.base
    )
    for name in WORDS:
        rows = encoded(corpora[name], tokenizer, RECIPE, name)
        batch = next(opened.tasks[name].batches(opened.split(name, "train"), 32))
        with torch.no_grad():
            ours, theirs = rows.features(model, RECIPE), opened.tasks[name].features(model, batch)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.equal(rows.labels, batch["labels"])


def test_pairs_are_two_segments(corpora):
    tokenizer = train_tokenizer(corpora, RECIPE)
    pairs = encoded(corpora[PAIRED], tokenizer, RECIPE, PAIRED)
    single = encoded(corpora["colours"], tokenizer, RECIPE, "colours")
    assert pairs.segments.any(dim=1).all() and not single.segments.any()
    assert int(pairs.lengths.max()) <= RECIPE.length


def test_an_epoch_has_every_row_of_full_batches_once_and_alike_in_length(corpora):
    tokenizer = train_tokenizer(corpora, RECIPE)
    rows = encoded(corpora["colours"], tokenizer, RECIPE, "colours")
    rows = type(rows)(torch.arange(len(rows))[:, None], *(
        getattr(rows, name) for name in ("segments", "lengths", "labels")))  # fmt: skip
    parts = list(rows.batches(5, RECIPE, torch.Generator().manual_seed(0)))
    seen = torch.cat([part.ids[:, 0] for part in parts]).tolist()
    assert [len(part) for part in parts] == [5] * 6  # of 32 rows
    assert len(set(seen)) == 30
    spread = [int(part.lengths.max() - part.lengths.min()) for part in parts]
    assert sum(spread) <= int(rows.lengths.max() - rows.lengths.min()) + len(parts)
    again = rows.batches(5, RECIPE, torch.Generator().manual_seed(0))
    assert torch.cat([part.ids[:, 0] for part in again]).tolist() == seen


def test_the_suite_opens_and_its_regime_is_measured(pool, data):
    opened = Suite("tiny", suite(), pool, data)
    opened.check()
    regime = check_suite(opened, progress=False)
    assert list(regime.tasks) == ["colours", "same"]
    assert all(0 <= task.expert <= 1 and task.norm > 0 for task in regime.tasks.values())


def test_joint_training_takes_as_many_steps_as_the_experts(pool, data):
    recipe = joint_recipe(Suite("tiny", suite(), pool, data), ["colours", "same"])
    assert recipe.steps == 2 * 2 * (32 // 8)
    assert (recipe.batch, recipe.rate) == (8, RECIPE.expert_rate)


def test_adapters_open_over_the_base(pool, data):
    pytest.importorskip("peft")
    opened = Suite("tiny", suite(), pool, data, variant="lora")
    outcome = opened.evaluate(opened.experts["same"], "same")
    assert len(outcome) == 12
    base, expert = (
        opened.open(path).state_dict() for path in (opened.base, opened.experts["same"])
    )
    assert any(not torch.equal(base[key], expert[key]) for key in base)


def test_provenance_says_what_it_depends_on(pool, corpora):
    said = json.loads((pool / "seed-0" / "provenance.json").read_text())
    assert said["recipe"]["vocabulary"] == 290
    assert said["data"]["same"] == {
        "data": "same", "hub": None, "rows": "train[8:]", "count": 32,
        "sha256": corpora["same"].digest(), "licence": "",
    }  # fmt: skip
    assert {"tokenizer", "base", "experts/same", "lora/colours"} <= said["parts"].keys()
    assert said["versions"].keys() >= {"tokenizers", "torch", "transformers"}


@pytest.mark.parametrize("at", ["texts", "pairs", "labels"])
def test_the_digest_follows_every_column(at):
    one = Corpus(["a", "b"], ["c", "d"], torch.tensor([0, 1]))
    changed = {"texts": ["a", "x"], "pairs": ["c", "x"], "labels": torch.tensor([1, 1])}
    other = {"texts": one.texts, "pairs": one.pairs, "labels": one.labels} | {at: changed[at]}
    assert Corpus(**other).digest() != one.digest()


def test_a_killed_build_goes_on_and_gives_the_same_models(data, pool, tmp_path, monkeypatch):
    """Also with dropout: random numbers belong to the part, not to the process."""
    spec, out, fine_tune = suite(**BOTH), tmp_path / "seed-0", training.fine_tune
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fine_tune(*given)

    monkeypatch.setattr(training, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(spec, out, data, seed=0, progress=False)
    assert not (out / "provenance.json").exists()
    monkeypatch.setattr(architectures, "new_model", None)  # the base is not trained again
    monkeypatch.setattr(text, "train_tokenizer", None)
    torch.rand(7)
    build(spec, out, data, seed=0, progress=False)
    for part in ("base", "experts/colours", "experts/same"):
        assert weights(out / part) == weights(pool / "seed-0" / part)


def test_another_seed_gives_other_models_and_the_same_tokenizer(data, pool, tmp_path):
    build(suite(), tmp_path / "seed-1", data, seed=1, progress=False)
    first, second = pool / "seed-0", tmp_path / "seed-1"
    assert weights(second / "base") != weights(first / "base")
    vocabularies = [(p / "tokenizer" / "tokenizer.json").read_text() for p in (first, second)]
    assert vocabularies[0] == vocabularies[1]


def test_embeddings_start_from_what_stands_near_and_special_tokens_at_random(corpora):
    tokenizer = train_tokenizer(corpora, RECIPE)
    model = architectures.new_model(RECIPE, 0, tokenizer)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    start_from_cooccurrence(model, corpora, tokenizer, 2)
    special = torch.tensor(tokenizer.all_special_ids)
    assert torch.equal(weight[special], before[special])
    words = ["red", "blue", "green"]
    red, blue, green = weight[[tokenizer.encode(w, add_special_tokens=False)[-1] for w in words]]
    assert torch.cosine_similarity(red, blue, 0) > torch.cosine_similarity(red, green, 0) + 0.3
    assert float(weight.detach().std() / before.std()) < 2


def test_a_window_is_part_of_the_recipe(data, tmp_path, pool):
    build(suite(window=2), tmp_path / "seed-0", data, seed=0, progress=False)
    assert weights(tmp_path / "seed-0" / "base") != weights(pool / "seed-0" / "base")


def test_a_folder_of_another_recipe_is_refused(data, pool):
    with pytest.raises(OutputError, match=r"another recipe[\s\S]*vocabulary"):
        build(suite(vocabulary=300, **BOTH), pool / "seed-0", data, progress=False)


def test_parameters_of_another_kind_of_pool_are_refused(data, tmp_path):
    with pytest.raises(SuiteError, match="shift"):
        build(suite(shift=2), tmp_path / "pool", data, progress=False)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FusewrightError, match="colours"):
        build(suite(), tmp_path / "pool", tmp_path, progress=False)


def test_thinning_leaves_out_tokens_and_keeps_the_ends_and_the_order() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths, width = torch.tensor([20, 1, 2, 13] * 50), 20
    ids = torch.arange(width).repeat(len(lengths), 1)
    stay, left = staying(lengths, width, 0.3, draw)
    rows = zip(ids.gather(1, stay).tolist(), lengths.tolist(), left.tolist(), strict=True)
    for row, before, after in rows:
        kept = row[:after]
        assert kept == sorted(set(kept)) and kept[-1] == before - 1 and kept[0] == 0
    inner = lengths.clamp(min=2) - 2
    assert (lengths - left).sum() / inner.sum() == pytest.approx(0.3, abs=0.03)


def test_without_thinning_all_tokens_stay() -> None:
    lengths = torch.tensor([3, 5])
    stay, left = staying(lengths, 5, 0.0, torch.Generator())
    assert left.equal(lengths) and stay.equal(torch.arange(5).repeat(2, 1))

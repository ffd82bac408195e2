"""The builder of language pools, and the running text that it learns from."""

from __future__ import annotations

import json
import random
import shutil
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("optuna")

from fusewright.bench.corpora import files_of, is_corpus, open_corpus  # noqa: E402
from fusewright.bench.joint import train_joint  # noqa: E402
from fusewright.bench.joint.recipe import joint_recipe  # noqa: E402
from fusewright.bench.pools import build, language, language_data, language_training  # noqa: E402
from fusewright.bench.regime import check_suite  # noqa: E402
from fusewright.bench.report.summary import summarise  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import (  # noqa: E402
    SuiteError,
    SuiteSpec,
    TaskSpec,
    find_suite,
    read_suite,
)
from fusewright.bench.sweep import bench  # noqa: E402
from fusewright.bench.sweep.cells import _digests  # noqa: E402
from fusewright.errors import FusewrightWarning, OutputError, RecipeError  # noqa: E402
from fusewright.methods.routed import WEMoE  # noqa: E402
from fusewright.tasks.batching import Prepared  # noqa: E402
from fusewright.tasks.errors import DataError  # noqa: E402

SMALL = {
    "width": 16, "layers": 1, "heads": 2, "key_value_heads": 1, "hidden": 24, "vocabulary": 280,
    "length": 8, "batch": 4, "base_steps": 20, "expert_steps": 12,
}  # fmt: skip
WORDS = {"left": "red green blue", "right": "one two three", "other": "sun moon star"}


def text(words, lines=60):
    draw = random.Random(words)
    return "".join(" ".join(draw.choices(words.split(), k=6)) + "\n" for _ in range(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, words in WORDS.items():
        (root / f"{name}.txt").write_text(text(words), "utf-8")
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"sums_{split}.jsonl").write_text(lines, "utf-8")
    return root


def corpus(where, **changed):
    splits = {"train": "all[:80%]", "validation": "all[80%:90%]", "test": "all[90%:]"}
    said = {"kind": "language-modelling", "data": where, "splits": splits} | changed
    return TaskSpec(**said, options={"length": 8})


def suite(**parameters):
    tasks = {name: corpus(f"{name}.txt") for name in WORDS}
    return SuiteSpec(
        title="tiny", base="base", opens={"model": "AutoModelForCausalLM"}, tasks=tasks,
        experts={name: f"experts/{name}" for name in ("left", "right")},
        build={"builder": "language", "parameters": SMALL | parameters},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pool(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    build(suite(), root / "seed-0", data, seed=0, progress=False)
    return root


def test_running_text_has_no_corruptions(pool, data):
    with pytest.raises(RecipeError, match="cannot be corrupted"):
        bench(Suite("tiny", suite(), pool, data), ["average"], corruptions=True)


def texts_of(split):
    return list(split.rows(range(len(split)))["text"])


# Running text


def test_splits_of_a_text_are_its_lines_in_order(data):
    spec = corpus("left.txt")
    parts = [texts_of(open_corpus(spec, p, data)) for p in ("train", "validation", "test")]
    assert "".join(line for part in parts for line in part) == text(WORDS["left"])
    assert [len(part) for part in parts] == [48, 6, 6]


def test_json_lines_have_a_file_for_each_split_and_a_template(data):
    spec = corpus("sums_{split}.jsonl", columns={"text": "{question} {answer}\n"},
                  splits={"train": "train[1:3]", "test": "test"})  # fmt: skip
    assert texts_of(open_corpus(spec, "train", data)) == ["1+1? 2\n", "2+1? 3\n"]
    assert texts_of(open_corpus(spec, "test", data)) == ["0+1? 1\n", "1+1? 2\n"]


def test_a_template_that_names_no_field_is_refused(data):
    spec = corpus("sums_{split}.jsonl", columns={"text": "{reply}"}, splits={"test": "test"})
    with pytest.raises(DataError, match="reply"):
        open_corpus(spec, "test", data)


def test_the_standard_library_is_read_in_the_order_given():
    spec = corpus("python: bisect.py abc.py", splits={"train": "all"})
    root = Path(sysconfig.get_path("stdlib"))
    both = [(root / name).read_text("utf-8") for name in ("bisect.py", "abc.py")]
    assert "".join(texts_of(open_corpus(spec, "train", None))) == "".join(both)
    assert list(files_of(spec, None)) == ["bisect.py", "abc.py"]


def test_a_module_that_this_python_lacks_is_named():
    with pytest.raises(DataError, match=r"no_such_module\.py"):
        open_corpus(corpus("python: no_such_module.py"), "train", None)


def test_a_text_that_is_missing_is_named(data):
    with pytest.raises(DataError, match=r"absent\.txt"):
        open_corpus(corpus("absent.txt"), "train", data)


def test_a_slice_without_rows_is_refused(data):
    with pytest.raises(DataError, match="empty"):
        open_corpus(corpus("left.txt", splits={"test": "all[60:]"}), "test", data)


def test_files_are_known_by_their_hashes(data):
    found = files_of(corpus("left.txt"), data)
    assert found == {"left.txt": sha256((data / "left.txt").read_bytes()).hexdigest()}


def test_folders_of_data_sets_are_no_corpora():
    assert not is_corpus(corpus("text/sst2"))
    assert not is_corpus(corpus(None, hub="org/name"))


# Mixtures and crops


def test_a_mixture_favours_small_texts_by_its_exponent():
    sizes = {"long": 900, "short": 100}
    assert language_data.shares_of(sizes, 0)["short"] == pytest.approx(0.5)
    assert language_data.shares_of(sizes, 0.5)["short"] == pytest.approx(0.25)
    assert language_data.shares_of(sizes, 1)["short"] == pytest.approx(0.1)


def test_crops_are_consecutive_and_reach_both_ends():
    found = language_data.crops(torch.arange(12), 400, 8, torch.Generator().manual_seed(0))
    assert found.shape == (400, 9)
    assert bool((found.diff(dim=1) == 1).all())
    assert (int(found.min()), int(found.max())) == (0, 11)


def test_a_text_shorter_than_a_crop_is_refused():
    with pytest.raises(DataError, match="too short"):
        language_data.crops(torch.arange(8), 1, 8, torch.Generator())


def test_mixed_crops_come_as_often_as_the_shares_say():
    streams = {"a": torch.zeros(20, dtype=torch.int64), "b": torch.ones(20, dtype=torch.int64)}
    draw = torch.Generator().manual_seed(0)
    found = language_data.mixed(streams, {"a": 0.25, "b": 0.75}, 2000, 4, draw)
    assert float(found.float().mean()) == pytest.approx(0.75, abs=0.04)


def test_tokens_give_the_text_back(monkeypatch):
    monkeypatch.setattr(language_data, "PIECE", 40)
    said = text(WORDS["left"]) + "naïve — 名\n"
    tokenizer = language_data.train_tokenizer({"a": said}, 280, 0.5)
    assert tokenizer.decode(language_data.tokens_of(tokenizer, said)) == said
    assert 256 < len(tokenizer) <= 280


# The pool


def test_models_and_tokenizers_are_ordinary_folders(pool):
    base = transformers.AutoModelForCausalLM.from_pretrained(pool / "seed-0" / "base")
    expert = transformers.AutoModelForCausalLM.from_pretrained(pool / "seed-0" / "experts/left")
    assert type(base).__name__ == "LlamaForCausalLM"
    assert not torch.equal(base.model.norm.weight, expert.model.norm.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pool / "seed-0" / "experts" / "left")
    assert tokenizer.decode(tokenizer("red green")["input_ids"]) == "red green"


def test_experts_are_best_on_their_own_texts(pool, data):
    opened = Suite("tiny", suite(), pool, data)

    def score(path, task):
        return opened.evaluate(path, task).value

    for task, other in (("left", "right"), ("right", "left")):
        assert score(opened.experts[task], task) > score(opened.base, task)
        assert score(opened.experts[task], task) > score(opened.experts[other], task)


def test_provenance_says_what_was_read(pool, data):
    found = json.loads((pool / "seed-0" / "provenance.json").read_text("utf-8"))
    train = "".join(texts_of(open_corpus(corpus("left.txt"), "train", data)))
    assert found["data"]["left"]["sha256"] == sha256(train.encode()).hexdigest()
    assert found["data"]["left"]["files"] == files_of(corpus("left.txt"), data)
    assert found["data"].keys() == WORDS.keys()
    assert found["recipe"]["width"] == 16


def test_the_same_seed_gives_the_same_weights_and_another_others(pool, data, tmp_path):
    def weights(root, part):
        return (root / part / "model.safetensors").read_bytes()

    build(suite(), tmp_path / "again", data, seed=0, progress=False)
    build(suite(), tmp_path / "other", data, seed=1, progress=False)
    for part in ("base", "experts/left"):
        assert weights(pool / "seed-0", part) == weights(tmp_path / "again", part)
        assert weights(pool / "seed-0", part) != weights(tmp_path / "other", part)
    names = "tokenizer/tokenizer.json"
    assert (pool / "seed-0" / names).read_text() == (tmp_path / "other" / names).read_text()


def test_a_killed_build_goes_on_where_it_was(pool, data, tmp_path, monkeypatch):
    real, trained = language_training.fine_tune, []

    def killed(*given):
        trained.append(given)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(language_training, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        build(suite(), tmp_path / "pool", data, progress=False)
    assert not (tmp_path / "pool" / "provenance.json").exists()
    monkeypatch.setattr(language_training, "pretrain", None)  # the base is there already
    build(suite(), tmp_path / "pool", data, progress=False)
    assert len(trained) == 3
    for part in ("base", "experts/left", "experts/right"):
        name = Path(part) / "model.safetensors"
        assert (tmp_path / "pool" / name).read_bytes() == (pool / "seed-0" / name).read_bytes()


def test_another_recipe_in_the_same_folder_is_refused(pool, data):
    with pytest.raises(OutputError, match="another recipe"):
        build(suite(expert_steps=2), pool / "seed-0", data, progress=False)


SUMS = corpus("sums_{split}.jsonl", columns={"text": "{question} {answer}\n"},
              splits={"train": "train", "test": "test"})  # fmt: skip


def of_sums(template=None, lora_rank=8, **changed):
    """The suite with a text of rows, which a template may write otherwise."""
    columns = {} if template is None else {"columns": {"text": template}}
    tasks = {**suite().tasks, "other": SUMS.model_copy(update=columns)}
    made = suite(base_steps=0, expert_steps=1, lora_rank=lora_rank)
    return made.model_copy(update={"tasks": tasks} | changed)


@pytest.fixture
def sums(data, tmp_path):
    build(of_sums(), tmp_path / "sums", data, progress=False)
    return tmp_path / "sums"


def test_a_pool_is_not_taken_for_one_of_another_template(sums, data):
    build(of_sums(), sums, data, progress=False)
    with pytest.raises(OutputError, match="other training data"):
        build(of_sums("{question}{answer}"), sums, data, progress=False)


def test_a_killed_build_is_not_continued_with_another_template(sums, data):
    (sums / "provenance.json").unlink()
    with pytest.raises(OutputError, match="other training data"):
        build(of_sums("{question}{answer}"), sums, data, progress=False)


def test_a_template_is_part_of_the_names_of_pools_and_cells():
    other = of_sums("{question}{answer}")
    assert other.pool_digest() != of_sums().pool_digest()
    assert other.digest() != of_sums().digest()


def test_what_is_not_trained_on_is_no_part_of_a_pools_name():
    def held(template):
        changed = {"splits": {"test": "test"}, "columns": {"text": template}}
        task = SUMS.model_copy(update=changed)
        return of_sums(tasks={**suite().tasks, "held": task})

    one, two = held("{question}"), held("{answer}")
    assert one.pool_digest() == two.pool_digest() and one.digest() != two.digest()


def test_adapters_are_added_to_a_pool_and_open_over_its_base(pool, data, tmp_path):
    pytest.importorskip("peft")
    shutil.copytree(pool, tmp_path / "pool")
    lora = {"lora": {"experts": {n: f"lora/{n}" for n in ("left", "right")}}}
    spec = SuiteSpec(**suite().model_dump() | {"variants": lora})
    opened = Suite("tiny", spec, tmp_path / "pool", data, variant="lora")
    opened.build(progress=False)
    for part in ("base", "experts/left"):
        one, other = (root / "seed-0" / part / "model.safetensors"
                      for root in (pool, tmp_path / "pool"))  # fmt: skip
        assert one.read_bytes() == other.read_bytes()
    said = json.loads((opened.root / "provenance.json").read_text("utf-8"))
    assert said["parts"].keys() >= {"experts/left", "lora/left", "lora/right"}
    assert (opened.experts["left"] / "adapter_model.safetensors").is_file()
    for task, other in (("left", "right"), ("right", "left")):
        scores = {name: opened.evaluate(opened.experts[name], task).value for name in (task, other)}
        assert scores[task] > max(scores[other], opened.evaluate(opened.base, task).value)
    with pytest.raises(SuiteError, match="adapters"):
        joint_recipe(opened, ["left"])


def test_an_unknown_parameter_names_the_nearest(data, tmp_path):
    with pytest.raises(SuiteError, match="did you mean 'expert_steps'"):
        build(suite(expert_step=2), tmp_path, data, progress=False)


def test_losses_are_told_ten_times_however_few_the_steps(pool):
    model = language.open_model(pool / "seed-0" / "base")
    recipe = language_training.LanguageRecipe(**SMALL | {"expert_steps": 3})
    said = []
    draw = torch.Generator().manual_seed(0)
    loss = language_training.fine_tune(model, torch.arange(40), recipe, 1e-3, draw, said.append)
    assert len(said) == language_training.REPORTS
    assert said[-1] == f"loss {loss:.3f}"


# The suite


def test_lm_mini_names_a_recipe_and_held_out_text():
    spec = read_suite(find_suite("lm-mini"))
    language.read_recipe(spec)
    assert len(spec.merged) == 7
    assert spec.unseen == ["fiction", "speeches", "humaneval"]
    assert "train" not in spec.tasks["humaneval"].splits
    assert all(is_corpus(task) for task in spec.tasks.values())


def test_lm_mini_prompted_asks_lm_minis_models_with_a_quarter_of_each_window_given():
    plain, prompted = (read_suite(find_suite(f"lm-mini{end}")) for end in ("", "-prompted"))
    assert prompted.build is None and prompted.models_of == "lm-mini"
    same = {"title", "about", "build", "models_of", "tasks"}
    assert prompted.model_dump(exclude=same) == plain.model_dump(exclude=same)
    for name, task in prompted.tasks.items():
        options = plain.tasks[name].options
        assert task == plain.tasks[name].model_copy(
            update={"options": options | {"prompt": options["length"] // 4}})  # fmt: skip
    assert prompted.digest() != plain.digest()


def test_lm_mini_reads_modules_that_every_python_has():
    split = open_corpus(read_suite(find_suite("lm-mini")).tasks["python"], "test", None)
    assert len(split) > 500


def test_a_sweep_ranks_by_perplexity_and_normalises_by_the_experts(pool, data, tmp_path):
    found = bench(Suite("tiny", suite(), pool, data), ["average", "ties"], tune=2,
                  out=tmp_path / "results", progress=False)  # fmt: skip
    assert not found.facts["failed"]
    (section,) = summarise(found, resamples=50).sections
    lines = {line.row: line for line in section.lines}
    own, base, average = (lines[row] for row in ("own expert", "base", "average"))
    assert own.normalised.value == pytest.approx(100)
    assert base.quality < average.quality < own.quality
    assert base.mean.value > average.mean.value > own.mean.value > 1  # perplexities
    ratio = own.tasks["left"].value / base.tasks["left"].value
    assert base.shares["left"] == pytest.approx(100 * ratio)
    assert base.worst[1] == min(base.shares.values())
    tuned = lines["ties, tuned"]
    assert tuned.quality >= lines["ties"].quality - 5


def test_a_sweep_notes_what_sees_the_tokens_that_it_is_scored_on(pool, data, tmp_path):
    opened = Suite("tiny", suite(), pool, data)
    with pytest.warns(FusewrightWarning, match="no likelihoods"):
        found = bench(opened, [WEMoE(steps=0)], out=tmp_path, limit=2, progress=False)
    assert not found.facts["failed"]
    notes = {cell.row: cell.note for cell in found.cells}
    assert "no likelihoods" in notes["wemoe"] and "no likelihoods" not in notes["average"]


def test_joint_training_takes_crops_of_the_experts_streams(pool, data):
    opened = Suite("tiny", suite(), pool, data)
    recipe = joint_recipe(opened, opened.spec.merged)
    assert (recipe.steps, recipe.batch) == (2 * SMALL["expert_steps"], SMALL["batch"])
    train = "".join(texts_of(opened.split("left", "train")))
    stream = language_data.tokens_of(language.open_tokenizer(opened.base), train)
    places = recipe.reads("left")
    assert len(places) == len(stream) - SMALL["length"]
    (batch,) = opened.tasks["left"].batches(places, len(places))
    firsts, lasts = batch["input_ids"][:, 0], batch["input_ids"][:, -1]
    assert torch.equal(firsts, stream[: len(places)])
    assert torch.equal(lasts, stream[SMALL["length"] :])
    assert bool(batch["attention_mask"].all())


def test_joint_training_descends_as_the_experts_do(pool, data):
    opened = Suite("tiny", suite(), pool, data)
    recipe = joint_recipe(opened, ["left"])
    stream = torch.arange(4).repeat(1, 3)[0][: SMALL["length"] + 1]  # one crop: nothing is drawn
    alone = language.open_model(opened.base)
    small = language_training.LanguageRecipe(**SMALL, bfloat16=False)
    language_training.fine_tune(alone, stream, small, 1e-3, torch.Generator(), lambda said: None)
    crop = language_data.all_crops(stream, SMALL["length"]).numpy()
    joint = train_joint(
        recipe.opens(opened.base), [opened.tasks["left"]],
        {"left": Prepared(crop, "left", "train")}, steps=recipe.steps, batch_size=recipe.batch,
        lr=recipe.rate, seed=0, betas=recipe.betas,
    )  # fmt: skip
    for one, other in zip(alone.parameters(), joint.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_language_pool_is_trained_jointly(pool, data, tmp_path):
    pytest.importorskip("torchjd")
    opened = Suite("tiny", suite(), pool, data)
    found = bench(opened, ["average"], joint="sum,pcgrad", out=tmp_path, progress=False)
    assert not found.facts["failed"] and not found.facts["left out"]
    (base,) = found.of("base")
    for row in ("joint training, sum", "joint training, pcgrad"):
        (cell,) = found.of(row)
        assert cell.note == "24 steps of 4 items, as all experts together"
        for task in ("left", "right"):
            assert cell.outcomes[task]["clean"].value > base.outcomes[task]["clean"].value


def test_a_changed_text_is_measured_again(pool, data, tmp_path):
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    opened = Suite("tiny", suite(), pool, changed)
    before = _digests(opened)
    assert _digests(opened) == before
    (changed / "left.txt").write_text(text(WORDS["left"]) + "red\n", "utf-8")
    assert _digests(opened) != before


def test_a_sweep_takes_long_lists_of_modules(pool, data):
    many = "python: " + " ".join(["abc.py"] * 60)
    spec = suite().model_copy(update={"tasks": suite().tasks | {"python": corpus(many)}})
    assert _digests(Suite("tiny", spec, pool, data))["data"]


def test_the_regime_of_a_language_pool_is_in_shares_of_the_experts(pool, data):
    found = check_suite(Suite("tiny", suite(), pool, data), progress=False)
    assert found.mean("expert") == 1
    assert found.gap > 0
    assert all(-1 <= task.rank <= 1 and min(task.entropy) > 0 for task in found.tasks.values())
    assert found.unseen["other"][0] == 1

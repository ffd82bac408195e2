"""Experts from the command: whole folders that others open, the same after a kill, or a refusal."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest

for _needed in ("sklearn", "transformers", "peft", "torchjd", "tokenizers"):
    pytest.importorskip(_needed)

import peft  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fusewright as fw  # noqa: E402
from fusewright.bench.exchange import Exchange  # noqa: E402
from fusewright.bench.finetuning import HOWS, descent, models, recipe  # noqa: E402
from fusewright.bench.finetuning.recipe import recipe_for  # noqa: E402
from fusewright.bench.suite import Suite  # noqa: E402
from fusewright.bench.suite_file import SuiteError, SuiteSpec  # noqa: E402
from fusewright.errors import FusewrightWarning, NumericError, OutputError, RecipeError  # noqa: E402
from fusewright.modules.linearise import linearise  # noqa: E402
from fusewright.weights._fs import FileSystem  # noqa: E402
from tiny_suite import PARAMETERS, built  # noqa: E402

QUICK = {"steps": 4, "limit": 20, "progress": False}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return built(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def experts(suite, tmp_path_factory):
    """One of each kind, of two tasks."""
    root = tmp_path_factory.mktemp("experts")
    return {
        (how, task): fw.finetune(suite, task, how=how, out=root / how / task, rate=5e-3, **QUICK)
        for how in HOWS for task in ("parity", "digit")
    }  # fmt: skip


def text_suite(folder, kind, options, model="GPT2LMHeadModel"):
    """A suite of one task on texts, whose base and expert are one tiny model."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "yes", "no", *"abcdef"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>"
    )
    ends = {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2,
                                                           n_positions=64, **ends),
        "T5ForConditionalGeneration": lambda: transformers.T5Config(
            d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0, **ends
        ),
    }[model]()  # fmt: skip
    torch.manual_seed(0)
    base = folder / "base"
    getattr(transformers, model)(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = folder / "data" / "t"
    data.mkdir(parents=True)
    for part, count in (("train", 2), ("test", 3)):
        rows = [{"text": "a b c d e " * 30, "text2": "yes", "label": n % 2} for n in range(count)]
        (data / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {"kind": kind, "data": "t", "options": options, "splits": {
        "train": "train", "validation": "test", "test": "test"}}  # fmt: skip
    if kind == "text-to-text-classification":
        task["classes"] = ["no", "yes"]
    spec = SuiteSpec.model_validate({
        "suite": 1, "title": "texts", "opens": {"model": model}, "base": str(base),
        "experts": {"t": str(base)}, "tasks": {"t": task},
    })  # fmt: skip
    return Suite("texts", spec, folder / "pool", folder / "data")


def state(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def scores(suite, model, task="parity"):
    return suite.evaluate(model, task, "validation", QUICK["limit"]).columns["loss"]


@pytest.mark.parametrize("how", ["full", "linear"])
def test_whole_experts_open_with_transformers_alone(suite, experts, how):
    found = experts[how, "parity"]
    model = transformers.ViTModel.from_pretrained(found.path, add_pooling_layer=False)
    base = state(suite.base)
    assert state(found.path).keys() == base.keys()
    assert any(not torch.equal(t, base[n]) for n, t in state(found.path).items())
    assert sum(p.numel() for p in model.parameters()) == found.trained


@pytest.mark.parametrize("how", ["lora", "l-lora"])
def test_adapters_open_with_peft_and_answer_as_the_merge_does(suite, experts, how):
    path = experts[how, "parity"].path
    adapted = peft.PeftModel.from_pretrained(suite.open(suite.base), path).eval()
    merged = suite.open(path)
    images = torch.rand(2, 1, 8, 8)
    answers = [m(pixel_values=images).last_hidden_state for m in (adapted, merged)]
    torch.testing.assert_close(*answers)
    base = suite.open(suite.base)(pixel_values=images).last_hidden_state
    assert not torch.allclose(answers[0], base)


def test_experts_of_all_kinds_merge(suite, experts):
    paths = {how.replace("-", ""): e.path for (how, task), e in experts.items() if task == "digit"}
    merged = fw.merge("task_arithmetic", base=suite.base, experts=paths)
    assert merged.state_dict().keys() == state(suite.base).keys()


def test_scores_are_those_of_what_is_saved(suite, experts):
    for how in ("full", "lora", "l-lora"):
        found = experts[how, "parity"]
        again = suite.evaluate(found.path, "parity", "validation", QUICK["limit"])
        assert found.after == pytest.approx(again.shown)
        assert found.metric == "accuracy" and found.as_weights is None
    before = suite.evaluate(suite.base, "parity", "validation", QUICK["limit"]).shown
    assert {e.before for (_, task), e in experts.items() if task == "parity"} == {before}


def test_a_linear_expert_is_judged_in_the_tangent_space_and_as_weights(suite, experts):
    found = experts["linear", "parity"]
    start = dict(suite.open(suite.base).named_parameters())
    tangent = linearise(suite.open(found.path), start=start)
    measure = suite.evaluate
    assert found.after == measure(tangent, "parity", "validation", QUICK["limit"]).shown
    assert found.as_weights == measure(found.path, "parity", "validation", QUICK["limit"]).shown
    assert not torch.allclose(*(torch.tensor(scores(suite, m)) for m in (tangent, found.path)))
    assert json.loads((found.path / "finetune.json").read_text())["linearised"] is True


def test_linear_experts_add_in_function_space(suite, experts):
    start = dict(suite.open(suite.base).named_parameters())
    images = torch.rand(2, 1, 8, 8)

    def answer(model):
        return linearise(model, start=start)(pixel_values=images).last_hidden_state

    paths = [experts["linear", task].path for task in ("parity", "digit")]
    merged = fw.merge({"task_arithmetic": {"scale": 1.0}}, base=suite.base, experts=paths)
    module = suite.open(suite.base)
    both = Exchange(module, suite.base, suite.spec.opens).filled(merged.state_dict())
    one, two, zero = (answer(suite.open(p)) for p in (*paths, suite.base))
    torch.testing.assert_close(answer(both) - zero, (one - zero) + (two - zero))


def test_adapters_of_all_tasks_and_seeds_start_alike_and_linearised_ones_keep_it(
    suite, experts, tmp_path
):
    other = fw.finetune(suite, "digit", how="l-lora", out=tmp_path / "x", seed=9, rate=5e-3,
                        **QUICK)  # fmt: skip
    found = [state(p) for p in (experts["l-lora", "parity"].path, other.path,
                                experts["l-lora", "digit"].path)]  # fmt: skip
    for name, tensor in found[0].items():
        same = [torch.equal(tensor, each[name]) for each in found[1:]]
        assert same == ([True, True] if "lora_A" in name else [False, False])
    moved = state(experts["lora", "parity"].path)
    first = next(name for name in moved if "lora_A" in name)
    assert not torch.equal(moved[first], found[0][first])
    assert experts["l-lora", "parity"].trained < experts["lora", "parity"].trained


def test_merged_linearised_adapters_keep_their_rank(suite, tmp_path):
    def ranks(how):
        paths = [fw.finetune(suite, task, how=how, out=tmp_path / how / task, rank=2, rate=5e-2,
                             **QUICK).path for task in ("parity", "digit")]  # fmt: skip
        merged = fw.merge({"task_arithmetic": {"scale": 1.0}}, base=suite.base, experts=paths)
        base = state(suite.base)
        changes = (t.double() - base[n].double() for n, t in merged.state_dict().items())
        return max(int(torch.linalg.matrix_rank(c, rtol=1e-4)) for c in changes if c.dim() == 2)

    assert ranks("l-lora") == 2 < ranks("lora") <= 4


@pytest.mark.parametrize("how", HOWS)
def test_a_killed_run_goes_on_to_the_same_end(suite, tmp_path, monkeypatch, how):
    settings = {"how": how, "rate": 5e-3, **QUICK, "steps": 6, "batch": 50}
    if how in recipe.ADAPTERS:
        settings["dropout"] = 0.3
    whole = fw.finetune(suite, "parity", out=tmp_path / "whole", **settings)
    calls, asked = [], descent.task_loss

    def loss(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return asked(*args)

    monkeypatch.setattr(descent, "task_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        fw.finetune(suite, "parity", out=tmp_path / "killed", **settings)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(OutputError, match="rate"):
        fw.finetune(suite, "parity", out=tmp_path / "killed", **settings | {"rate": 1e-3})
    resumed = fw.finetune(suite, "parity", out=tmp_path / "killed", **settings)
    assert len(calls) == 4 + 3  # three steps were kept
    assert resumed.losses == whole.losses and resumed.after == whole.after
    one, two = (state(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_everything_follows_from_the_seed(suite, tmp_path):
    settings = {"rate": 5e-3, **QUICK}
    one, two, other = (
        fw.finetune(suite, "parity", out=tmp_path / name, seed=seed, **settings)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one.losses == two.losses != other.losses
    assert all(torch.equal(t, state(two.path)[n]) for n, t in state(one.path).items())


def test_a_finished_run_is_not_made_again(suite, experts, monkeypatch):
    monkeypatch.setattr(models, "expert_of", None)
    found = experts["full", "digit"]
    again = fw.finetune(suite, "digit", out=found.path, rate=5e-3, **QUICK)
    assert again == found


def test_what_an_expert_follows_from_is_beside_it(suite, experts):
    said = json.loads((experts["l-lora", "parity"].path / "finetune.json").read_text())
    assert said["recipe"]["how"] == "l-lora" and said["recipe"]["rank"] == 16
    assert said["task"] == "parity" and said["base digest"] and said["head"]
    assert said["versions"]["torch"] == torch.__version__
    assert said["targets"] and said["result"]["after"] == experts["l-lora", "parity"].after


def test_defaults_are_the_suites_own(suite):
    found, _ = recipe_for(suite, "parity", "full")
    assert (found.steps, found.batch) == (PARAMETERS["expert_steps"], PARAMETERS["batch"])
    assert found.rate == 5e-4 and found.seed == suite.seed  # the recipe's own default rate
    adapter, _ = recipe_for(suite, "inverted", "lora", epochs=2)  # a task without an expert
    rows = len(suite.split("inverted", "train"))
    assert adapter.rate > found.rate and adapter.steps == 2 * (rows // PARAMETERS["batch"])


def test_a_suite_of_public_models_has_defaults_too(suite):
    spec = suite.spec.model_copy(update={"build": None})
    found, ways = recipe_for(Suite("public", spec, suite.root), "parity", "lora")
    assert (found.steps, found.batch, found.rate) == (recipe.STEPS, recipe.BATCH,
                                                      recipe.ADAPTER_RATE)  # fmt: skip
    assert ways.augment is None


def test_a_base_in_sixteen_bits_is_trained_in_thirty_two(suite, tmp_path):
    model = suite.open(suite.base).to(torch.bfloat16)
    found = models.expert_of(model, recipe_for(suite, "parity", "full")[0])
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    found.save(tmp_path, suite.base)
    assert {t.dtype for t in state(tmp_path).values()} == {torch.bfloat16}


def test_an_epoch_of_running_text_is_its_windows(tmp_path):
    """Two long texts are no two items."""
    suite = text_suite(tmp_path, "language-modelling", {"length": 8, "documents": True})
    windows = len(suite.tasks["t"].ready(suite.split("t", "train")))
    assert windows > 30
    found, _ = recipe_for(suite, "t", "full", epochs=2, batch=4)
    assert (found.batch, found.steps) == (4, 2 * (windows // 4))


SEVERAL = {"verbalisers": ["a b", "a c"], "template": "{text} d", "length": 8}


@pytest.mark.parametrize("model", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.filterwarnings("ignore:the loss rose")
def test_a_linear_expert_that_writes_is_asked_for_words_in_the_tangent_space(tmp_path, model):
    suite = text_suite(tmp_path, "text-to-text-classification", SEVERAL, model)
    found = fw.finetune(suite, "t", how="linear", out=tmp_path / "x", rate=0.1, **QUICK)
    start = dict(suite.open(suite.base).named_parameters())
    tangent, task = linearise(suite.open(found.path), start=start), suite.tasks["t"]
    with torch.no_grad():
        for row in task.batches(suite.split("t", "test"), 1):
            tokens = 3  # of two words and the end of text, whose mean is the loss
            wanted = [-tokens * task.loss(tangent, {**row, "labels": torch.tensor([c])})
                      for c in (0, 1)]  # fmt: skip
            torch.testing.assert_close(task.logits(tangent, row)[0], torch.stack(wanted))
            ordinary = task.logits(suite.open(found.path), row)[0]
            assert not torch.allclose(ordinary, torch.stack(wanted), atol=1e-2)


def test_a_buffer_that_masks_attention_is_no_weight_that_diverged(suite, tmp_path):
    class Masked(torch.nn.Linear):
        def __init__(self):
            super().__init__(16, 10)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1), persistent=False)

        def forward(self, batch):
            return super().forward(batch["images"].flatten(1)[:, :16])

    class Squares:
        name = "digit"

        def __init__(self, breaks=False):
            self.breaks = breaks

        def batches(self, split, size, seed):
            yield {"images": torch.rand(size, 1, 4, 4), "items": torch.arange(size)}

        def loss(self, model, batch):
            found = model(batch).square().mean()
            if self.breaks:
                with torch.no_grad():
                    model.bias[0] = torch.nan
            return found

    made = replace(recipe_for(suite, "digit", "full")[0], steps=1, batch=4)

    def trained(task, model):
        checkpoint = descent.Checkpoint(tmp_path / str(task.breaks))
        return descent.descend(model, task, range(8), made, None, checkpoint, lambda loss: None)

    model = Masked()
    assert len(trained(Squares(), model)) == 1 and torch.equal(model.mask, Masked().mask)
    with pytest.raises(NumericError, match=r"no longer finite[\s\S]*bias, step 1"):
        trained(Squares(breaks=True), Masked())


# --- Refusals -----------------------------------------------------------------------------------


def refused(suite, out, error, match, task="parity", **settings):
    with pytest.raises(error, match=match) as found:
        fw.finetune(suite, task, out=out, **{**QUICK, **settings})
    assert not out.exists()
    return str(found.value)


def test_misspelt_names_are_answered_with_the_nearest(suite, tmp_path):
    refused(suite, tmp_path / "x", SuiteError, "did you mean 'parity'", task="parrity")
    refused(suite, tmp_path / "x", RecipeError, "did you mean 'l-lora'", how="llora")


def test_targets_that_match_nothing_name_near_modules(suite, tmp_path):
    known = next(n for n, m in suite.open(suite.base).named_modules()
                 if isinstance(m, torch.nn.Linear))  # fmt: skip
    leaf = known.rsplit(".", 1)[-1]
    said = refused(suite, tmp_path / "x", RecipeError, "match no module", how="lora",
                   targets=known[:-1])  # fmt: skip
    assert f".*{leaf}" in said
    refused(suite, tmp_path / "x", RecipeError, "no regular expression", how="lora", targets="(")


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"how": "lora", "rank": 0},
     {"how": "lora", "dropout": 1.0}, {"dropout": 0.1}, {"targets": "x"}, {"decay": -1.0},
     {"steps": 2, "epochs": 1}, {"steps": None, "epochs": -1}, {"batch": 0}, {"threads": 0},
     {"steps": None, "epochs": 1, "batch": 0}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(suite, tmp_path, settings):
    refused(suite, tmp_path / "x", RecipeError, ".", **settings)


@pytest.mark.parametrize("how", ["full", "linear"])
@pytest.mark.parametrize(
    "said", [{"rank": 16}, {"alpha": 32.0}, {"dropout": 0.0}, {"targets": ".*"}]
)
def test_what_is_said_of_adapters_is_refused_where_there_are_none(suite, tmp_path, how, said):
    (name,) = said
    refused(suite, tmp_path / "x", RecipeError, rf"{name}: of adapters[\s\S]*--how lora", how=how,
            **said)  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, right, error", [
    ({"how": "lora", "targets": "nothing"}, {"how": "lora"}, RecipeError),
    ({"rate": 1e30}, {"rate": 1e-4}, NumericError),
    ({"rate": 1e30, "steps": 40}, {"rate": 1e-4}, NumericError),
])  # fmt: skip
def test_after_a_refusal_the_corrected_command_runs(suite, tmp_path, wrong, right, error):
    refused(suite, tmp_path / "x", error, ".", **wrong)
    assert not list(tmp_path.iterdir())
    assert fw.finetune(suite, "parity", out=tmp_path / "x", **{**QUICK, **right}).path.is_dir()


def test_a_run_that_ends_at_no_number_leaves_its_place_to_another(suite, tmp_path, monkeypatch):
    """It would end there again: a smaller rate is another run, in the same place."""
    plain, asked = descent.task_loss, []

    def loss(*given):
        asked.append(given[3])
        if len(asked) == 3:
            raise NumericError("the loss is not finite", fix="lower the learning rate")
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(descent, "task_loss", loss)
        refused(suite, tmp_path / "x", NumericError, "not finite")
    assert asked == [1, 2, 3] and not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_its_first_checkpoint_claims_nothing(suite, tmp_path):
    from fusewright.bench.finetuning import place

    task, (made, _) = "parity", recipe_for(suite, "parity", "full")
    folder = tmp_path / ".x.finetune"
    folder.mkdir()
    claim = place.claim_of(suite, task, made, None)
    (folder / "claim.json").write_text(json.dumps(claim))
    (folder / "lock").write_text("")
    assert fw.finetune(suite, task, out=tmp_path / "x", rate=1e-4, **QUICK).path.is_dir()
    assert not folder.exists()


def test_another_runs_checkpoint_is_kept(suite, tmp_path, monkeypatch):
    class Killed(KeyboardInterrupt):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(models.Expert, "save", killed)
        with pytest.raises(Killed):
            fw.finetune(suite, "parity", out=tmp_path / "x", **QUICK)
    (kept,) = tmp_path.glob(".x.finetune/checkpoint.pt")
    before = kept.read_bytes()
    refused(suite, tmp_path / "x", OutputError, "holds another run", rate=1e-4)
    assert kept.read_bytes() == before
    kept.write_bytes(before[:-9])
    said = refused(suite, tmp_path / "x", OutputError, "damaged")
    assert f"rm '{kept}'" in said
    kept.unlink()
    assert fw.finetune(suite, "parity", out=tmp_path / "x", **QUICK).path.is_dir()


@pytest.mark.parametrize("how", ["full", "l-lora"])
def test_a_rate_that_diverges_is_an_error(suite, tmp_path, how):
    refused(suite, tmp_path / "x", NumericError, "lower the learning rate", how=how, rate=1e30)


def test_training_that_raised_the_loss_is_doubted(suite, tmp_path):
    with pytest.warns(FusewrightWarning, match="the loss rose"):
        fw.finetune(suite, "parity", out=tmp_path / "x", rate=3.0, **QUICK)


def test_another_run_in_the_folder_is_kept(suite, experts, tmp_path):
    path = experts["full", "digit"].path
    before = (path / "finetune.json").read_bytes()
    with pytest.raises(OutputError, match=r"rate 0\.1"):
        fw.finetune(suite, "digit", out=path, rate=0.1, **QUICK)
    assert (path / "finetune.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="no expert"):
        fw.finetune(suite, "digit", out=tmp_path / "mine", **QUICK)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_head_of_other_classes_is_refused(suite, tmp_path):
    spec = suite.spec.model_copy(update={"tasks": {
        **suite.spec.tasks, "parity": suite.spec.tasks["parity"].model_copy(update={"classes": 7}),
    }})  # fmt: skip
    other = Suite("other", spec, suite.pool)
    refused(other, tmp_path / "x", SuiteError, "other classes")


def test_a_task_without_training_rows_is_refused(suite, tmp_path):
    task = suite.spec.tasks["parity"].model_copy(
        update={"kind": "image-classification", "data": "nowhere", "splits": {"test": "test"}}
    )
    spec = suite.spec.model_copy(update={"tasks": {**suite.spec.tasks, "parity": task}})
    refused(Suite("other", spec, suite.pool), tmp_path / "x", SuiteError, "no train split")


@pytest.mark.parametrize("file", ["checkpoint", "adapter"])
def test_a_full_disk_is_a_refusal_after_which_the_run_goes_on(suite, tmp_path, monkeypatch, file):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if file == "adapter":
            patch.setattr(peft.PeftModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(full))
        else:
            patch.setattr(FileSystem, "append", lambda *_: (_ for _ in ()).throw(full))
        refused(suite, tmp_path / "x", OutputError, "the disk is full", how="lora")
    assert fw.finetune(suite, "parity", how="lora", out=tmp_path / "x", **QUICK).path.is_dir()


def test_two_runs_do_not_share_a_folder(suite, tmp_path):
    from fusewright.weights.lock import FolderLock

    lock = FolderLock.acquire(tmp_path / ".x.finetune")
    try:
        refused(suite, tmp_path / "x", OutputError, "Another run")
    finally:
        lock.release()


def test_the_tangent_space_is_refused_where_texts_are_written(tmp_path):
    suite = text_suite(tmp_path, "generation", {"length": 8})
    refused(suite, tmp_path / "x", RecipeError, r"writes no texts[\s\S]*l-lora", "t", how="linear")


def test_other_texts_are_another_run(tmp_path):
    suite = text_suite(tmp_path, "language-modelling", {"length": 8})
    (tmp_path / "data" / "t" / "train.jsonl").unlink()
    file = tmp_path / "data" / "t" / "train.txt"
    file.write_text("a b c d e\n" * 9)
    fw.finetune(suite, "t", out=tmp_path / "x", rate=1e-3, **QUICK)
    file.write_text("f f f f f\n" * 9)
    with pytest.raises(OutputError, match=r"another run[\s\S]*data"):
        fw.finetune(suite, "t", out=tmp_path / "x", rate=1e-3, **QUICK)


@pytest.mark.parametrize("model, targets, used", [
    ("GPT2LMHeadModel", r".*\.(wte|wpe)", "transformer.wte.weight is lm_head.weight"),
    ("GPT2LMHeadModel", "lm_head", "transformer.wte.weight is lm_head.weight"),
    ("T5ForConditionalGeneration", "shared", "shared.weight is encoder.embed_tokens.weight"),
])  # fmt: skip
def test_an_adapter_of_a_tensor_with_several_uses_is_refused(tmp_path, model, targets, used):
    """It was trained on one of them, and a merge would change all."""
    kind = {"G": "language-modelling", "T": "text-to-text-classification"}[model[0]]
    options = {"length": 8} if model[0] == "G" else SEVERAL
    suite = text_suite(tmp_path, kind, options, model)
    said = refused(suite, tmp_path / "x", RecipeError, "several", "t", how="lora", targets=targets)
    assert used in said
    every = models.targeted(suite.open(suite.base), None)
    assert every and not {"lm_head", "shared", "transformer.wte"} & {*every}

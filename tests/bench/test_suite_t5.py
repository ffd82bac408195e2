"""A suite of public Flan-T5 checkpoints, on tiny models of the same class in the same layout; and
its tasks on a GPT-2."""

from __future__ import annotations

import pytest
import torch
import yaml

import fusewright as fw
from fusewright.bench.suite_file import find_suite

transformers = pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
tokenizers = pytest.importorskip("tokenizers")

TASKS = {"cola": ("sentence",), "rte": ("sentence1", "sentence2")}


def tiny_gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))  # fmt: skip


def tiny_t5():
    config = transformers.T5Config(
        vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def models(folder, make):
    torch.manual_seed(0)
    base = make()
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for text in ("acceptable", "unacceptable", "yes", "no", "a", "b", "c"):
        words[text] = len(words)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    base.save_pretrained(folder / "flan-t5-base")
    tokenizer.save_pretrained(folder / "flan-t5-base")
    for number, task in enumerate(TASKS):
        draw = torch.Generator().manual_seed(number)
        expert = type(base).from_pretrained(folder / "flan-t5-base")
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        expert.save_pretrained(folder / f"flan-t5-base_glue-{task}")


def opened(folder, make):
    import pyarrow.parquet as pq

    models(folder / "pool", make)
    fields = yaml.safe_load(find_suite("flan-t5-base-glue").read_text("utf-8"))
    del fields["variants"]
    fields["opens"] = {"model": type(make()).__name__}
    for key in ("tasks", "experts"):
        fields[key] = {name: fields[key][name] for name in TASKS}
    for task, columns in TASKS.items():
        fields["tasks"][task]["splits"]["validation"] = "train"
        at = folder / "data" / "glue" / task
        at.mkdir(parents=True)
        for part in ("train", "validation"):
            rows = {name: ["a b", "c", "b a c"] * 3 for name in columns}
            pq.write_table(pa.table(rows | {"label": [0, 1, 1] * 3}), at / f"{part}.parquet")
        fields["tasks"][task]["classes"] = ["no", "yes"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return fw.suite(folder / "tiny.yaml", pool=folder / "pool", data=folder / "data")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("t5"), tiny_t5)


def test_the_prompt_and_the_words_are_those_of_the_experts(suite):
    task = suite.tasks["rte"]
    assert task.words == ("yes", "no")
    assert task.template.format(text="A", text2="B") == (
        "Does the text: 'A' entail that 'B' is true? Provide 'yes' or 'no'."
    )


def test_a_sweep_merges_text_to_text_models(suite, tmp_path):
    results = fw.bench(suite, ["ties"], out=tmp_path, progress=False)
    assert results.facts["failed"] == {}
    experts = [suite.open(suite.experts[task]).state_dict() for task in TASKS]
    module = suite.open(suite.base)
    module.load_state_dict({n: (experts[0][n] + experts[1][n]) / 2 for n in experts[0]})
    (found,) = results.of("average")
    for task in TASKS:
        expected = suite.evaluate(module, task).columns["loss"]
        assert found.outcomes[task]["clean"].columns["loss"] == pytest.approx(expected, rel=1e-4)


def test_an_adapter_opens_over_its_base(suite, tmp_path):
    peft = pytest.importorskip("peft")
    base = suite.open(suite.base)
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    found = suite.open(tmp_path / "adapter").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("name", ["dam", "sau"])
def test_defences_perturb_texts_before_the_encoder(suite, name):
    plain = fw.merge("task_arithmetic", base=suite.base, experts=suite.experts).state_dict()
    merged = fw.merge(
        {name: {"steps": 2, "batch": 3, "rate": 0.1, "radius": 1.0}}, base=suite.base,
        experts=suite.experts, data=suite.unlabelled(),
    ).state_dict()  # fmt: skip
    assert merged.keys() == plain.keys()
    assert any(not torch.allclose(t, merged[n], atol=1e-4) for n, t in plain.items())


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
def test_the_same_tasks_are_asked_of_a_decoder(tmp_path):
    suite = opened(tmp_path, tiny_gpt2)
    made = fw.merge(fw.AdaMerging(steps=2, batch=4, guard=4), base=suite.base,
                    experts=suite.experts, data=suite.unlabelled())  # fmt: skip
    assert len(made.report["fitted"]["losses"]) == 2
    model = suite.open(suite.base)
    model.load_state_dict(made.state_dict(), strict=False)  # the head is tied
    task, seen = suite.tasks["rte"], suite.evaluate(model, "rte")
    for row, (loss, label) in enumerate(zip(seen.columns["loss"], [0, 1, 1] * 3, strict=True)):
        text = ["a b", "c", "b a c"][row % 3]
        prompt = task.tokenizer(task.template.format(text=text, text2=text))["input_ids"]
        logs = []
        for word in ("yes", "no"):
            after = [task.tokenizer(word)["input_ids"][0], 1]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + after])).logits[0, len(prompt) - 1 : -1]
            logs.append(logits.log_softmax(1).gather(1, torch.tensor(after)[:, None]).sum())
        assert loss == pytest.approx(-torch.stack(logs).log_softmax(0)[label].item(), rel=1e-4)

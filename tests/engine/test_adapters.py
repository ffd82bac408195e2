"""Adapters merged into an adapter, or into a model: what peft's own arithmetic makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llamas import llama, saved

import fusewright as fw
from fusewright.engine import adapters
from fusewright.errors import PlanError
from fusewright.weights.verify import verify

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ADD = fw.TaskArithmetic(scale=1.0)
TOKENS = torch.arange(12).reshape(2, 6)


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    )


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def adapter(
    base: Path, path: Path, seed: int, save: dict[str, Any] | None = None, **config: Any
) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    tuned.save_pretrained(path, **(save or {}))
    return path


EMBEDDING = {"save": {"save_embedding_layers": False}}
CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "the same modules and rank": (llama, [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    ]),
    "different modules, ranks and scalings": (llama, [
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]},
        {"r": 5, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        {"r": 3, "target_modules": ["o_proj"], "rank_pattern": {"layers.1.self_attn.o_proj": 6}},
    ]),
    "embeddings": (llama, [
        {"r": 2, "target_modules": ["embed_tokens", "q_proj"], **EMBEDDING},
        {"r": 3, "target_modules": ["embed_tokens", "lm_head"], **EMBEDDING},
    ]),
    "Conv1D": (gpt2, [
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True},
    ]),
}  # fmt: skip
SCALES = {"one": 0.7, "two": -0.4, "three": 1.3}


@pytest.fixture(params=CASES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    make, configs = CASES[request.param]
    base = saved(make(), tmp_path / "base")
    names = list(SCALES)[: len(configs)]
    return base, {
        name: adapter(base, tmp_path / name, seed, **dict(config))
        for seed, (name, config) in enumerate(zip(names, configs, strict=True))
    }


def weighted(experts: dict[str, Path]) -> dict[str, fw.Expert]:
    return {name: fw.Expert(path, weight=SCALES[name]) for name, path in experts.items()}


def by_peft(base: Path, experts: dict[str, Path]) -> dict[str, torch.Tensor]:
    """θ0 + Σ scale·(merged_t - θ0), each model merged by peft alone, in float64."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(base).double().state_dict()
    total = {name: x.clone() for name, x in start.items()}
    for name, path in experts.items():
        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base).double(), path
        ).double()
        for key, x in model.merge_and_unload().state_dict().items():
            total[key] += SCALES[name] * (x - start[key])
    return total


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def opened(base: Path, path: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, path)


def test_dense_merge_of_adapters_is_pefts_arithmetic(models: Any) -> None:
    base, experts = models
    merged = fw.merge(ADD, base=base, experts=weighted(experts)).state_dict()
    expected = by_peft(base, experts)
    for name, x in merged.items():
        torch.testing.assert_close(x.double(), expected[name], atol=2e-6, rtol=2e-6)


def test_merged_adapter_gives_the_logits_of_the_dense_merge(models: Any, tmp_path: Path) -> None:
    base, experts = models
    fw.merge(ADD, base=base, experts=weighted(experts), out=tmp_path / "dense")
    fw.merge(ADD, base=base, experts=weighted(experts), out=tmp_path / "low",
             output="adapter")  # fmt: skip
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        logits(opened(base, tmp_path / "low")), logits(dense), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(
        logits(dense), logits(transformers.AutoModelForCausalLM.from_pretrained(base)), atol=1e-2
    )


def test_peft_loads_every_tensor_of_the_merged_adapter(models: Any, tmp_path: Path) -> None:
    base, experts = models
    fw.merge(ADD, base=base, experts=experts, out=tmp_path / "low", output="adapter")
    model = opened(base, tmp_path / "low")
    stored = load_file(tmp_path / "low" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)
    assert {x.dtype for x in stored.values()} == {torch.float32}


def test_merged_adapter_can_be_merged_again(models: Any, tmp_path: Path) -> None:
    """The product of the factors is Σ c_t·s_t·B_t·A_t: as an expert it is the dense merge."""
    base, experts = models
    fw.merge("linear", base=base, experts=weighted(experts), out=tmp_path / "low", output="adapter")
    again = fw.merge(ADD, base=base, experts={"low": tmp_path / "low"}).state_dict()
    dense = fw.merge("linear", base=base, experts=weighted(experts)).state_dict()
    for name, x in dense.items():
        torch.testing.assert_close(again[name], x, atol=2e-6, rtol=2e-6)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    base = saved(llama(), tmp_path / "base")
    both = [adapter(base, tmp_path / f"x{i}", i, r=2, target_modules=["q_proj"]) for i in (0, 1)]
    return base, {"one": both[0], "two": both[1]}


def test_output_is_published_with_its_manifest(pair: Any, tmp_path: Path) -> None:
    base, experts = pair
    out = tmp_path / "low"
    merged = fw.merge("average", base=base, experts=experts, out=out, output="adapter")
    assert verify(out).ok
    assert merged.report["rank"] == 4
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert config["base_model_name_or_path"] == str(base)
    assert "library_name: peft" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("*fusewright-staging*"))


def test_factors_are_stored_in_the_recipes_dtype(pair: Any, tmp_path: Path) -> None:
    base, experts = pair
    fw.merge("average", base=base, experts=experts, out=tmp_path / "low", output="adapter",
             out_dtype="bfloat16")  # fmt: skip
    stored = load_file(tmp_path / "low" / "adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


def refused(pair: Any, out: Path | None, method: str = "average", **changes: Any) -> str:
    base, experts = pair
    with pytest.raises(PlanError) as error:
        fw.merge(method, base=base, experts={**experts, **changes}, out=out, output="adapter")
    assert out is None or not out.exists()
    return str(error.value)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp"])
def test_method_that_needs_dense_vectors_is_refused(pair: Any, tmp_path: Path, method: str) -> None:
    said = refused(pair, tmp_path / "low", method)
    assert "output: model" in said
    assert "weighted sum" in said


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_more_than_factors_is_refused(
    pair: Any, tmp_path: Path, config: dict[str, Any], found: str
) -> None:
    other = adapter(pair[0], tmp_path / "other", 7, r=2, target_modules=["q_proj"], **config)
    said = refused(pair, tmp_path / "low", two=other)
    assert found in said
    assert "experts.two" in said
    assert "output: model" in said


def test_whole_model_among_the_adapters_is_refused(pair: Any, tmp_path: Path) -> None:
    whole = saved(llama(1), tmp_path / "whole")
    assert "experts.two" in refused(pair, tmp_path / "low", two=whole)


def test_adapter_without_a_folder_is_refused(pair: Any) -> None:
    assert "out=" in refused(pair, None)


def test_tied_tensor_changed_through_two_modules_is_refused(tmp_path: Path) -> None:
    base = saved(tied_llama(), tmp_path / "base")
    both = {
        module: adapter(base, tmp_path / module, 0, r=2, target_modules=[module], **EMBEDDING)
        for module in ("embed_tokens", "lm_head")
    }
    in_memory = tied_llama()  # whose two names are both known
    assert "different modules" in refused((in_memory, both), tmp_path / "low")


def test_interrupted_run_is_finished_by_the_next(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = pair
    write, written = adapters._write_module, []

    def fail_at_the_second(staging: Any, merging: Any, name: str, tensors: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        write(staging, merging, name, tensors)

    def merge(out: str) -> bytes:
        fw.merge(ADD, base=base, experts=experts, out=tmp_path / out, output="adapter")
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    monkeypatch.setattr(adapters, "_write_module", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        merge("low")
    assert not (tmp_path / "low").exists()
    monkeypatch.setattr(adapters, "_write_module", lambda *a: written.append(a[2]) or write(*a))
    assert merge("low") == merge("other")
    assert len(written) == 1 + 1 + 2  # before, after, and the other run's

"""An adapter over its base is what peft's merge makes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_help import fetch, said, whole
from safetensors.torch import load_file, save_file

from fusewright.errors import WeightsError
from fusewright.weights import DType, LowRank, Weights, open_weights
from fusewright.weights.adapter import AdapterWeights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama(tie: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ALL_LLAMA}),
    "llama, rslora": (llama, {"target_modules": ALL_LLAMA, "use_rslora": True}),
    "llama, patterns": (
        llama,
        {
            "target_modules": ALL_LLAMA,
            "rank_pattern": {"proj": 9, "q_proj": 5, r"layers.0.mlp.up_proj": 2},
            "alpha_pattern": {"j": 99, "v_proj": 32, r".*.1.mlp.*": 3},
        },
    ),
    "llama, patterns, rslora": (
        llama, {"target_modules": ALL_LLAMA, "rank_pattern": {"q_proj": 5}, "use_rslora": True},
    ),
    "llama, embedding": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, whole modules": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "llama, tied": (lambda: llama(True), {"target_modules": ["q_proj"]}),
    "llama, tied, embedding": (
        lambda: llama(True), {"target_modules": ["embed_tokens"], "save_embedding_layers": False},
    ),
    "llama, dora": (llama, {"target_modules": ALL_LLAMA, "use_dora": True}),
    "llama, dora, embedding": (
        llama, {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True, "use_rslora": True},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, square only": (gpt2, {"target_modules": r".*attn\.c_proj"}),
    "gpt2, dora": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "gpt2, embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    "bert, all biases": (bert, {"target_modules": ["query", "value"], "bias": "all"}),
    "bert, own biases": (bert, {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "bert, lora bias": (bert, {"target_modules": ["query", "value"], "lora_bias": True}),
    "vit": (vit, {"target_modules": r".*(q_proj|query|v_proj|value)"}),
    "vit, convolution": (
        vit,
        {"target_modules": r".*(projection|query|q_proj)", "modules_to_save": ["classifier"]},
    ),
    "vit, convolution, dora": (vit, {"target_modules": r".*projection", "use_dora": True}),
}  # fmt: skip


def train(model: Any, seed: int) -> None:
    """Move every trainable number, as training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def build(tmp_path: Path, make: Any, options: dict[str, Any]) -> tuple[Weights, Path, Any]:
    """Base and adapter on disk, and peft's merged model."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 3, "lora_alpha": 7, **options}
        embeddings = options.pop("save_embedding_layers", "auto")
        tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
        train(tuned, 1)
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
        fresh = type(model).from_pretrained(tmp_path / "base")
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
    return open_weights(tmp_path / "base"), tmp_path / "adapter", merged


def small(tmp_path: Path, **options: Any) -> tuple[Weights, Path]:
    base, adapter, _ = build(tmp_path, llama, {"target_modules": ["q_proj", "v_proj"], **options})
    return base, adapter


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(tmp_path: Path, case: str) -> None:
    base, adapter, _ = build(tmp_path, *CASES[case])
    weights, expected = open_weights(adapter, base=base), open_weights(tmp_path / "merged")
    assert set(weights) == set(expected)
    changed = 0
    for name in weights:
        ours, theirs = whole(weights, name), whole(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(ours, whole(base, name))
    assert changed > 0


@pytest.mark.parametrize("case", [case for case in CASES if "dora" not in case])
def test_delta_is_the_difference_from_the_base(tmp_path: Path, case: str) -> None:
    base, adapter, _ = build(tmp_path, *CASES[case])
    weights = open_weights(adapter, base=base)
    kinds = set()
    for name in weights:
        delta = weights.delta(name)
        kinds.add(type(delta))
        if delta is None:
            continue
        difference = whole(weights, name) - whole(base, name)
        if isinstance(delta, LowRank):
            assert delta.up.shape[1] == delta.down.shape[0] <= 5
            dense = delta.scale * delta.up @ delta.down
            assert weights[name].dtype is DType.F32
        else:
            dense = torch.full(weights[name].shape, delta)
        torch.testing.assert_close(
            dense.reshape(difference.shape), difference, rtol=1e-4, atol=1e-6
        )
    assert {LowRank, float} <= kinds


def test_dora_has_no_factors(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, use_dora=True)
    weights = open_weights(adapter, base=base)
    assert weights.delta("model.layers.0.self_attn.q_proj.weight") is None
    assert weights.delta("model.layers.0.self_attn.k_proj.weight") == 0.0


def large(tmp_path: Path, dora: bool, turned: bool = False) -> AdapterWeights:
    """One weight of several row groups, the last one incomplete."""
    torch.manual_seed(0)
    rows, cols, r = (300, 900, 4)
    save_file({"l.weight": torch.randn(rows, cols)}, tmp_path / "base.safetensors")
    (tmp_path / "ad").mkdir()
    out, into = (cols, rows) if turned else (rows, cols)
    tensors = {"l.lora_A.weight": torch.randn(r, into), "l.lora_B.weight": torch.randn(out, r)}
    if dora:
        tensors["l.lora_magnitude_vector"] = torch.rand(out)
    named = {f"base_model.model.{k}": v for k, v in tensors.items()}
    save_file(named, tmp_path / "ad" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "use_dora": dora}
    (tmp_path / "ad" / "adapter_config.json").write_text(json.dumps(config))
    return AdapterWeights(open_weights(tmp_path / "base.safetensors"), tmp_path / "ad")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_values_do_not_depend_on_the_range(tmp_path: Path, dora: bool, turned: bool) -> None:
    weights = large(tmp_path, dora, turned)
    everything = fetch(weights, "l.weight")

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 270_000), st.integers(0, 100_000))
    def check(start: int, length: int) -> None:
        stop = min(270_000, start + length)
        assert torch.equal(fetch(weights, "l.weight", start, stop), everything[start:stop])

    check()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_many_groups_of_rows_follow_the_formula(tmp_path: Path, dora: bool, turned: bool) -> None:
    weights = large(tmp_path, dora, turned)
    parts = load_file(tmp_path / "ad" / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.l.lora_{x}.weight"].double() for x in "AB")
    added = 2 * ((b @ a).T if turned else b @ a)  # alpha / r = 8 / 4
    expected = whole(weights.base, "l.weight").double() + added
    if dora:
        axis = 0 if turned else 1
        m = parts["base_model.model.l.lora_magnitude_vector"].double().unsqueeze(axis)
        expected *= m / expected.square().sum(axis, keepdim=True).sqrt()
    torch.testing.assert_close(whole(weights, "l.weight").double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_computed_in_groups_counted_from_row_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ceil(65536 / 900) = 73 rows: groups begin at 0, 73, 146 ..., whatever the range."""
    weights = large(tmp_path, dora=False)
    group, seen = AdapterWeights._group, set()

    def spy(self: AdapterWeights, name: str, first: int) -> torch.Tensor:
        rows = group(self, name, first)
        seen.add((first, rows.shape[0]))
        return rows

    monkeypatch.setattr(AdapterWeights, "_group", spy)
    fetch(weights, "l.weight", 100 * 900 + 5, 150 * 900)
    assert seen == {(73, 73), (146, 73)}
    fetch(weights, "l.weight", 299 * 900, 300 * 900)
    assert (292, 8) in seen


def test_float64_base_is_added_in_float64(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    wide = {name: whole(base, name).double() for name in base}
    weights = open_weights(adapter, base=open_weights(wide))
    name = "model.layers.0.self_attn.q_proj.weight"
    low = weights.delta(name)
    assert weights[name].dtype is DType.F64 and isinstance(low, LowRank)
    exact = wide[name] + low.scale * low.up.double() @ low.down.double()
    torch.testing.assert_close(whole(weights, name), exact, rtol=1e-15, atol=1e-16)


def test_bfloat16_base_is_added_in_float32(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    half = {name: whole(base, name).bfloat16() for name in base}
    weights = open_weights(adapter, base=open_weights(half))
    name = "model.layers.0.self_attn.q_proj.weight"
    low = weights.delta(name)
    assert isinstance(low, LowRank) and weights[name].dtype is DType.F32
    exact = half[name].float() + low.scale * low.up @ low.down
    torch.testing.assert_close(whole(weights, name), exact, rtol=1e-6, atol=1e-7)
    assert weights["model.norm.weight"].dtype is DType.BF16


def test_tied_names_in_memory_change_together(tmp_path: Path) -> None:
    _, adapter, merged = build(tmp_path, *CASES["llama, tied, embedding"])
    module = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    weights = open_weights(adapter, base=open_weights(module))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(whole(weights, name), merged.state_dict()[name])
        assert isinstance(weights.delta(name), LowRank)


def test_bare_base_under_a_heads_adapter(tmp_path: Path) -> None:
    """An adapter of the model with a head, over the checkpoint of the bare model."""
    base, adapter, merged = build(tmp_path, *CASES["bert"])
    bare = {n.removeprefix("bert."): whole(base, n) for n in base if n.startswith("bert.")}
    weights = open_weights(adapter, base=open_weights(bare))
    name = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(whole(weights, name), merged.state_dict()["bert." + name])
    assert "classifier.weight" in weights
    assert any("'bert.'" in note for note in weights.notes)


def test_saved_embedding_is_the_start_of_its_factors(tmp_path: Path) -> None:
    """peft saves a targeted embedding whole besides; its values count, so delta is not known."""
    base, adapter, _ = build(tmp_path, *CASES["llama, embedding"])
    assert open_weights(adapter, base=base).delta("model.embed_tokens.weight") is None


def test_says_what_it_is(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    weights = open_weights(adapter, base=base)
    assert isinstance(weights, AdapterWeights)
    assert weights.config["model_type"] == "llama" and weights.adapter_config["r"] == 3
    assert weights.base_model == weights.adapter_config["base_model_name_or_path"]
    assert len(weights.identities()) == 2


def test_adapter_in_a_bin_file(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = whole(open_weights(adapter, base=base), name)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert torch.equal(whole(open_weights(adapter, base=base), name), expected)


# --- refusals -------------------------------------------------------------------------------


def refused(adapter: Path, base: Weights | None, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        open_weights(adapter, base=base)
    for word in words:
        assert word in said(caught.value)


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_no_base(tmp_path: Path) -> None:
    _, adapter = small(tmp_path)
    refused(adapter, None, "needs its base", "base=")


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["x"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"a_field_of_the_future": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_features_that_are_not_known(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, **fields)
    refused(adapter, base, "cannot be added", next(iter(fields)), "merge_and_unload")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "other"])
def test_initialisation_that_moved_the_base(tmp_path: Path, start: str) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, init_lora_weights=start)
    refused(adapter, base, "changed its base", start)


def test_another_kind_of_adapter(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, peft_type="IA3")
    refused(adapter, base, "not a LoRA adapter", "IA3")


@pytest.mark.parametrize("fields", [{"r": None}, {"lora_alpha": "x"}, {"rank_pattern": [1]}])
def test_config_without_numbers(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, **fields)
    refused(adapter, base, "adapter_config.json")


def test_pattern_that_is_no_regular_expression(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, rank_pattern={"(": 3})
    refused(adapter, base, "regular expression")


def test_rank_that_disagrees_with_the_factors(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, r=4)
    refused(adapter, base, "disagree with its config", "rank 4")


def test_dora_without_magnitudes(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    edit(adapter, use_dora=True)
    refused(adapter, base, "incomplete", "magnitude")


def change(adapter: Path, drop: str = "", **more: torch.Tensor) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if not drop or drop not in k}
    save_file({**tensors, **more}, path)


def test_factor_without_its_partner(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    change(adapter, drop="layers.1.self_attn.v_proj.lora_B")
    refused(adapter, base, "incomplete", "layers.1.self_attn.v_proj")


def test_tensor_without_a_known_role(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    change(adapter, **{"base_model.model.model.norm.lora_C.weight": torch.ones(2)})
    refused(adapter, base, "no known role", "lora_C")


def test_trainable_tokens_in_the_file(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change(adapter, **{key: torch.ones(2, 16)})
    refused(adapter, base, "no known role", "trainable_tokens")


def test_base_of_another_size(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    other = {name: torch.zeros(7, 7) for name in base}
    refused(adapter, open_weights(other), "do not fit the base", "its own")


def test_target_that_the_base_lacks(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    less = {name: whole(base, name) for name in base if "layers.1" not in name}
    refused(adapter, open_weights(less), "does not have", "layers.1.self_attn")


def test_base_of_integers(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    ints = {name: whole(base, name).to(torch.int8) for name in base}
    refused(adapter, open_weights(ints), "floating-point", "I8")


def test_model_and_adapter_in_one_directory(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    save_file({"a": torch.ones(1)}, adapter / "model.safetensors")
    refused(adapter, base, "both a model and an adapter")


def test_broken_config(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, base, "not valid JSON", "adapter_config.json")

"""Tensors, modules and checkpoints give the same result; real models open with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, bits_equal, models, read, same, saved
from tiny_llamas import llama, tuned

import fusewright as fw
from fusewright.methods.contract import Finish, Program, Routed, Transform
from fusewright.methods.registry import registry

# Over the model and over one tensor is the same where there is one tensor.
ONE = {"weight": (130, 70)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_doors_agree(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    origin, experts = models(dtype, ONE)
    merge = METHODS[method]
    if method == "linear":
        merge = fw.Linear()

    def module(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
        layer = torch.nn.Linear(70, 130, bias=False, dtype=dtype)
        layer.load_state_dict(tensors)
        return layer

    states = fw.merge(merge, base=origin, experts=experts).state_dict()
    by_module = fw.merge(merge, base=module(origin),
                         experts={n: module(t) for n, t in experts.items()})  # fmt: skip
    folders = {n: saved(t, tmp_path / n) for n, t in {"base": origin, **experts}.items()}
    fw.merge(merge, base=folders.pop("base"), experts=folders, out=tmp_path / "out")
    tensor = merge(origin["weight"], [t["weight"] for t in experts.values()], keys=["a", "b"],
                   name="weight")  # fmt: skip
    assert same(states, by_module.state_dict())
    assert bits_equal(by_module.module().weight.detach(), states["weight"])
    assert same(states, read(tmp_path / "out"))
    if method not in ("iso_c", "lines"):  # these ask the layout what the tensor is
        assert bits_equal(tensor, states["weight"])


def test_merging_leaves_the_inputs_as_they_were() -> None:
    origin, experts = models(torch.float32, ONE)
    before = {n: t["weight"].clone() for n, t in {"base": origin, **experts}.items()}
    for method in METHODS.values():
        fw.merge(method, base=origin, experts=experts)
    for name, tensors in {"base": origin, **experts}.items():
        assert bits_equal(tensors["weight"], before[name])


def test_the_result_shares_no_memory_with_the_inputs() -> None:
    origin, _ = models(torch.float32, ONE)
    found = fw.merge("linear", experts={"a": origin}).state_dict()["weight"]
    found.zero_()
    assert origin["weight"].abs().sum() > 0


def test_every_registered_map_runs_through_the_engine() -> None:
    origin, experts = models(torch.float32, {"layers.0.mlp.weight": (8, 8), "v": (5,)})
    for cls in registry().values():
        chosen = dict(list(experts.items())[: cls.card.experts[1]])
        try:
            method = cls()
        except fw.FusewrightError:
            continue
        if isinstance(method, Program | Routed):  # they run models
            continue
        if isinstance(method, Transform):
            method = method >> fw.Sum()
        elif isinstance(method, Finish):
            method = fw.Sum() >> method
        found = fw.merge(method, base=origin, experts=chosen).state_dict()
        assert all(t.isfinite().all() for t in found.values()), cls


def tiny(kind: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    if kind == "llama":
        return llama()
    if kind == "tied llama":
        return llama(tie_word_embeddings=True)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2,
                                                n_positions=32))  # fmt: skip
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(vocab_size=64, **small))
    if kind == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            decoder_start_token_id=0))  # fmt: skip
    if kind == "clip":
        vision = {**small, "image_size": 8, "patch_size": 4, "projection_dim": 16}
        text = {**small, "vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 16}
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision,
                                          projection_dim=16))  # fmt: skip
    return hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3))  # fmt: skip


FAMILIES = ["llama", "tied llama", "gpt2", "bert", "t5", "clip", "resnet"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_merge_end_to_end_and_open(tmp_path: Path, kind: str) -> None:
    origin = tiny(kind)
    experts = {"a": tuned(origin, 1), "b": tuned(origin, 2)}
    folders = {}
    for name, model in {"base": origin, **experts}.items():
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    out = tmp_path / "out"
    merge = fw.TaskArithmetic(scale=0.5)
    fw.merge(merge, base=folders.pop("base"), experts=folders, out=out, shard_size=3000)
    assert len(list(out.glob("*.safetensors"))) > 1
    opened, info = type(origin).from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    in_memory = fw.merge(merge, base=origin, experts=experts).module()
    for (name, p), (_, q) in zip(opened.named_parameters(), in_memory.named_parameters(),
                                 strict=True):  # fmt: skip
        b, (x, y) = origin.get_parameter(name), [m.get_parameter(name) for m in experts.values()]
        assert torch.allclose(p, b + 0.5 * ((x - b) + (y - b)), atol=1e-6), name
        assert bits_equal(p.detach(), q.detach()), name
    assert type(fw.load(out)) is type(origin)
    unsaved = fw.merge(merge, base=tmp_path / "base", experts={n: tmp_path / n for n in experts})
    found = unsaved.module()
    assert type(found) is type(origin) and same(found.state_dict(), opened.state_dict())


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_of_transformers_in_memory_are_written_with_their_configs(
    tmp_path: Path, kind: str
) -> None:
    origin = tiny(kind)
    origin.config.architectures = ["BertModel"]  # what the checkpoint was that it was made of
    models = {"base": origin, "experts": {"a": tuned(origin, 1), "b": tuned(origin, 2)}}
    made = fw.merge(fw.TaskArithmetic(), **models)
    made.save(tmp_path / "later")
    fw.merge(fw.TaskArithmetic(), **models, out=tmp_path / "half", out_dtype="bfloat16")
    opened, info = type(origin).from_pretrained(tmp_path / "later", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(opened.state_dict(), made.module().state_dict())
    half = fw.load(tmp_path / "half")
    assert type(half) is type(origin) and half.dtype == torch.bfloat16
    fw.merge(fw.EMR(), **models, out=tmp_path / "routed")
    routed = fw.load(tmp_path / "routed")
    stored = {name: routed.state_dict()[name] for name in origin.state_dict()}
    assert type(routed) is type(origin) and same(origin.state_dict(), stored)
    if origin.can_generate():
        for each in (opened, routed):
            assert each.generation_config.eos_token_id == origin.generation_config.eos_token_id


@pytest.mark.parametrize("method", ["ties", "iso_c", "lines", "model_stock", "slerp"])
def test_other_methods_on_a_tied_model_open_tied(tmp_path: Path, method: str) -> None:
    origin = tiny("tied llama")
    experts = {"a": tuned(origin, 1), "b": tuned(origin, 2)}
    for name, model in {"base": origin, **experts}.items():
        model.save_pretrained(tmp_path / name)
    fw.merge(METHODS[method], base=tmp_path / "base", out=tmp_path / "out",
             experts={n: tmp_path / n for n in experts})  # fmt: skip
    opened = fw.load(tmp_path / "out")
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()
    in_memory = fw.merge(METHODS[method], base=origin, experts=experts)
    assert bits_equal(in_memory.module().lm_head.weight.detach(), opened.lm_head.weight.detach())


def test_the_base_ties_and_an_expert_stores_both(tmp_path: Path) -> None:
    origin = tiny("tied llama")
    a = tuned(origin, 1)
    origin.save_pretrained(tmp_path / "base")
    a.save_pretrained(tmp_path / "a")
    both = {n: t.clone().contiguous() for n, t in a.state_dict().items()}
    assert "lm_head.weight" in both
    saved(both, tmp_path / "b")
    (tmp_path / "b/config.json").write_text((tmp_path / "a/config.json").read_text())
    one = fw.merge("task_arithmetic", base=tmp_path / "base", experts={"a": tmp_path / "a"})
    two = fw.merge("task_arithmetic", base=tmp_path / "base", experts={"a": tmp_path / "b"})
    assert same(one.state_dict(), two.state_dict())
    both["lm_head.weight"] += 1
    saved(both, tmp_path / "c")
    (tmp_path / "c/config.json").write_text((tmp_path / "a/config.json").read_text())
    with pytest.raises(fw.FusewrightError, match="tied here and untied there"):
        fw.merge("task_arithmetic", base=tmp_path / "base", experts={"a": tmp_path / "c"})
    fw.merge("task_arithmetic", base=tmp_path / "base", experts={"a": tmp_path / "c"}, untie=True,
             out=tmp_path / "untied")  # fmt: skip
    opened = fw.load(tmp_path / "untied")
    assert not torch.equal(opened.lm_head.weight, opened.model.embed_tokens.weight)
    assert opened.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_config_says_in_which_dtype_the_result_is_stored(tmp_path: Path, name: str) -> None:
    origin = tiny("llama")
    for folder, model in {"base": origin, "a": tuned(origin, 1)}.items():
        model.save_pretrained(tmp_path / folder)
    fw.merge("ties", base=tmp_path / "base", experts={"a": tmp_path / "a"}, out_dtype=name,
             out=tmp_path / "out")  # fmt: skip
    opened = type(origin).from_pretrained(tmp_path / "out")
    assert opened.dtype == getattr(torch, name)


def test_a_tied_plain_module_stays_one_parameter() -> None:
    class Net(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            draws = torch.Generator().manual_seed(seed)
            self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
            noise = 0.05 * torch.randn(9, 4, generator=draws)
            shared = torch.linspace(-1, 1, 36).reshape(9, 4) + noise
            self.embed.weight = self.head.weight = torch.nn.Parameter(shared)

    merged = fw.merge("task_arithmetic", base=Net(0), experts={"a": Net(1), "b": Net(2)})
    module = merged.module()
    assert module.embed.weight is module.head.weight


class Wrapped(torch.nn.Module):
    """As distributed training wraps a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapped_module_gets_the_merged_tensors() -> None:
    def net(seed: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return tuned(torch.nn.Linear(6, 5), seed)

    base, a = net(0), net(1)
    merged = fw.merge(fw.TaskArithmetic(scale=1.0), base=Wrapped(base), experts={"a": a})
    found = merged.module()
    assert isinstance(found, Wrapped)
    assert torch.allclose(found.module.weight, a.weight)


def test_an_untied_result_does_not_fit_a_tied_module(tmp_path: Path) -> None:
    origin = tiny("tied llama")
    a = {n: t.clone() for n, t in tuned(origin, 1).state_dict().items()}
    a["lm_head.weight"] = a["lm_head.weight"] * 1.1
    merged = fw.merge("task_arithmetic", base=origin, experts={"a": a}, untie=True)
    with pytest.raises(fw.FusewrightError, match="do not fit"):
        merged.module()


def test_what_is_saved_from_memory_says_its_dtype(tmp_path: Path) -> None:
    origin = tiny("llama")
    origin.save_pretrained(tmp_path / "base")
    tuned(origin, 1).save_pretrained(tmp_path / "a")
    merged = fw.merge("ties", base=tmp_path / "base", experts={"a": tmp_path / "a"},
                      out_dtype="bfloat16")  # fmt: skip
    merged.save(tmp_path / "out")
    assert fw.load(tmp_path / "out").dtype == torch.bfloat16
    assert same(read(tmp_path / "out"), merged.state_dict())


def test_untied_and_saved_from_memory_opens_untied(tmp_path: Path) -> None:
    origin = tiny("tied llama")
    origin.save_pretrained(tmp_path / "base")
    a = {n: t.clone() for n, t in tuned(origin, 1).state_dict().items()}
    a["lm_head.weight"] = a["lm_head.weight"] * 1.1
    merged = fw.merge("task_arithmetic", base=tmp_path / "base", experts={"a": a}, untie=True)
    merged.save(tmp_path / "out", untie=True)
    opened = fw.load(tmp_path / "out")
    assert torch.equal(opened.lm_head.weight, merged.state_dict()["lm_head.weight"])
    assert opened.config.tie_word_embeddings is False

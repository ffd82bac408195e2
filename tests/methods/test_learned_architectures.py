"""Learned methods run unchanged on small models of every family; what is fitted is what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from learned_toys import moved
from torch import nn

import fusewright as fw
from fusewright.methods.learned import AdaMerging, AdaRank, Concrete, FWMerging
from fusewright.methods.learned._fitting import Fitting

hf = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip
PATCHES = {"image_size": 8, "patch_size": 4}
IDS = {"input_ids": torch.arange(24).reshape(3, 8)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8)}
QUICK: dict[str, Any] = {"steps": 2, "batch": 4, "guard": 4, "every": 2, "rate": 0.02}


def first_token(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).last_hidden_state[:, 0]


def last_logits(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).logits[:, -1]


def encoded(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)).logits[:, -1]


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**TINY, **PATCHES, num_labels=3)),
            PIXELS, None),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TINY, **PATCHES)), PIXELS,
             first_token),
    "resnet": (lambda: hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")), PIXELS, None),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY, vocab_size=50)), IDS,
             None),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2,
             vocab_size=50)), IDS, last_logits),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, vocab_size=50)), IDS,
              last_logits),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=8, d_ff=16,
           num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)), IDS, encoded),
}  # fmt: skip
LEARNERS = {
    "ranks": partial(AdaRank, density=0.5),
    "plus": partial(AdaMerging.profile, "plus"), "concrete": Concrete,
    "adapted": partial(Concrete, form="adamerging", mask="row", weight_steps=2),
    "fw": lambda rate, **kw: FWMerging(objective="entropy", granularity="layer", rows=4, **kw),
}  # fmt: skip


def fitted(family: str, learner: str, monkeypatch: pytest.MonkeyPatch, **options: Any):
    """(merge, the module as it was when the fit ended, the base)."""
    make, inputs, head = FAMILIES[family]
    torch.manual_seed(0)
    base = make().eval()
    models = {name: moved(base, seed, 0.02) for seed, name in enumerate("ab")}
    ends: dict[str, torch.Tensor] = {}
    real = Fitting.report

    def report(self: Fitting, merge: Any, fit: Any) -> Any:
        ends.update(self.statistics | merge.state())
        return real(self, merge, fit)

    monkeypatch.setattr(Fitting, "report", report)
    heads = {} if head is None else dict.fromkeys("ab", head)
    data = {name: [inputs] for name in "ab"}
    merged = fw.merge(LEARNERS[learner](**QUICK), base=base, experts=models, data=data,
                      heads=heads, **options)  # fmt: skip
    return merged, ends, base


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_fitted_module(
    family: str, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, ends, base = fitted(family, learner, monkeypatch)
    state, before = merged.state_dict(), base.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype
        if name in ends:
            torch.testing.assert_close(tensor, ends[name], rtol=1e-5, atol=1e-6)
    for names in tied(base):
        assert all(state[name].equal(state[names[0]]) for name in names)
    assert any(not t.equal(before[n]) for n, t in state.items())


def tied(model: nn.Module) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        places.setdefault(tensor.data_ptr(), []).append(name)
    return [names for names in places.values() if len(names) > 1]


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_folders_of_it_open_with_transformers(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    make, inputs, head = FAMILIES[family]
    torch.manual_seed(0)
    base = make().eval()
    base.save_pretrained(tmp_path / "base")
    paths = {}
    for seed, name in enumerate("ab"):
        paths[name] = tmp_path / name
        moved(base, seed, 0.02).save_pretrained(paths[name])
    heads = {} if head is None else dict.fromkeys("ab", head)
    merged = fw.merge(Concrete(**QUICK), base=tmp_path / "base", experts=paths, heads=heads,
                      data={name: [inputs] for name in "ab"}, out=tmp_path / "out")  # fmt: skip
    module = type(base).from_pretrained(tmp_path / "out")
    stored = merged.state_dict()
    for name, tensor in module.state_dict().items():
        if name in stored:
            assert tensor.equal(stored[name])
    in_memory, _, _ = fitted(family, "concrete", monkeypatch)
    for name, tensor in in_memory.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)

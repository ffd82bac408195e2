"""Learned methods run unchanged on small models of every family; what is fitted is what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_toys import moved
from torch import nn

import fusewright as fw
from fusewright.methods.contract import Method
from fusewright.methods.learned import (
    ANP,
    AWM,
    DAM,
    METHODS,
    SAU,
    AdaMerging,
    AdaRank,
    Concrete,
    FWMerging,
    ProDistill,
)
from fusewright.methods.learned._fitting import Fitting
from fusewright.methods.learned._prodistill import _Distillation
from fusewright.modules.functional import with_weights
from fusewright.tasks.adaptation import Adaptation, adaptation
from fusewright.tasks.pictures import Pictures

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
SEEN = {"vit", "clip", "resnet"}
"""Families of pictures."""
LEARNERS: dict[str, Method] = {
    "adamerging": AdaMerging(**QUICK), "plus": AdaMerging.profile("plus", **QUICK),
    "ranks": AdaRank(**QUICK, density=0.5), "concrete": Concrete(**QUICK),
    "adapted": Concrete(**QUICK, form="adamerging", mask="row", weight_steps=2),
    "directions": Concrete(**QUICK, form="adamerging", mask="rank", weight_steps=2),
    "fw": FWMerging(**{k: v for k, v in QUICK.items() if k != "rate"}, objective="entropy",
                    granularity="layer", rows=4),
    "anp": ANP(**QUICK), "dam": DAM(**QUICK, mask="rank"), "awm": AWM(**QUICK),
    "sau": SAU(**QUICK, attack_steps=1),
    "prodistill": ProDistill(**{k: v for k, v in QUICK.items() if k != "guard"}),
}  # fmt: skip
"""Of every learned method that answers with weights, the objects that run on all families."""
Models = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Models]:
    """The base and the experts of a family as folders, saved once."""

    @cache
    def saved(family: str) -> Models:
        folder, base = tmp_path_factory.mktemp(family), made(family)
        base.save_pretrained(folder / "base")
        for seed, name in enumerate("ab"):
            moved(base, seed, 0.02).save_pretrained(folder / name)
        return folder / "base", {name: folder / name for name in "ab"}

    return saved


def made(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def asked(family: str) -> Adaptation:
    _, inputs, head = FAMILIES[family]
    heads = {} if head is None else dict.fromkeys("ab", head)
    pictures = Pictures(mean=(0.5,), std=(0.5,)) if family in SEEN else None
    return adaptation({n: [inputs] for n in "ab"}, heads, pictures)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of the module as it was when a fit ended."""
    found: dict[str, torch.Tensor] = {}
    real, run = Fitting.report, _Distillation.run

    def report(self: Fitting, merge: Any, fit: Any) -> Any:
        found.update(self.statistics | merge.state())
        return real(self, merge, fit)

    def distilled(self: _Distillation) -> Any:
        answer = run(self)
        found.update({n: self.model.state_dict()[n].clone() for n in self.state})
        return answer

    monkeypatch.setattr(Fitting, "report", report)
    monkeypatch.setattr(_Distillation, "run", distilled)
    return found


def test_every_learned_method_that_answers_with_weights_is_asked() -> None:
    assert {type(method) for method in LEARNERS.values()} == set(METHODS)


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_fitted_module_and_opens_with_transformers(
    family: str, learner: str, folders: Callable[[str], Models],
    ends: dict[str, torch.Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    at, models = folders(family)
    fw.merge(LEARNERS[learner], base=at, experts=models, data=asked(family), out=tmp_path / "out")
    base, found = made(family), type(made(family)).from_pretrained(tmp_path / "out")
    state, before = found.state_dict(), base.state_dict()
    assert state.keys() == before.keys() and ends
    for name, tensor in state.items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, ends.get(name, tensor), rtol=1e-5, atol=1e-6)
    for names in tied(base):
        assert all(state[name].equal(state[names[0]]) for name in names)
    says, (_, inputs, _) = asked(family).questions["a"].logits, FAMILIES[family]
    with torch.no_grad(), with_weights(base, ends):
        wanted = says(base, inputs)
    with torch.no_grad():
        torch.testing.assert_close(says(found, inputs), wanted, rtol=1e-4, atol=1e-5)
        assert not says(found, inputs).equal(says(made(family), inputs))


def tied(model: nn.Module) -> list[list[str]]:
    places: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        places.setdefault(tensor.data_ptr(), []).append(name)
    return [names for names in places.values() if len(names) > 1]


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("learner", ["plus", "concrete"])
@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_models_in_memory_end_as_their_folders(
    family: str, learner: str, folders: Callable[[str], Models], tmp_path: Path
) -> None:
    at, models = folders(family)
    given = {"data": asked(family)}
    disk = fw.merge(LEARNERS[learner], base=at, experts=models, out=tmp_path / "out", **given)
    base = made(family)
    alive = {name: moved(base, seed, 0.02) for seed, name in enumerate("ab")}
    memory = fw.merge(LEARNERS[learner], base=base, experts=alive, **given).state_dict()
    assert memory.keys() == base.state_dict().keys()
    for name, tensor in disk.state_dict().items():
        torch.testing.assert_close(tensor, memory[name], rtol=1e-5, atol=1e-6)


def shorter(name: str, tensor: torch.Tensor) -> int:
    """How many numbers a mask of directions has."""
    maps = ("attention.", "attn.", "mlp.", "intermediate.", "output.", "convolution.",
            "patch_embeddings.")  # fmt: skip
    matrix = tensor.dim() > 1 and any(part in name for part in maps)
    return min(len(tensor), tensor[0].numel()) if matrix else len(tensor)


@pytest.mark.filterwarnings("ignore::fusewright.errors.FusewrightWarning")
@pytest.mark.parametrize("family", ["vit", "resnet", "gpt2"])
def test_masks_of_directions_begin_as_task_arithmetic_with_few_numbers(
    family: str, folders: Callable[[str], Models], tmp_path: Path
) -> None:
    at, models = folders(family)
    plain = fw.merge("task_arithmetic", base=at, experts=models).state_dict()
    begun = Concrete(**{**QUICK, "steps": 0}, mask="rank")
    merged = fw.merge(begun, base=at, experts=models, data=asked(family))
    learned = dict(made(family).named_parameters())
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)
    trained = merged.report["fitted"]["trained"]
    assert trained == sum(shorter(name, tensor) for name, tensor in learned.items())

"""Models in the tangent space of their weights: exact, additive, and trainable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules.linearise import linearise

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(image_size=4, patch_size=2, num_channels=1, **SMALL)
    return transformers.ViTModel(config, add_pooling_layer=False), pictures()


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.BertModel(transformers.BertConfig(vocab_size=9, **SMALL)), texts()


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config), texts()  # its head is its embedding


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1,
                                   num_heads=2, decoder_start_token_id=0)  # fmt: skip
    inputs = {**texts(), "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])}
    return transformers.T5ForConditionalGeneration(config), inputs


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6],
                                       depths=[1, 1], layer_type="basic")  # fmt: skip
    return transformers.ResNetModel(config), {"pixel_values": torch.randn(4, 1, 8, 8)}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 1, 4, 4)}


def texts() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}  # fmt: skip


ARCHITECTURES = (vit, bert, gpt2, t5, resnet)
architectures = pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)


def made(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> Any:
    torch.manual_seed(0)
    return make()


def answer(found: Any) -> Tensor:
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def moved(module: nn.Module, by: float, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


@architectures
def test_at_its_start_it_answers_as_the_model(make: Any) -> None:
    model, inputs = made(make)
    model.eval()
    torch.testing.assert_close(answer(linearise(model)(**inputs)), answer(model(**inputs)))


@architectures
def test_it_is_the_first_order_of_the_model(make: Any) -> None:
    """What is left over shrinks with the square of the step."""
    model, inputs = made(make)
    model.double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    start = copy.deepcopy(model)
    left = []
    for step in (1e-3, 1e-4):
        model.load_state_dict(start.state_dict())
        tangent = linearise(model)
        moved(model, step)
        left.append((answer(tangent(**inputs)) - answer(model(**inputs))).abs().max().item())
        away = (answer(model(**inputs)) - answer(start(**inputs))).abs().max().item()
        assert left[-1] < 0.2 * away
    assert left[1] < 0.03 * left[0]


@architectures
def test_it_learns(make: Any) -> None:
    model, inputs = made(make)
    tangent = linearise(model).train()
    optimiser = torch.optim.Adam(tangent.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = (answer(tangent(**inputs)) - 1).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.97 * losses[0]


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)
    return nn.Sequential(*parts).double()


INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()


@settings(max_examples=25, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2))
def test_changes_add_exactly(a: float, b: float) -> None:
    def change(one: float, two: float) -> Tensor:
        model = tower()
        tangent = linearise(model)
        moved(model, one, seed=1)
        moved(model, two, seed=2)
        return (tangent(INPUTS) - tower()(INPUTS)).detach()

    torch.testing.assert_close(change(a, b), change(a, 0) + change(0, b))


def test_parameters_that_are_not_selected_act_as_they_are() -> None:
    model = tower()
    tangent = linearise(model, lambda name: name.startswith("3."))
    moved(model, 0.3)
    torch.testing.assert_close(tangent(INPUTS), model(INPUTS))  # linear in its last layer


def test_a_merged_model_is_asked_around_the_base() -> None:
    base, merged = tower(), tower()
    moved(merged, 0.1)
    expected = linearise(base)
    moved(base, 0.1)
    found = linearise(merged, start=dict(tower().named_parameters()))
    torch.testing.assert_close(found(INPUTS), expected(INPUTS))
    with torch.inference_mode():
        torch.testing.assert_close(found(INPUTS), expected(INPUTS).detach())


def test_dropout_has_one_mask_for_value_and_derivative() -> None:
    """Linear in its weights, the model is its own expansion only if the masks are the same."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4, bias=False)).double()
    tangent = linearise(model)
    moved(model, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found = tangent(INPUTS)
        torch.manual_seed(7)
        torch.testing.assert_close(found, model(INPUTS))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("make", [encoder, Attends], ids=["encoder", "attention"])
def test_torchs_own_attention_is_expanded_in_evaluation_mode_too(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make().double().eval(), torch.randn(2, 3, 4).double()
    tangent, before = linearise(model), model(inputs).detach()
    step = 1e-6
    moved(model, step)
    with torch.inference_mode():
        slope = (tangent(inputs) - before) / step
        difference = (model(inputs) - before) / step
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-4)
    assert slope.abs().max() > 0.1 and torch.backends.mha.get_fastpath_enabled()


def test_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    tangent = linearise(model).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    tangent(INPUTS)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    torch.testing.assert_close(tangent(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_linearised_lora_is_lora_with_the_factor_kept(kind: str, dropout: float) -> None:
    """Outputs and gradients, also after both factors have moved."""
    peft = pytest.importorskip("peft")
    from fusewright.bench.finetuning.models import freeze_start

    def layer() -> nn.Module:
        torch.manual_seed(3)
        part = {"linear": lambda: nn.Linear(3, 4), "conv": lambda: nn.Conv2d(2, 4, 3),
                "embedding": lambda: nn.Embedding(6, 4)}[kind]()  # fmt: skip
        rate = 0.0 if kind == "embedding" else dropout  # PEFT has none there
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], lora_dropout=rate)
        return peft.get_peft_model(nn.Sequential(part, nn.Flatten()), config).double()

    inputs: Tensor = {"linear": INPUTS, "conv": torch.randn(2, 2, 5, 5).double(),
                      "embedding": torch.tensor([[1, 2], [3, 5]])}[kind]  # fmt: skip
    tangent, kept = linearise(layer(), lambda name: "lora_" in name), layer()
    for module in kept.modules():
        freeze_start(module)
    trained = [n for n, p in kept.named_parameters() if p.requires_grad]
    assert len(trained) == 1
    for model in (tangent.module, kept):
        partner = dict(model.named_parameters())[trained[0]]
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            partner += torch.randn(partner.shape, generator=draw).double()
    for name, other in tangent.module.named_parameters():
        if "lora_" in name and name != trained[0]:
            with torch.no_grad():
                other += 1.0  # moves nothing in the tangent space
    answers = []
    for model in (tangent, kept):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            answers.append(model.train()(inputs))
        answers[-1].square().sum().backward()
    torch.testing.assert_close(*answers)
    gradients = [dict(m.named_parameters())[trained[0]].grad for m in (tangent.module, kept)]
    torch.testing.assert_close(*gradients)
    others = [p.grad for n, p in tangent.module.named_parameters()
              if "lora_" in n and n != trained[0]]  # fmt: skip
    assert all(g is None or not g.any() for g in others)


def test_what_is_asked_below_a_head_is_linearised_too() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=9, **SMALL)
    model = transformers.BertForSequenceClassification(config).eval()
    tangent = linearise(model)
    moved(model, 0.5)
    inner = linearise(model.base_model, start={
        n.removeprefix("bert."): t for n, t in tangent._start.tensors("").items()
    })  # fmt: skip
    assert "For" in type(tangent).__name__ and tangent.config is model.config
    found, expected = tangent.base_model(**texts()), inner(**texts())
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_methods_that_answer_are_linearised_and_pieces_are_not_offered() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tower()

        def encode_image(self, pixels: Tensor) -> Tensor:
            return self.body(pixels)

        def forward_features(self, pixels: Tensor) -> Tensor:
            return self.body(pixels)

    model = Clip()
    tangent, expected = linearise(model), linearise(model.body)
    moved(model, 0.2)
    torch.testing.assert_close(tangent.encode_image(INPUTS), expected(INPUTS))
    assert not hasattr(tangent, "forward_features") and not hasattr(tangent, "nothing")


def test_texts_are_read_in_one_call_and_none_is_written() -> None:
    """A prompt whose rest is given later is read with it: an expansion of the whole."""
    from fusewright.tasks.prompts import prompted

    model, inputs = made(gpt2)
    tangent = linearise(model.eval())
    moved(model, 0.3)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 1, 2]])
    whole = tangent(input_ids=ids).logits[:, 2:]
    begun = prompted(tangent, ids[:, :3], torch.ones_like(ids[:, :3]))
    torch.testing.assert_close(begun.going_on(ids[:, 3:], torch.ones(2, 2)), whole)
    twice = begun.repeated(2).going_on(ids[:, 3:].repeat_interleave(2, 0), torch.ones(4, 2))
    torch.testing.assert_close(twice, whole.repeat_interleave(2, 0))
    assert (model(input_ids=ids).logits[:, 2:] - whole).abs().max() > 0.01
    with pytest.raises(PlanError, match=r"writes no texts[\s\S]*GPT2LMHeadModel"):
        tangent.generate(**inputs)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="no parameter is selected"):
        linearise(tower(), lambda name: False)
    with pytest.raises(PlanError, match=r"0\.weight"):
        linearise(tower(), start={"0.weight": torch.zeros(2, 2)})
    with pytest.raises(PlanError, match="no such tensor"):
        linearise(tower(), start={})


def test_it_keeps_its_mode_and_its_start_is_no_part_of_its_state() -> None:
    for training in (True, False):
        tangent = linearise(tower().train(training))
        assert tangent.training is training and tangent.module.training is training
        assert set(tangent.state_dict()) == {f"module.{name}" for name in tower().state_dict()}
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    linearise(normed)(INPUTS)
    assert int(normed[1].num_batches_tracked) == 0


def test_modules_inside_modules_are_linearised_around_the_same_start() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Module()
            self.middle.inner = tower()
            self.middle.inner.requires_grad_()

    model = Outer()
    tangent, expected = linearise(model), linearise(model.middle.inner)
    moved(model, 0.3)
    found = tangent.middle.inner(INPUTS)
    torch.testing.assert_close(found, expected(INPUTS))
    assert not torch.allclose(found, model.middle.inner(INPUTS))


def test_only_floating_tensors_are_expanded_and_caches_left_out() -> None:
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tower()

        def forward(self, x: Tensor) -> dict[str, object]:
            found = self.body(x)
            return {"logits": found, "class": found.argmax(-1), "size": 3, "name": "n",
                    "cache": object()}  # fmt: skip

    model = Answers()
    tangent, before = linearise(model), model(INPUTS)
    expected = linearise(model.body)
    moved(model, 3.0)
    found = tangent(INPUTS)
    torch.testing.assert_close(found["logits"], expected(INPUTS))
    assert found["class"].equal(before["class"]) and found["cache"] is None
    assert (found["size"], found["name"]) == (3, "n")

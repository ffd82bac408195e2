"""Messy checkpoints are aligned by stated rules, and every tensor is accounted for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from read_help import said, whole

from fusewright.errors import WeightsError
from fusewright.weights import Alignment, TensorInfo, Weights, align, canonical, open_weights
from fusewright.weights.memory import MemoryWeights
from fusewright.weights.names import recomputed
from fusewright.weights.spec import DType

E, H = "model.embed_tokens.weight", "lm_head.weight"
TIED = ((E, H),)


def of(*names: str, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> MemoryWeights:
    """Weights with these names, each tensor its own values, and these tensors."""
    state = {name: torch.full((2, 3), float(len(name))) for name in names}
    weights = MemoryWeights({**state, **{k.replace("__", "."): v for k, v in tensors.items()}})
    weights.config = config or {}
    return weights


def check_accounted(found: Alignment, base: Weights | None, experts: dict[str, Weights]) -> None:
    for aligned, weights in [
        (found.base, base),
        *((found.experts[k], w) for k, w in experts.items()),
    ]:
        if aligned is None or weights is None:
            continue
        assert set(aligned.names) | set(aligned.absent) == set(found.names)
        assert not set(aligned.names) & set(aligned.absent)
        assert set(aligned.names.values()) | set(aligned.skipped) == set(weights)
        assert not set(aligned.names.values()) & set(aligned.skipped)


def aligned(base: Weights | None, expert: Weights, *args: Any, **kwargs: Any) -> Alignment:
    found = align(base, {"e": expert}, *args, **kwargs)
    check_accounted(found, base, {"e": expert})
    return found


def refused(*words: str, base: Weights | None, expert: Weights, **kwargs: Any) -> None:
    with pytest.raises(WeightsError) as caught:
        align(base, {"mine": expert}, **kwargs)
    for word in words:
        assert word in said(caught.value)


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_wrappers_in_front_of_every_name(prefix: str) -> None:
    weights = canonical(of(prefix + "a.weight", prefix + "b.weight"))
    assert list(weights) == ["a.weight", "b.weight"] and weights.notes
    assert weights["a.weight"].name == "a.weight"
    assert whole(weights, "a.weight").shape == (2, 3)


def test_compiled_part_of_a_model() -> None:
    assert list(canonical(of("a._orig_mod.x", "b.y"))) == ["a.x", "b.y"]


def test_module_in_front_of_some_names_stays() -> None:
    weights = of("module.a", "b")
    assert canonical(weights) is weights


def test_two_names_that_become_one() -> None:
    with pytest.raises(WeightsError, match="same name once wrappers"):
        canonical(of("a._orig_mod.x", "a.x"))


def test_renaming_keeps_what_is_tied() -> None:
    tensor = torch.zeros(2)
    weights: Any = canonical(MemoryWeights({"module.a": tensor, "module.b": tensor}))
    assert weights.tied == (("a", "b"),)


def test_expert_of_data_parallel_training() -> None:
    found = aligned(of("a", "b"), of("module.a", "module.b"))
    assert found.experts["e"].names == {"a": "module.a", "b": "module.b"}
    assert any("module." in note for note in found.notes)


@pytest.mark.parametrize("base_prefix", ["", "bert."])
def test_one_common_prefix(base_prefix: str) -> None:
    expert_prefix = "bert." if not base_prefix else ""
    names = ["encoder.0.weight", "encoder.1.weight", "embeddings.weight"]
    found = aligned(of(*[base_prefix + n for n in names]), of(*[expert_prefix + n for n in names]))
    assert found.experts["e"].names == {base_prefix + n: expert_prefix + n for n in names}
    assert any("'bert.'" in note for note in found.notes)


def test_prefix_with_a_head_that_is_optional() -> None:
    names = ["encoder.0.weight", "encoder.1.weight"]
    expert = of(*[f"bert.{n}" for n in names], "classifier.weight")
    found = aligned(of(*names), expert, optional=["classifier.*"])
    assert found.experts["e"].skipped == {"classifier.weight": "optional, left out"}
    refused("1 extra: classifier.weight", base=of(*names), expert=expert)


def test_prefix_of_a_few_names_is_no_common_prefix() -> None:
    refused("3 extra: x.a.w, q, r", base=of("a.w", "b.w", "c.w"), expert=of("x.a.w", "q", "r"))


def test_output_keeps_the_bases_order() -> None:
    assert aligned(of("b", "a", "c"), of("a", "c", "b")).names == ("b", "a", "c")


def test_no_base_the_first_expert_is_the_reference() -> None:
    found = align(None, {"x": of("a", "b"), "y": of("module.b", "module.a")})
    assert found.base is None and found.names == ("a", "b")
    assert found.experts["y"].names == {"a": "module.a", "b": "module.b"}


def test_nothing_to_align() -> None:
    with pytest.raises(WeightsError, match="nothing to align"):
        align(None, {})


def test_an_expert_named_base() -> None:
    found = align(of("a"), {"base": of("module.a")})
    assert found.base is not None and found.base.names == {"a": "a"}
    assert found.experts["base"].names == {"a": "module.a"}


# --- recomputed buffers ---------------------------------------------------------------------

MASK = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.rotary_emb.inv_freq": torch.ones(4),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "h.0.attn.bias": MASK,
    "h.0.attn.bias ": MASK.float(),
    "embeddings.position_ids": torch.arange(4),
    "bert.embeddings.token_type_ids": torch.zeros(1, 4, dtype=torch.int64),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_recomputed_buffers_may_be_absent_or_extra(name: str) -> None:
    buffer, name = BUFFERS[name], name.strip()
    with_it, without = MemoryWeights({"a": torch.ones(1), name: buffer}), of("a")
    found = aligned(with_it, without)
    assert name in found.names and "recomputed" in found.experts["e"].absent[name]
    found = aligned(without, with_it)
    assert found.names == ("a",) and "recomputed" in found.experts["e"].skipped[name]
    assert any("recomputed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("h.0.attn.bias", DType.F32, (16,)),
        ("swin.attn.bias", DType.F32, (1, 4, 8, 8)),
        ("embeddings.position_ids", DType.F32, (4, 8)),
        ("my_inv_freq", DType.F32, (4,)),
        ("bn.num_batches_tracked", DType.I64, ()),
        ("embeddings.position_embeddings.weight", DType.F32, (4, 4)),
    ],
)
def test_learned_tensors_that_look_alike(name: str, dtype: DType, shape: tuple[int, ...]) -> None:
    assert recomputed(TensorInfo(name, dtype, shape)) is None


# --- tied -----------------------------------------------------------------------------------


def test_absent_tied_head_is_the_embedding() -> None:
    found = aligned(of(E, "a"), of(E, "a"), TIED)
    assert found.names == (E, "a") and found.aliases == {}


def test_head_stored_twice_in_the_base_counts_once() -> None:
    tensor = torch.ones(2, 3)
    base = MemoryWeights({E: tensor, "a": torch.ones(1), H: tensor.clone()})
    found = aligned(base, of(E, "a"), TIED)
    assert found.names == (E, "a") and found.aliases == {H: E}
    assert found.base is not None and found.base.skipped == {H: "a second copy of a tied tensor"}


def test_head_stored_twice_in_the_expert_is_skipped() -> None:
    tensor = torch.ones(2, 3)
    found = aligned(of(E), MemoryWeights({E: tensor, H: tensor.clone()}), TIED)
    assert found.experts["e"].skipped == {H: "a second copy of a tied tensor"}


def test_only_the_head_is_stored() -> None:
    found = aligned(of(E), of(H), TIED)
    assert found.experts["e"].names == {E: H}
    assert any("is absent; tied" in note for note in found.notes)


def test_tied_here_and_untied_there_is_refused() -> None:
    refused("tied here and untied there", H, "--untie", "mine",
            base=of(E, "a"), expert=of(E, H, "a"), tied=TIED)  # fmt: skip


def test_untie_gives_every_name_an_output() -> None:
    found = aligned(of(E, "a"), of(E, H, "a"), TIED, untie=True)
    assert set(found.names) == {E, H, "a"}
    assert found.base is not None and found.base.names[H] == E
    assert found.experts["e"].names[H] == H
    assert any("untied in the output" in note for note in found.notes)


def test_untied_base_and_tied_expert() -> None:
    """The layout of an untied base names no groups; the expert's own config tells."""
    tied = of(E, "a", config={"tie_word_embeddings": True})
    refused("tied here and untied there", base=of(E, H, "a"), expert=tied)
    found = aligned(of(E, H, "a"), tied, untie=True)
    assert found.experts["e"].names == {E: E, H: E, "a": "a"}


def test_missing_head_that_nothing_ties() -> None:
    refused("1 missing: lm_head.weight", base=of(E, H), expert=of(E))


def test_a_difference_in_the_last_element_unties() -> None:
    tensor = torch.ones(3_000_000)
    other = tensor.clone()
    other[-1] = 2
    refused("tied here", base=MemoryWeights({E: tensor}),
            expert=MemoryWeights({E: tensor, H: other}), tied=TIED)  # fmt: skip


def test_shared_storage_is_not_read() -> None:
    tensor = torch.ones(2, 3)
    expert = MemoryWeights({E: tensor, H: tensor})
    expert.read = None  # type: ignore[method-assign, assignment]
    assert aligned(of(E), expert, TIED).names == (E,)


# --- anything else --------------------------------------------------------------------------


def test_missing_and_extra_are_listed() -> None:
    base, expert = of(*[f"l.{i}" for i in range(8)]), of("l.0", "new")
    refused("7 missing: l.1, l.2, l.3, l.4, l.5, …", "1 extra: new", "expert mine",
            base=base, expert=expert)  # fmt: skip


def test_optional_and_missing_comes_from_the_reference() -> None:
    found = aligned(of("a", "pooler.weight"), of("a"), optional=["pooler.*"])
    assert "pooler.weight" in found.experts["e"].absent


def test_open_gives_what_align_takes() -> None:
    module = torch.nn.Linear(2, 2)
    found = align(open_weights(module), {"e": open_weights(module.state_dict())})
    assert found.names == ("weight", "bias")

"""A checkup finds what stands against a merge, says how bad it is, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llamas import llama, lora, saved, tuned
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fusewright.engine.check import Checkup, check_models, descent
from fusewright.errors import WeightsError
from fusewright.weights import open_weights
from fusewright.weights.files import COUNT


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


@pytest.fixture
def child(base: Path) -> Path:
    return saved(tuned(llama(), 1), base.parent / "child")


def found(checkup: Checkup, *words: str) -> list[tuple[str, str]]:
    """Severities and subjects of the findings that contain every word."""
    return [
        (one.severity, one.subject)
        for one in checkup.findings
        if all(word in f"{one.subject} {one.message} {one.fix}" for word in words)
    ]


def severities(checkup: Checkup) -> set[str]:
    return {one.severity for one in checkup.findings}


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def test_nothing_stands_against_fine_tunes(base: Path, child: Path) -> None:
    other = saved(tuned(llama(), 2), base.parent / "other")
    done = check_models(base, {"a": child, "b": other})
    assert done.ok and done.findings == ()
    assert [e.descent.verdict for e in done.experts if e.descent] == ["yes", "yes"]
    assert done.cosines["a"]["b"] == pytest.approx(0, abs=0.1)


def test_small_noise_is_measured_as_what_it_is(base: Path, child: Path) -> None:
    (expert,) = check_models(base, {"a": child}, full=True).experts
    assert expert.descent is not None
    assert expert.descent.relative_norm == pytest.approx(0.05, rel=0.05)
    assert expert.descent.cosine == pytest.approx(1 / math.sqrt(1 + 0.05**2), abs=2e-4)
    matrices = [t for t in load_file(base / "model.safetensors").values() if t.dim() > 1]
    assert expert.descent.elements == sum(t.numel() for t in matrices)


def test_another_initialisation_does_not_descend_though_its_norms_are_alike(base: Path) -> None:
    stranger = saved(llama(seed=7), base.parent / "stranger")
    done = check_models(base, [stranger])
    (expert,) = done.experts
    assert expert.descent is not None and expert.descent.verdict == "no"
    assert abs(expert.descent.cosine or 1) < 0.05
    assert expert.descent.relative_norm == pytest.approx(math.sqrt(2), rel=0.05)
    assert found(done, "descends: no") == [("warning", "stranger: descent")] and done.ok


def test_a_model_in_between_is_doubtful(base: Path) -> None:
    far = saved(tuned(llama(), 1, size=0.8), base.parent / "far")
    done = check_models(base, [far])
    assert found(done, "descends: doubtful") == [("warning", "far: descent")]


def test_a_scaled_base_is_doubtful_whatever_its_cosine(base: Path) -> None:
    """Its direction is the base's, but not its length."""
    thrice = saved(llama(), base.parent / "thrice")
    with_tensors(thrice, lambda tensors: tensors.update({k: 3 * v for k, v in tensors.items()}))
    (expert,) = check_models(base, [thrice]).experts
    assert expert.descent is not None and expert.descent.verdict == "doubtful"
    assert expert.descent.cosine == pytest.approx(1)
    assert expert.descent.relative_norm == pytest.approx(2)


def test_the_base_itself_adds_nothing(base: Path) -> None:
    copy = saved(llama(), base.parent / "copy")
    assert found(check_models(base, [copy]), "identical to the base") == [
        ("warning", "copy: weights")
    ]


def test_two_names_of_one_expert_are_told(base: Path, child: Path) -> None:
    half = saved(tuned(llama(), 1, size=0.025), base.parent / "half")
    third = saved(tuned(llama(), 3), base.parent / "third")
    done = check_models(base, {"one": child, "two": half, "three": third})
    assert found(done, "point the same way") == [("info", "one, two")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_errors(base: Path, child: Path, bad: float) -> None:
    with_tensors(child, lambda tensors: tensors["model.norm.weight"].__setitem__(3, bad))
    done = check_models(base, [child])
    assert not done.ok
    assert found(done, "1 values are NaN or infinite") == [("error", "child: model.norm.weight")]


def test_a_base_with_nan_is_the_bases_fault(base: Path, child: Path) -> None:
    with_tensors(base, lambda tensors: tensors["model.norm.weight"].__setitem__(3, math.nan))
    assert found(check_models(base, [child]), "NaN") == [("error", "base: model.norm.weight")]


def test_another_rope_is_a_warning_and_nothing_else(base: Path) -> None:
    model = tuned(llama(), 1)
    longer = saved(model, base.parent / "longer")
    rewritten(longer, lambda c: c["rope_parameters"].update(rope_theta=1e6))
    done = check_models(base, [longer])
    assert found(done, "rope_theta", "1000000.0") == [("warning", "longer: rope_theta")]
    assert len(done.findings) == 1 and done.ok


def test_a_resized_vocabulary_is_an_error_and_the_rest_still_descends(base: Path) -> None:
    model = tuned(llama(), 1)
    model.resize_token_embeddings(104)
    done = check_models(base, [saved(model, base.parent / "wide")])
    assert not done.ok
    assert found(done, "(96, 32) in the base, (104, 32)") == [
        ("error", "wide: lm_head.weight"), ("error", "wide: model.embed_tokens.weight")
    ]  # fmt: skip
    assert found(done, "vocab_size") == [("error", "wide: vocab_size")]
    (expert,) = done.experts
    assert expert.descent is not None and expert.descent.verdict == "yes"


def test_missing_and_extra_layers_are_errors(base: Path) -> None:
    deeper = saved(llama(num_hidden_layers=3), base.parent / "deeper")
    assert ("error", "deeper: model.layers.2.mlp.up_proj.weight") in found(
        check_models(base, [deeper]), "the base lacks it"
    )
    assert ("error", "base: model.layers.2.mlp.up_proj.weight") in found(
        check_models(deeper, [base]), "the expert lacks it"
    )


def test_what_every_merge_mends_is_no_finding(base: Path, child: Path) -> None:
    """Wrappers' prefixes, and buffers that the model recomputes."""

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        wrapped = {f"_orig_mod.{name}": t for name, t in tensors.items()}
        wrapped["_orig_mod.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors.clear()
        tensors.update(wrapped)

    done = check_models(base, [with_tensors(child, wrap)])
    assert done.findings == ()


def test_tied_here_and_untied_there_is_an_error_with_its_option(tmp_path: Path) -> None:
    tied = saved(llama(tie_word_embeddings=True), tmp_path / "tied")
    loose = saved(tuned(llama(), 1), tmp_path / "loose")
    for one, other in ((tied, loose), (loose, tied)):
        done = check_models(one, [other])
        assert ("error", f"{other.name}: tie_word_embeddings") in found(done, "--untie")
    (refused,) = found(done, "tied here and untied there", "--untie")
    assert refused[0] == "error"


def test_another_dtype_is_only_said(base: Path) -> None:
    half = saved(tuned(llama(), 1).bfloat16(), base.parent / "half")
    done = check_models(base, [half])
    assert found(done, "float32 in the base, bfloat16") and severities(done) == {"info"}


def vocabulary(path: Path, words: list[str]) -> None:
    ids = {word: index for index, word in enumerate(words)}
    Tokenizer(WordLevel(ids, unk_token=words[0])).save(str(path / "tokenizer.json"))


def test_token_ids_that_disagree_are_an_error(base: Path, child: Path) -> None:
    vocabulary(base, ["<unk>", "the", "cat"])
    vocabulary(child, ["<unk>", "cat", "the"])
    done = check_models(base, [child])
    assert found(done, "2 tokens have other ids") == [("error", "child: token ids")]
    vocabulary(child, ["<unk>", "the", "cat"])
    assert check_models(base, [child]).findings == ()


def test_a_broken_tokenizer_is_a_finding(base: Path, child: Path) -> None:
    vocabulary(base, ["<unk>", "the"])
    (child / "tokenizer.json").write_text("{")
    done = check_models(base, [child])
    assert not done.ok and found(done, "tokenizer.json")


def test_an_adapter_over_its_base_is_fine(base: Path) -> None:
    vocabulary(base, ["<unk>", "the"])  # the adapter has none: it uses this one
    adapter = lora(base, base.parent / "adapter")
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = check_models(base, [adapter])
    assert done.ok and done.findings == ()
    (expert,) = done.experts
    assert expert.descent is not None and expert.descent.verdict == "yes"


@pytest.mark.parametrize(
    ("declared", "fine"),
    [("org/base", True), ("org/Base@main", True), ("org/another", False)],
)
def test_an_adapters_declared_base_is_compared_by_name(
    base: Path, declared: str, fine: bool
) -> None:
    adapter = lora(base, base.parent / "adapter", declared=declared)
    warned = found(check_models(base, [adapter]), "declares the base", declared)
    assert warned == ([] if fine else [("warning", "adapter: base_model_name_or_path")])


def test_licences_are_read_from_cards(base: Path) -> None:
    closed = saved(tuned(llama(), 1), base.parent / "closed", card="cc-by-nc-4.0")
    silent = saved(tuned(llama(), 2), base.parent / "silent")
    (silent / "README.md").unlink()
    done = check_models(base, [closed, silent])
    assert found(done, "cc-by-nc-4.0", "may restrict") == [("warning", str(closed))]
    assert found(done, "no licence is stated") == [("warning", str(silent))]
    assert found(done, "different licences") == [("info", "license")]


def test_an_expert_that_cannot_be_opened_does_not_hide_the_others(base: Path, child: Path) -> None:
    broken = saved(tuned(llama(), 2), base.parent / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-10])
    done = check_models(base, [broken, child])
    assert not done.ok and [e.name for e in done.experts] == ["broken", "child"]
    (first, second) = done.experts
    assert first.descent is None and first.findings[0].severity == "error"
    assert second.findings == () and second.descent is not None
    with pytest.raises(WeightsError):
        check_models(broken, [child])


def test_an_expert_with_ambiguous_names_is_a_finding(base: Path, child: Path) -> None:
    twice = saved(tuned(llama(), 2), base.parent / "twice")
    with_tensors(twice, lambda t: t.update({"_orig_mod.lm_head.weight": t["lm_head.weight"] + 1}))
    done = check_models(base, [twice, child])
    assert found(done, "two tensors have the same name") and not done.ok
    assert done.experts[0].descent is None and done.experts[1].findings == ()


def test_results_are_plain_and_every_row_is_as_long_as_its_heading(base: Path) -> None:
    stranger = saved(llama(seed=7, vocab_size=97), base.parent / "stranger")
    done = check_models(base, [stranger])
    assert json.loads(json.dumps(done.to_json(), allow_nan=False))["ok"] is False
    tables = done.tables()
    assert tables[0].title == "Will these merge?" and tables[0].rows
    assert tables[0].rows[0][0] == "no"
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)


def test_models_in_memory_can_be_checked() -> None:
    base = llama()
    done = check_models(base, {"a": tuned(base, 1), "b": llama(seed=3)})
    assert [e.descent.verdict for e in done.experts if e.descent] == ["yes", "no"]


def big(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {f"l.{i}": scale * torch.randn(1000, 3000, generator=draws) for i in range(3)}


def test_a_sample_reads_little_and_says_so(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("other", 1)):
        save_file(big(seed), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "other")]
    before = COUNT.bytes_read
    done = check_models(paths[0], [paths[1]])
    assert COUNT.bytes_read - before <= 2 * 8 * 2**20 + 10_000
    assert not done.full and not any(t.title.endswith("every element)") for t in done.tables())
    before = COUNT.bytes_read
    done = check_models(paths[0], [paths[1]], full=True)
    assert COUNT.bytes_read - before >= 2 * 36_000_000 and done.full


def test_full_finds_what_a_sample_misses() -> None:
    base, other = big(0), big(0)
    other["l.1"].view(-1)[1_500_000] = math.nan  # in no block of the sample
    assert check_models(base, [other]).ok
    assert not check_models(base, [other], full=True).ok


def test_descent_reads_at_most_its_sample_and_spreads_it() -> None:
    base = big(0)
    other = {name: t + 0.1 * big(1)[name] for name, t in base.items()}
    opened = open_weights(base), open_weights(other)
    seen = descent(*opened, list(base))
    assert seen.verdict == "yes" and seen.elements * 8 <= 4 * 2**20
    assert seen.relative_norm == pytest.approx(0.1, rel=0.01)
    last = {**base, "l.2": big(1)["l.2"]}  # a third of it is a stranger's
    assert descent(opened[0], open_weights(last), list(base)).verdict == "doubtful"


def test_descent_takes_the_experts_own_names_and_passes_over_other_shapes() -> None:
    base = {"a": torch.randn(8, 8), "b": torch.randn(4, 4), "n": torch.ones(8)}
    other = {"x.a": base["a"] * 1.01, "x.b": torch.randn(5, 4), "x.n": torch.ones(8)}
    names = {key: f"x.{key}" for key in base}
    seen = descent(open_weights(base), open_weights(other), names)
    assert seen.verdict == "yes" and seen.elements == 64


def test_without_evidence_descent_is_doubtful() -> None:
    empty = descent(open_weights({"i": torch.arange(4)}), open_weights({"i": torch.arange(4)}), "i")
    assert (empty.verdict, empty.cosine, empty.elements) == ("doubtful", None, 0)
    zeros = {"w": torch.zeros(4, 4)}
    assert descent(open_weights(zeros), open_weights({"w": torch.ones(4, 4)}), "w").verdict == (
        "doubtful"
    )

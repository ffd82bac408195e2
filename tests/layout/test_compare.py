"""What `check` says of two checkpoints before any weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import WeightsError
from fusewright.layout.compare import (
    compare_configs,
    compare_licences,
    compare_shapes,
    compare_vocabularies,
    licences,
)

BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "vocab_size": 50, "rope_theta": 1e4,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_labels": 2, "bos_token_id": 1,
    "text_config": {"num_hidden_layers": 2},
}  # fmt: skip


def test_layout_needs_neither_torch_nor_transformers() -> None:
    code = ("import fusewright.layout, fusewright.layout.compare, sys; "
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "severity", "subject"),
    [
        ({"model_type": "mistral"}, "error", "model_type"),
        ({"hidden_size": 32}, "error", "hidden_size"),
        ({"vocab_size": 51}, "error", "vocab_size"),
        ({"tie_word_embeddings": True}, "error", "tie_word_embeddings"),
        ({"text_config": {"num_hidden_layers": 3}}, "error", "text_config.num_hidden_layers"),
        ({"rope_theta": 1e6}, "warning", "rope_theta"),
        ({"rope_scaling": {"type": "yarn"}}, "warning", "rope_type"),
        ({"hidden_act": "gelu"}, "warning", "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "warning", "rms_norm_eps"),
        ({"bos_token_id": 7}, "warning", "bos_token_id"),
        ({"torch_dtype": "float16"}, "info", "dtype"),
        ({"num_labels": 9}, "info", "num_labels"),
        ({"never_heard_of": 9}, "info", "never_heard_of"),
    ],
)
def test_a_config_difference_is_found(change: dict[str, Any], severity: str, subject: str) -> None:
    (finding,) = compare_configs(BASE, BASE | change)
    assert (finding.severity, finding.subject) == (severity, subject)
    assert "base" in finding.message and "expert" in finding.message


def test_equal_configs_have_no_findings_and_noise_is_none() -> None:
    noise = {"transformers_version": "5", "use_cache": True, "attention_dropout": 0.1,
             "_name_or_path": "x", "initializer_range": 0.5}  # fmt: skip
    assert compare_configs(BASE, BASE | noise) == []


def test_old_and_new_spellings_say_the_same() -> None:
    new = {key: value for key, value in BASE.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert compare_configs(BASE, new) == []


def test_rotations_of_each_type_of_layer_are_compared() -> None:
    one = {"rope_parameters": {"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 1e4}}}
    other = {"rope_parameters": {"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 1e5}}}
    (finding,) = compare_configs(one, other)
    assert (finding.severity, finding.subject) == ("warning", "sliding.rope_theta")


@pytest.mark.parametrize(
    ("key", "severity"),
    [("hidden_size", "info"), ("tie_word_embeddings", "warning"), ("torch_dtype", "info")],
)
def test_what_one_leaves_out_may_be_its_default(key: str, severity: str) -> None:
    (finding,) = compare_configs(BASE, {k: v for k, v in BASE.items() if k != key})
    assert finding.severity == severity and "not stated" in finding.message


def test_quantisation_of_one_is_a_warning() -> None:
    (finding,) = compare_configs(BASE, BASE | {"quantization_config": {"bits": 4}})
    assert (finding.severity, finding.subject) == ("warning", "quantization_config")


def test_findings_come_worst_first() -> None:
    found = compare_configs(BASE, BASE | {"num_labels": 9, "rope_theta": 1.0, "vocab_size": 9})
    assert [finding.severity for finding in found] == ["error", "warning", "info"]


# --- shapes ---------------------------------------------------------------------------------------


def test_equal_shapes_have_no_findings() -> None:
    shapes = {"embed.weight": (5, 4), "layers.0.w": (4, 4)}
    assert compare_shapes(shapes, dict(reversed(shapes.items()))) == []


def test_missing_and_extra_tensors_are_told_once_a_pattern() -> None:
    base = {f"layers.{i}.q.weight": (4, 4) for i in range(12)}
    lacks, adds = compare_shapes(base, {"layers.3.k.weight": (4, 4)})
    assert (lacks.subject, lacks.message) == (
        "layers.*.q.weight (12 tensors)", "the expert lacks it"
    )  # fmt: skip
    assert (adds.subject, adds.message) == ("layers.3.k.weight", "the base lacks it")
    assert {lacks.severity, adds.severity} == {"error"}


@pytest.mark.parametrize(
    ("one", "other", "fix"),
    [((50, 8), (51, 8), "vocabulary"), ((8, 4), (4, 8), "transposed"), ((8,), (2, 4), "one arch")],
)
def test_different_shapes_say_what_to_do(
    one: tuple[int, ...], other: tuple[int, ...], fix: str
) -> None:
    (finding,) = compare_shapes({"w": one}, {"w": other})
    assert finding.severity == "error" and fix in finding.fix
    assert str(one) in finding.message and str(other) in finding.message


# --- vocabularies ---------------------------------------------------------------------------------


def _tokenizer(folder: Path, vocab: Any, added: Any = (), merges: Any = ()) -> Path:
    folder.mkdir()
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    content = {"model": model, "added_tokens": [{"content": t, "id": i} for t, i in added]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_equal_tokenizers_have_no_findings(tmp_path: Path) -> None:
    one = _tokenizer(tmp_path / "a", {"x": 0, "y": 1}, [("<s>", 2)], ["x y"])
    other = _tokenizer(tmp_path / "b", {"y": 1, "x": 0, "<s>": 2}, (), [["x", "y"]])
    assert compare_vocabularies(one, other) == []


def test_moved_tokens_are_counted_with_examples(tmp_path: Path) -> None:
    tokens = {f"t{i}": i for i in range(10)}
    moved = {token: 9 - index for token, index in tokens.items()}
    one, other = _tokenizer(tmp_path / "a", tokens), _tokenizer(tmp_path / "b", moved)
    (finding,) = compare_vocabularies(one, other)
    assert finding.severity == "error"
    assert finding.message.startswith("10 tokens have other ids: 't0' 0 -> 9")
    assert finding.message.count("->") == 5 and finding.message.endswith("...")


def test_a_reused_id_is_an_error_and_an_added_one_a_warning(tmp_path: Path) -> None:
    base = _tokenizer(tmp_path / "a", {"x": 0, "<unused>": 1})
    expert = _tokenizer(tmp_path / "b", {"x": 0, "<tool>": 1}, [("<think>", 2)])
    reused, added = compare_vocabularies(base, expert)
    assert reused.severity == "error" and "1: '<unused>' -> '<tool>'" in reused.message
    assert added.severity == "warning" and "'<think>' 2" in added.message


def test_tokens_that_the_expert_lacks_are_a_warning(tmp_path: Path) -> None:
    base = _tokenizer(tmp_path / "a", {"x": 0, "y": 1, "z": 2})
    (finding,) = compare_vocabularies(base, _tokenizer(tmp_path / "b", {"x": 0}))
    assert finding.severity == "warning" and "lacks 2 tokens" in finding.message


def test_other_merges_split_text_differently(tmp_path: Path) -> None:
    base = _tokenizer(tmp_path / "a", {"x": 0}, (), ["x y", "y z"])
    (finding,) = compare_vocabularies(base, _tokenizer(tmp_path / "b", {"x": 0}, (), ["y z"]))
    assert (finding.severity, finding.subject) == ("warning", "merges")


def test_unigram_ids_are_positions(tmp_path: Path) -> None:
    base = _tokenizer(tmp_path / "a", [["x", -1.0], ["y", -2.0]])
    assert compare_vocabularies(base, _tokenizer(tmp_path / "b", {"x": 0, "y": 1})) == []


def test_vocab_files_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/vocab.txt").write_text("x\ny\u2028\nz\n")  # \u2028 is part of a token
    (tmp_path / "b/vocab.json").write_text(json.dumps({"x": 0, "y\u2028": 1}))
    (tmp_path / "b/added_tokens.json").write_text(json.dumps({"z": 2}))
    assert compare_vocabularies(tmp_path / "a", tmp_path / "b") == []


def test_sentencepiece_is_compared_by_its_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    (finding,) = compare_vocabularies(tmp_path / "a", tmp_path / "b")
    assert (finding.severity, finding.subject) == ("error", "tokenizer.model")
    assert compare_vocabularies(tmp_path / "a", tmp_path / "c") == []


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    with_one = _tokenizer(tmp_path / "a", {"x": 0})
    (tmp_path / "b").mkdir()
    assert compare_vocabularies(with_one, tmp_path / "b")[0].severity == "info"
    assert compare_vocabularies(tmp_path / "b", with_one)[0].severity == "warning"
    assert compare_vocabularies(tmp_path / "b", tmp_path / "b") == []


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model": 3}', '{"model": {"vocab": {"x": "0"}}}', '{"model": {"vocab": [3]}}',
     '{"model": {"vocab": {}}, "added_tokens": [{}]}', "[" * 100_000],
)  # fmt: skip
def test_a_malformed_tokenizer_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json") as caught:
        compare_vocabularies(tmp_path, tmp_path)
    assert caught.value.fix


# --- licences -------------------------------------------------------------------------------------


def _card(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return folder


def test_licences_are_read_from_front_matter(tmp_path: Path) -> None:
    cards = {
        "a": ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A\n", "apache-2.0"),
        "b": ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        "c": ("---\nlicense: [mit, cc0-1.0]\n---\n", "mit; cc0-1.0"),
        "d": ("# No front matter\nlicense: mit\n", None),
        "e": ("---\nlicense: mit\n", None),
    }
    folders = [_card(tmp_path / name, text) for name, (text, _) in cards.items()]
    assert list(licences(folders).values()) == [expected for _, expected in cards.values()]
    assert licences([tmp_path]) == {tmp_path: None}


def test_missing_restricting_and_different_licences_are_told(tmp_path: Path) -> None:
    free = _card(tmp_path / "a", "---\nlicense: mit\n---\n")
    bound = _card(tmp_path / "b", "---\nlicense: cc-by-nc-4.0\n---\n")
    none = _card(tmp_path / "c", "# nothing\n")
    assert compare_licences([free, free]) == []
    found = compare_licences([free, bound, none])
    assert [finding.severity for finding in found] == ["warning", "warning", "info"]
    assert "cc-by-nc-4.0" in found[0].message and "no licence" in found[1].message


def test_front_matter_that_is_not_yaml_is_told_not_skipped(tmp_path: Path) -> None:
    broken = _card(tmp_path / "a", "---\nlicense: [mit\n---\n")
    with pytest.raises(WeightsError, match="front matter"):
        licences([broken])
    (finding,) = compare_licences([broken])
    assert finding.severity == "warning"

"""Two configs, key by key: which differences change what the weights mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fusewright.layout.compare.finding import Finding, Severity, worst_first


class Meaning(NamedTuple):
    """What it means when the keys that ``pattern`` matches (last component) differ."""

    pattern: str
    severity: Severity
    why: str
    fix: str = ""


_SIZES = (
    r"hidden_size|n_embd|d_model|d_ff|d_kv|dim|hidden_dim|n_inner|\w*intermediate_size|head_dim"
    r"|num_hidden_layers|n_layers?|num_layers|num_decoder_layers|(en|de)coder_layers|depths?"
    r"|num_attention_heads|n_heads?|num_heads|num_key_value_heads|num_kv_heads|hidden_sizes"
    r"|(en|de)coder_(attention_heads|ffn_dim)|num_local_experts|num_experts|n_routed_experts"
    r"|projection_dim|patch_size|num_channels"
)

#: Ordered: the first that matches decides. What no rule names is "info".
MEANINGS = (
    Meaning(r"model_type", "error", "the architectures differ",
            "choose models of one architecture"),
    Meaning(_SIZES, "error", "tensor shapes or their division into heads differ",
            "choose models of one size"),
    Meaning(r"vocab_size", "error", "embeddings and heads have different rows",
            "give both models one vocabulary, or leave embeddings and head out of the merge"),
    Meaning(r"tie_word_embeddings", "error", "the output head is tied in one and not in the other",
            "--untie"),
    Meaning(r"quantization_config", "warning", "one is quantised",
            "merge unquantised checkpoints where they exist"),
    Meaning(r"rope_\w+|partial_rotary_factor|factor|beta_\w+|\w+_freq_factor|\w+_factor|mscale\w*",
            "warning", "queries and keys were trained for other rotations",
            "keep the value of the expert whose context length you need, and evaluate there"),
    Meaning(r"hidden_act\w*|activation_function|dense_act_fn|feed_forward_proj|hidden_activation",
            "warning", "the weights were trained under another activation function"),
    Meaning(r"\w*norm_eps\w*|layer_norm_epsilon|layernorm_epsilon", "warning",
            "norms divide by slightly different values"),
    Meaning(r"(use_)?sliding_window|attention_window|layer_types|max_window_layers", "warning",
            "the models attend to different ranges"),
    Meaning(r"\w*softcapping|logit_scale\w*|attention_multiplier|residual_multiplier"
            r"|embedding_multiplier|scale_\w+|query_pre_attn_scalar|attention_bias|mlp_bias",
            "warning", "the same weights give different outputs"),
    Meaning(r"num_experts_per_tok|norm_topk_prob", "warning", "tokens are routed differently"),
    Meaning(r"(bos|eos|pad|decoder_start|mask|sep|cls|image)_token_(id|index)", "warning",
            "a special token has another id", "compare the tokenizers; keep the base's"),
    Meaning(r"dtype", "info", "stored in different precision", "state --dtype"),
    Meaning(r"architectures", "info", "the heads may differ"),
    Meaning(r"num_labels|id2label|label2id|problem_type", "info",
            "the heads answer different questions", "keep each expert's own head"),
)  # fmt: skip

#: Says nothing of the weights' meaning.
_NOISE = re.compile(
    r"_name_or_path|transformers_version|use_cache|\w*dropout\w*|\w*_pdrop|initializer_\w+|auto_map"
    r"|output_\w+|return_dict|gradient_checkpointing|_\w+|pretraining_tp|router_aux_loss_coef"
)
_ALIASES = {"torch_dtype": "dtype"}
#: Compared as one value.
_WHOLE = frozenset({"id2label", "label2id", "quantization_config"})
#: Leaving it out says something too.
_TELLING = frozenset({"tie_word_embeddings", "quantization_config", "rope_type", "factor"})
_ROPE = ("rope_parameters", "rope_scaling")
_ABSENT = None  # null says the same as leaving the key out


def compare_configs(base: Mapping[str, Any], expert: Mapping[str, Any]) -> list[Finding]:
    """What differs between two parsed config.json, worst first.

    Old and new spellings are one (``torch_dtype``; ``rope_theta`` and ``rope_scaling`` in
    ``rope_parameters``). A key that one config leaves out may have its default value there: such
    a difference is "info", and a warning for ties, whose default depends on the family.
    """
    mine, theirs = _flat(base), _flat(expert)
    findings = []
    for key in sorted(mine | theirs):
        one, other = mine.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if one != other:
            findings.append(_finding(key, one, other))
    return worst_first(findings)


def _finding(key: str, one: object, other: object) -> Finding:
    last = key.rpartition(".")[2]
    known = (rule for rule in MEANINGS if re.fullmatch(rule.pattern, last))
    rule = next(known, Meaning("", "info", "the configs differ"))
    severity = rule.severity
    if (one is _ABSENT or other is _ABSENT) and severity != "info":
        severity = "warning" if last in _TELLING else "info"
    message = f"{rule.why}: {_show(one)} in the base, {_show(other)} in the expert"
    return Finding(severity, key, message, rule.fix)


def _show(value: object) -> str:
    if value is _ABSENT:
        return "not stated"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys without noise, old spellings made new."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        key = _ALIASES.get(key, key)
        if _NOISE.fullmatch(key):
            continue
        if key in _ROPE and isinstance(value, Mapping):
            flat |= _rope(value, prefix)
        elif isinstance(value, Mapping) and key not in _WHOLE:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _rope(parameters: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Rotary parameters as if at the top; the default type is the same as stating nothing."""
    found: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):  # one set for each type of layer
            found |= _rope(value, f"{prefix}{key}.")
        elif key in ("type", "rope_type"):
            found |= {} if value == "default" else {f"{prefix}rope_type": value}
        elif key == "original_max_position_embeddings":
            found[f"{prefix}rope_{key}"] = value
        else:
            found[f"{prefix}{key}"] = value
    return found

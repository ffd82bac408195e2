"""What an adapter_config.json says, and whether it can be added to weights exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import WeightsError

# Fields that decide how an adapter is trained, chosen or run, not what its tensors add.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
})  # fmt: skip
_USED = frozenset({
    "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "peft_type",
    "r", "rank_pattern", "use_dora", "use_rslora",
})  # fmt: skip
# Initialisations that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoftQ …) subtract
# their start from it, so that the adapter belongs to a base that is nowhere on disk.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of a PEFT LoRA config that decides what the adapter adds."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    in_first: bool
    lora_bias: bool

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilised, with the module's own alpha."""
        alpha = _resolve(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def rank_of(self, module: str) -> int:
        return int(_resolve(self.rank_pattern, module, self.rank))


def parse_config(config: Mapping[str, Any], where: object) -> LoraConfig:
    """Raises WeightsError for another kind of adapter, or a field that changes its meaning in a
    way that is not known here (every field that is set is accounted for)."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise WeightsError(
            "not a LoRA adapter", where=where, expected="peft_type LORA", found=kind,
            fix="merge it with peft first: model.merge_and_unload().save_pretrained(...)",
        )  # fmt: skip
    unknown = [key for key, value in config.items() if value and key not in _HARMLESS | _USED]
    if unknown:
        raise WeightsError(
            "the adapter uses features that cannot be added to weights exactly here",
            where=where, expected="plain LoRA, rsLoRA or DoRA",
            found=", ".join(f"{key}: {config[key]!r}"[:60] for key in unknown),
            fix="merge it with peft first: model.merge_and_unload().save_pretrained(...)",
        )  # fmt: skip
    _refuse_moved_base(config.get("init_lora_weights"), where)
    try:
        return LoraConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rank_pattern={k: int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
            rank_stabilised=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            in_first=bool(config.get("fan_in_fan_out")),
            lora_bias=bool(config.get("lora_bias")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            "adapter config lacks r or lora_alpha, or they are not numbers",
            where=where, found=f"{type(error).__name__}: {error}",
        ) from error  # fmt: skip


def _refuse_moved_base(start: object, where: object) -> None:
    if start not in _PLAIN_STARTS:
        raise WeightsError(
            "the adapter's initialisation changed its base, so it does not fit the original",
            where=where, expected="init_lora_weights: true", found=f"init_lora_weights: {start}",
            fix="peft_model.save_pretrained(OUT, path_initial_model_for_weight_conversion=INIT)",
        )  # fmt: skip


def _resolve(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the end of the module's name, from a dot on."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise WeightsError(
                "a pattern in the adapter's config is not a regular expression",
                where=key, found=str(error),
            ) from error  # fmt: skip
    return default

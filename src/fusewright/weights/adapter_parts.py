"""The tensors of a LoRA adapter's file, sorted by what they do to which base tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import WeightsError
from .adapter_config import LoraConfig
from .module_names import module_names
from .spec import Weights

_PIECE = re.compile(
    r"(?P<module>.+)\."
    r"(?P<piece>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
ADAPTER_PREFIX = "base_model.model."


@dataclass(slots=True)
class Pieces:
    """The names, in the adapter's file, of one module's factors."""

    module: str
    down: str = ""  # A: r x in
    up: str = ""  # B: out x r
    magnitude: str = ""  # DoRA
    bias: str = ""  # lora_B.bias
    embedding: bool = False


@dataclass(slots=True)
class Parts:
    """Every tensor of the adapter's file, by target: factors for ``factors[weight]``, additions
    to ``biases[bias]``, whole new values for ``replaced[tensor]``. Targets are base names."""

    factors: dict[str, Pieces] = field(default_factory=dict)
    biases: dict[str, Pieces] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sort_parts(
    file: Iterable[str], base: Weights, config: LoraConfig, where: object
) -> Parts:
    """The parts of a file with these names. Raises WeightsError for a tensor whose role is not
    known, a factor without its partner, or a factor for a tensor that the base does not have."""
    pieces, whole = _split(file, where)
    for one in pieces.values():
        _complete(one, config, where)
    prefix, known, notes = _naming(pieces, whole, base)
    parts = Parts(notes=notes)
    for module, one in pieces.items():
        target = _apply(prefix, module)
        parts.factors[_find(f"{target}.weight", known, one.down, where)] = one
        if one.bias:
            parts.biases[_find(f"{target}.bias", known, one.bias, where)] = one
    for name, key in whole.items():
        target = _apply(prefix, name)
        parts.replaced[known.get(target, target)] = key
    new = [name for name in parts.replaced if name not in base]
    if new:
        parts.notes.append(f"in the adapter, not in the base: {', '.join(new)}")
    return parts


def _split(file: Iterable[str], where: object) -> tuple[dict[str, Pieces], dict[str, str]]:
    pieces: dict[str, Pieces] = {}
    whole: dict[str, str] = {}
    for key in file:
        name = key.removeprefix(ADAPTER_PREFIX)
        found = _PIECE.fullmatch(name)
        if found:
            module, piece = found["module"].replace(".base_layer", ""), found["piece"]
            _place(pieces.setdefault(module, Pieces(module)), piece, key)
            continue
        if ".lora_" in name or "trainable_tokens" in name:
            raise WeightsError(
                "a tensor of the adapter has no known role",
                where=f"{where}: {key}", expected="lora_A, lora_B, a magnitude or a whole tensor",
                fix="merge it with peft first: model.merge_and_unload().save_pretrained(...)",
            )  # fmt: skip
        name = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name).replace(".base_layer", "")
        whole[name] = key
    return pieces, whole


def _place(one: Pieces, piece: str, key: str) -> None:
    one.embedding = one.embedding or "embedding" in piece
    if piece.endswith("B.bias"):
        one.bias = key
    elif "magnitude" in piece:
        one.magnitude = key
    elif "_A" in piece:
        one.down = key
    else:
        one.up = key


def _complete(one: Pieces, config: LoraConfig, where: object) -> None:
    if not (one.down and one.up) or bool(one.magnitude) != config.dora:
        parts = {"A": one.down, "B": one.up, "magnitude": one.magnitude}
        raise WeightsError(
            "the adapter's factors are incomplete, or disagree with its config",
            where=f"{where}: {one.module}",
            expected="A, B and magnitude (use_dora: true)" if config.dora else "A and B",
            found=", ".join(label for label, key in parts.items() if key),
        )


def _naming(
    pieces: Mapping[str, Pieces], whole: Mapping[str, str], base: Weights
) -> tuple[str, dict[str, str], list[str]]:
    """How the adapter's names become the base's: a prefix, then a table; and what to note."""
    names = [f"{module}.weight" for module in pieces] or list(whole)
    same = {name: name for name in base}
    if all(name in base for name in names):
        return "", same, []
    prefix = _prefix(names, base)
    if prefix:
        how = "without" if prefix[0] == "+" else "with"
        return prefix, same, [f"the adapter's names are the base's {how} '{prefix[1:]}'"]
    renamed = module_names(base.config, base)
    if all(name in renamed for name in names):
        note = "the adapter names modules as transformers does, the base's files as they were saved"
        return "", renamed, [note]
    return "", same, []


def _prefix(names: list[str], base: Mapping[str, object]) -> str:
    """'+p' or '-p': the one prefix that makes all names the base's; '' if there is none.

    The same base is often saved from its bare model and from the model with a head, which names
    everything one level deeper.
    """
    if not names:
        return ""
    first = names[0]
    choices = {f"+{key.removesuffix(first)}" for key in base if key.endswith("." + first)}
    cut = [i + 1 for i, char in enumerate(first) if char == "."]
    choices |= {f"-{first[:i]}" for i in cut if first[i:] in base}
    fitting = [c for c in choices if all(_apply(c, name) in base for name in names)]
    return fitting[0] if len(fitting) == 1 else ""


def _apply(prefix: str, name: str) -> str:
    if not prefix:
        return name
    return prefix[1:] + name if prefix[0] == "+" else name.removeprefix(prefix[1:])


def _find(target: str, known: Mapping[str, str], key: str, where: object) -> str:
    if target in known:
        return known[target]
    raise WeightsError(
        "the adapter targets a tensor that the base does not have",
        where=f"{where}: {key}", expected=f"{target} in the base",
        found="none (a tied head? another model?)",
        fix="give the base that adapter_config.json names in base_model_name_or_path",
    )  # fmt: skip

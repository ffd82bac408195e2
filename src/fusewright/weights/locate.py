"""Which files of a directory hold its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..errors import WeightsError
from .inside import inside
from .json_text import read_object

MODEL_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
"""OpenCLIP's, whose folders often hold the same model for transformers too: read if alone."""
ROUTED_STEM = "routed"
"""Of models with layers that other libraries would leave out, and that they shall not find."""
DESCRIPTION = f"{ROUTED_STEM}.json"
"""What says of such a model what its layers do."""
ADAPTER_STEMS = ("adapter_model",)
_SUFFIXES = (".safetensors", ".bin")  # the earlier is preferred
_WEIGHT_LIKE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


@dataclass(frozen=True, slots=True)
class Located:
    """The files that hold a model, and the file in which an index, if any, places each tensor."""

    files: tuple[str, ...]
    index: str | None
    weight_map: dict[str, str]
    notes: tuple[str, ...]


def is_routed(root: Path) -> bool:
    """Whether a folder holds such a model, or what is left of one."""
    return (root / DESCRIPTION).is_file() or any(root.glob(f"{ROUTED_STEM}*.safetensors"))


def locate(root: Path, stems: tuple[str, ...] = MODEL_STEMS) -> Located:
    """Find the weights in ``root``: ``STEM.safetensors``, its sharded index, or ``.bin`` likewise.

    safetensors is preferred to ``.bin``. Raises WeightsError if there is nothing, more than one
    answer (a single file and an index; two stems; several variants), or only part of one.
    """
    present = {entry.name for entry in root.iterdir() if not entry.is_dir()}
    groups = (stems, OPEN_CLIP_STEMS, (ROUTED_STEM,)) if stems == MODEL_STEMS else (stems,)
    for group, suffix in product(groups, _SUFFIXES):
        found = _candidates(present, group, suffix)
        if len(found) > 1:
            raise WeightsError(
                "more than one set of weights in the directory",
                where=root, expected="one of them", found=", ".join(found),
                fix=f"move all but one away, e.g. mv '{root / found[-1]}' /elsewhere/",
            )  # fmt: skip
        if found:
            return _describe(root, found[0], present)
    raise _nothing(root, present, stems)


def _candidates(present: set[str], stems: tuple[str, ...], suffix: str) -> list[str]:
    """Single files and indexes; a variant (``model.fp16.safetensors``) only if no plain one is."""
    stem = "|".join(map(re.escape, stems))
    ends = re.escape(suffix)
    plain = re.compile(rf"({stem}){ends}(\.index\.json)?")
    index = rf"({ends}\.index\.[\w-]+|\.[\w-]+{ends}\.index)\.json"
    variant = re.compile(rf"({stem})\.[\w-]+{ends}|({stem}){index}")
    for pattern in (plain, variant):
        found = sorted(name for name in present if pattern.fullmatch(name))
        if found:
            return found
    return []


def _describe(root: Path, name: str, present: set[str]) -> Located:
    if not name.endswith(".json"):
        inside(root, name, root)
        return Located((name,), None, {}, _unused(present, {name}))
    path = inside(root, name, root)
    weight_map = _weight_map(path)
    files = tuple(sorted(set(weight_map.values())))
    for file in files:
        if not inside(root, file, path).exists():
            raise WeightsError(
                "a shard that the index names is missing",
                where=path, expected=file, found="no such file",
                fix="download the model again (hf download ORG/NAME), or copy the missing shard",
            )  # fmt: skip
    return Located(files, name, weight_map, _unused(present, set(files)))


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    good = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not good or not weight_map:
        raise WeightsError(
            "the index has no usable weight_map",
            where=path, expected='{"weight_map": {tensor: file}}', found=repr(weight_map)[:80],
        )  # fmt: skip
    return weight_map


def _unused(present: set[str], used: set[str]) -> tuple[str, ...]:
    others = sorted(name for name in present - used if _WEIGHT_LIKE.search(name))
    return (f"not read, beside the weights: {', '.join(others)}",) if others else ()


def _nothing(root: Path, present: set[str], stems: tuple[str, ...]) -> WeightsError:
    shards = sorted(name for name in present if _SHARD.search(name))
    others = sorted(name for name in present if _WEIGHT_LIKE.search(name))
    expected = f"{stems[0]}.safetensors or {stems[0]}.safetensors.index.json"
    if shards:
        problem, fix = "shards without their index", "download the missing *.index.json as well"
    elif "model_index.json" in present:
        parts = sorted(p.parent.name for p in root.glob("*/config.json"))
        problem, fix = "a diffusers pipeline, not one model", f"name a component: {parts}"
    elif others:
        problem, fix = "no weights under a known name", f"name the file: '{root / others[0]}'"
    else:
        problem, fix = "no weights in the directory", "hf download ORG/NAME, or check the path"
    return WeightsError(
        problem, where=root, expected=expected, found=", ".join(shards or others) or "none", fix=fix
    )

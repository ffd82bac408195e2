"""The files around the weights: config, tokenizer, generation settings, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusewright.engine.inputs import Inputs
from fusewright.engine.origin import Origin, Source
from fusewright.engine.planner import Plan
from fusewright.layout.compare import licences
from fusewright.weights import Weights
from fusewright.weights.staging import Staging

COPIED = (
    "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "model_index.json", "open_clip_config.json",
)  # fmt: skip


def add_artefacts(
    staging: Staging, plan: Plan, inputs: Inputs, fitted: Origin | None = None
) -> list[str]:
    """Copy the reference's small files and write a model card; returns notes on what was not."""
    root = inputs.reference.root
    notes: list[str] = []
    small: dict[str, Path | bytes] = {}
    if root is not None:
        small |= {name: root / name for name in COPIED if (root / name).is_file()}
    small |= getattr(inputs.reference, "files", {})
    for name, content in small.items():
        if name == "config.json":
            said = content if isinstance(content, bytes) else content.read_bytes()
            content = _config(said, plan, inputs.untied, notes)
        staging.add_file(name, content)
    if root is not None:
        notes += _code(staging, root, plan.options.copy_code)
    staging.add_file("README.md", model_card(plan, inputs, fitted).encode())
    return notes


def _config(said: bytes, plan: Plan, untied: bool, notes: list[str]) -> bytes:
    config: dict[str, Any] = json.loads(said)
    if plan.recipe.out_dtype or plan.recipe.dtype:
        name = plan.recipe.out_dtype or plan.recipe.dtype
        config["dtype" if "dtype" in config else "torch_dtype"] = name
    if untied:
        config["tie_word_embeddings"] = False
    if config.pop("quantization_config", None) is not None:
        notes.append("the base was quantised; the result is not, and its config says so")
    if not plan.options.copy_code and config.pop("auto_map", None) is not None:
        notes.append("auto_map was left out of config.json: it would run the base's own code")
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _code(staging: Staging, root: Path, copy: bool) -> list[str]:
    code = sorted(root.glob("*.py"))
    if copy:
        for path in code:
            staging.add_file(path.name, path)
        return []
    names = ", ".join(p.name for p in code)
    return [f"code was not copied: {names}; --copy-code copies it"] if code else []


def model_card(plan: Plan, inputs: Inputs, fitted: Origin | None = None) -> str:
    """README.md of the result: front matter, sources with their licences, and the recipe that was
    asked for."""
    recipe = plan.recipe.plain() if fitted is None else dict(fitted.recipe)
    given = {} if fitted is None else fitted.models
    models: Mapping[str, Weights | Source] = given or inputs.all()
    roots = {label: w.root for label, w in models.items() if w.root is not None}
    found = licences(list(roots.values()))
    by_label = {label: found.get(root) for label, root in roots.items()}
    names = {by_label.get(label) for label in models}
    front: dict[str, Any] = {"tags": ["merge", "fusewright"]}
    one = names.pop() if len(names) == 1 else None
    if one:
        front["license"] = one
    sources = "\n".join(_source(k, w, by_label) for k, w in models.items())
    stages = plan.method.chain if fitted is None else fitted.stages
    cards = {s.card.title: s.card for s in stages}
    papers = "\n".join(f"- {t}: {c.paper}{f' (arXiv:{c.arxiv})' if c.arxiv else ''}"
                       for t, c in cards.items() if c.paper)  # fmt: skip
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
        "# A merged model\n\nMade with fusewright; `fusewright.json` holds the full provenance.\n\n"
        f"## Sources\n\n{sources}\n\n"
        + ("Their licences differ or are not all stated: read them.\n\n" if not one else "")
        + (f"## Method\n\n{papers}\n\n" if papers else "")
        + f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n"
    )


def _source(label: str, weights: Weights | Source, licence: Mapping[str, str | None]) -> str:
    return f"- {label}: `{weights.label}` (licence: {licence.get(label) or 'not stated'})"

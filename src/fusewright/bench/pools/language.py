"""The pool of ``lm-mini``: a small Llama, its tokenizer, and one expert for each domain."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusewright.bench.corpora import files_of, is_corpus
from fusewright.bench.digits.model import threads
from fusewright.bench.pools import language_data, language_training, llama2c, parts
from fusewright.bench.pools.language_training import REPORTS, LanguageRecipe
from fusewright.bench.pools.training import generator
from fusewright.bench.progress import Stages, Step
from fusewright.bench.suite_file import SuiteError
from fusewright.errors import nearest
from fusewright.extras import needs

if TYPE_CHECKING:
    from fusewright.bench.suite_file import SuiteSpec

BASE, EXPERTS, TOKENIZER = "base", "experts", "tokenizer"
OPENED_AT = 4096
"""The context that models are said to have; positions are rotary, so it costs nothing."""


def build_language(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True
) -> None:
    """``tokenizer/``, ``base/``, ``experts/TASK/``, ``provenance.json``.

    The base is pre-trained on every task that has a training text, each task with an expert gets
    one. The tokenizer depends on the texts alone and is the same for every seed. Raises what
    :func:`fusewright.bench.pools.build` says.
    """
    for module in ("transformers", "tokenizers"):
        needs(module, "demo")
    recipe = read_recipe(spec)
    experts = [name for name in spec.tasks if name in spec.experts]
    claim = {"recipe": asdict(recipe), "seed": seed, "tasks": list(spec.tasks), "experts": experts}
    with parts.pool(out, claim), threads(recipe.threads):
        if (out / parts.PROVENANCE).exists():
            return
        texts = language_data.load_texts(spec, data)
        made = _Builder(out, recipe, seed, texts, data).build(experts, progress)
        parts.write_json(out / parts.PROVENANCE, {
            **claim, "data": _sources(spec, texts, data), "parts": made, "versions": _versions(),
        })  # fmt: skip


def read_recipe(spec: SuiteSpec) -> LanguageRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    given = dict(spec.build.parameters if spec.build is not None else {})
    known = [field.name for field in fields(LanguageRecipe)]
    for key in given:
        if key not in known:
            close = nearest(key, known)
            raise SuiteError("the recipe has an unknown parameter", where="build.parameters",
                             found=key, expected=", ".join(known),
                             fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    recipe = LanguageRecipe(**given)
    if bool(recipe.start) != bool(recipe.start_tokenizer):
        raise SuiteError("a model to start from needs its own tokenizer", where="build.parameters",
                         expected="both start and start_tokenizer", found=given)  # fmt: skip
    return recipe


class _Builder:
    """One pool, part after part."""

    def __init__(
        self, out: Path, recipe: LanguageRecipe, seed: int, texts: Mapping[str, str],
        data: Path | None,
    ) -> None:  # fmt: skip
        self.out, self.recipe, self.seed, self.texts = out, recipe, seed, texts
        self.data = data or Path()

    def build(self, experts: list[str], progress: bool) -> dict[str, Any]:
        """Every part's facts, by its path."""
        made: dict[str, Any] = {TOKENIZER: parts.make_part(self.out / TOKENIZER, self._tokenizer)}
        self.tokenizer = open_tokenizer(self.out / TOKENIZER)
        with Stages(progress).stage(BASE, REPORTS) as step:
            made[BASE] = self._part(BASE, step, self._base)
        with Stages(progress).stage(EXPERTS, len(experts) * REPORTS) as step:
            for task in experts:
                name = f"{EXPERTS}/{task}"
                made[name] = self._part(name, step, partial(self._expert, task))
        return made

    def _part(
        self, name: str, step: Step, make: Callable[[Path, Step], dict[str, Any]]
    ) -> Mapping[str, Any]:
        """A part of an earlier run, or made now."""

        def said(what: str) -> None:
            step(f"{name}, {what}")

        path = self.out / name
        if path.exists():
            for _ in range(REPORTS):
                said("kept")
        path.parent.mkdir(exist_ok=True)
        return parts.make_part(path, lambda at: make(at, said))

    def _tokenizer(self, at: Path) -> dict[str, Any]:
        recipe, began = self.recipe, perf_counter()
        if recipe.start:
            path = self.data / recipe.start_tokenizer
            made = llama2c.read_tokenizer(path, recipe.vocabulary)
        else:
            made = language_data.train_tokenizer(self.texts, recipe.vocabulary, recipe.mixture)
        made.save_pretrained(at)
        return {"seconds": perf_counter() - began, "tokens": len(made)}

    def _base(self, at: Path, step: Step) -> dict[str, Any]:
        began, start = perf_counter(), self.recipe.start
        model = (llama2c.read_model(self.data / start) if start
                 else new_model(self.recipe, self.seed, self.tokenizer))  # fmt: skip
        streams = {name: self._stream(name) for name in self.texts}
        draw = generator(self.seed, BASE)
        loss = language_training.pretrain(model, streams, self.recipe, draw, step)
        self._save(model, at)
        trained = {"loss": loss} if self.recipe.base_steps else {}
        return {"seconds": perf_counter() - began, **trained, **self._start()}

    def _start(self) -> dict[str, str]:
        """What the base goes on from, by its hash."""
        start = self.recipe.start
        return {"start": sha256((self.data / start).read_bytes()).hexdigest()} if start else {}

    def _expert(self, task: str, at: Path, step: Step) -> dict[str, Any]:
        began, model = perf_counter(), open_model(self.out / BASE)
        draw = generator(self.seed, f"{EXPERTS} {task}")
        loss = language_training.fine_tune(model, self._stream(task), self.recipe, draw, step)
        self._save(model, at)
        return {"seconds": perf_counter() - began, "loss": loss}

    def _stream(self, task: str) -> Tensor:
        return language_data.tokens_of(self.tokenizer, self.texts[task])

    def _save(self, model: Any, at: Path) -> None:
        """An ordinary Hugging Face folder, with its tokenizer."""
        needs("transformers", "demo").utils.logging.disable_progress_bar()
        model.save_pretrained(at)
        self.tokenizer.save_pretrained(at)


def new_model(recipe: LanguageRecipe, seed: int, tokenizer: Any) -> Any:
    """A ``transformers.LlamaForCausalLM`` with fresh weights and tied embeddings."""
    transformers = needs("transformers", "demo")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads, max_position_embeddings=OPENED_AT,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def open_model(path: Path) -> Any:
    """The model of a folder, read by ``transformers`` alone."""
    transformers = needs("transformers", "demo")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder."""
    return needs("transformers", "demo").AutoTokenizer.from_pretrained(path)


def _sources(spec: SuiteSpec, texts: Mapping[str, str], data: Path | None) -> dict[str, Any]:
    return {
        name: {
            "data": spec.tasks[name].data, "hub": spec.tasks[name].hub,
            "rows": spec.tasks[name].splits["train"], "characters": len(text),
            "sha256": sha256(text.encode()).hexdigest(), "licence": spec.tasks[name].licence,
            "files": files_of(spec.tasks[name], data) if is_corpus(spec.tasks[name]) else {},
        }
        for name, text in texts.items()
    }  # fmt: skip


def _versions() -> dict[str, str]:
    import fusewright

    return {
        "fusewright": fusewright.__version__, "torch": torch.__version__,
        "transformers": needs("transformers", "demo").__version__,
        "tokenizers": needs("tokenizers", "demo").__version__,
        "python": platform.python_version(), "processor": platform.machine(),
    }  # fmt: skip

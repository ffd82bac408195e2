"""The pool of ``lm-mini``: a small Llama, its tokenizer, and one expert for each domain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fusewright.bench.corpora import files_of, is_corpus
from fusewright.bench.pools import language_data, language_training, llama2c, parts
from fusewright.bench.pools.language_training import REPORTS, LanguageRecipe
from fusewright.bench.pools.making import BASE, EXPERTS, Maker, read_parameters
from fusewright.bench.pools.training import generator
from fusewright.bench.progress import Stages, Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.extras import needs

TOKENIZER = "tokenizer"
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
    _LanguageMaker(spec, out, read_recipe(spec), seed).run(data, progress)


def read_recipe(spec: SuiteSpec) -> LanguageRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    recipe = read_parameters(spec, LanguageRecipe)
    if bool(recipe.start) != bool(recipe.start_tokenizer):
        found = spec.build.parameters if spec.build is not None else {}
        raise SuiteError("a model to start from needs its own tokenizer", where="build.parameters",
                         expected="both start and start_tokenizer", found=found)  # fmt: skip
    return recipe


class _LanguageMaker(Maker[LanguageRecipe]):
    libraries = ("tokenizers",)
    texts: Mapping[str, str]
    data: Path | None
    tokenizer: Any

    def load(self, data: Path | None) -> None:
        self.texts, self.data = language_data.load_texts(self.spec, data), data

    def read(self) -> dict[str, dict[str, Any]]:
        return {name: self._read(name, text) for name, text in self.texts.items()}

    def _read(self, name: str, text: str) -> dict[str, Any]:
        task = self.spec.tasks[name]
        files = files_of(task, self.data) if is_corpus(task) else {}
        digest = sha256(text.encode()).hexdigest()
        return {"characters": len(text), "sha256": digest, "files": files}

    def wanted(self) -> list[str]:
        return [f"{EXPERTS}/{task}" for task in self.experts]

    def make(self, progress: bool) -> None:
        self.made[TOKENIZER] = parts.make_part(self.out / TOKENIZER, self._tokenizer)
        self.tokenizer = open_tokenizer(self.out / TOKENIZER)
        with Stages(progress).stage(BASE, REPORTS) as step:
            self.part(BASE, REPORTS, step, self._base)
        with Stages(progress).stage(EXPERTS, len(self.experts) * REPORTS) as step:
            for task in self.experts:
                self.part(f"{EXPERTS}/{task}", REPORTS, step, partial(self._expert, task))

    def _tokenizer(self, at: Path) -> dict[str, Any]:
        recipe, began = self.recipe, perf_counter()
        if recipe.start:
            path = self._below(recipe.start_tokenizer)
            made = llama2c.read_tokenizer(path, recipe.vocabulary)
        else:
            made = language_data.train_tokenizer(self.texts, recipe.vocabulary, recipe.mixture)
        made.save_pretrained(at)
        return {"seconds": perf_counter() - began, "tokens": len(made)}

    def _base(self, at: Path, step: Step) -> dict[str, Any]:
        began, start = perf_counter(), self.recipe.start
        model = (llama2c.read_model(self._below(start)) if start
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
        return {"start": sha256(self._below(start).read_bytes()).hexdigest()} if start else {}

    def _expert(self, task: str, at: Path, step: Step) -> dict[str, Any]:
        began, model = perf_counter(), open_model(self.out / BASE)
        draw = generator(self.seed, f"{EXPERTS} {task}")
        loss = language_training.fine_tune(model, self._stream(task), self.recipe, draw, step)
        self._save(model, at)
        return {"seconds": perf_counter() - began, "loss": loss}

    def _below(self, name: str) -> Path:
        return (self.data or Path()) / name

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


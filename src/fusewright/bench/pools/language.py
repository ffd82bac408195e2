"""The pool of ``lm-mini``: a small Llama, its tokenizer, and one expert for each domain."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fusewright.bench.corpora import files_of, is_corpus
from fusewright.bench.pools import language_data, language_training, llama2c, parts
from fusewright.bench.pools.builder import Builder
from fusewright.bench.pools.language_training import LanguageRecipe
from fusewright.bench.pools.making import BASE, read_parameters
from fusewright.bench.pools.training import generator
from fusewright.bench.progress import Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.extras import needs

TOKENIZER = "tokenizer"
OPENED_AT = 4096
"""The context that models are said to have; positions are rotary, so it costs nothing."""


def build_language(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True,
    device: str = "cpu",
) -> None:  # fmt: skip
    """The folders that :class:`Builder` names, and ``tokenizer/``, which is also beside every
    model: it depends on the texts alone and is the same for every seed.

    The base is pre-trained on every task that has a training text. Raises what
    :func:`fusewright.bench.pools.build` says.
    """
    for module in ("transformers", "tokenizers"):
        needs(module, "demo")
    _LanguageBuilder(spec, out, read_recipe(spec), seed, device).run(data, progress)


def read_recipe(spec: SuiteSpec) -> LanguageRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    recipe = read_parameters(spec, LanguageRecipe)
    if bool(recipe.start) != bool(recipe.start_tokenizer):
        found = spec.build.parameters if spec.build is not None else {}
        raise SuiteError("a model to start from needs its own tokenizer", where="build.parameters",
                         expected="both start and start_tokenizer", found=found)  # fmt: skip
    return recipe


class _LanguageBuilder(Builder[LanguageRecipe]):
    libraries = ("tokenizers",)
    texts: Mapping[str, str]
    below: Path
    """The folder of data, where a checkpoint to start from lies."""
    tokenizer: Any

    def load(self, data: Path | None) -> None:
        self.texts, self.below = language_data.load_texts(self.spec, data), data or Path()

    def read(self) -> dict[str, dict[str, Any]]:
        return {name: self._read(name, text) for name, text in self.texts.items()}

    def _read(self, name: str, text: str) -> dict[str, Any]:
        task = self.spec.tasks[name]
        files = files_of(task, self.below) if is_corpus(task) else {}
        digest = sha256(text.encode()).hexdigest()
        return {"characters": len(text), "sha256": digest, "files": files}

    def make(self, progress: bool) -> None:
        self.made[TOKENIZER] = parts.make_part(self.out / TOKENIZER, self._tokenizer)
        self.tokenizer = open_tokenizer(self.out / TOKENIZER)
        super().make(progress)

    def _tokenizer(self, at: Path) -> dict[str, Any]:
        recipe, began = self.recipe, perf_counter()
        if recipe.start:
            made = llama2c.read_tokenizer(self.below / recipe.start_tokenizer, recipe.vocabulary)
        else:
            made = language_data.train_tokenizer(self.texts, recipe.vocabulary, recipe.mixture)
        made.save_pretrained(at)
        return {"seconds": perf_counter() - began, "tokens": len(made)}

    def new_model(self) -> Any:
        if self.recipe.start:
            return llama2c.read_model(self.below / self.recipe.start)
        return new_model(self.recipe, self.seed, self.tokenizer)

    def open_model(self, path: Path) -> Any:
        return open_model(path)

    def save(self, model: Any, at: Path) -> None:
        needs("transformers", "demo").utils.logging.disable_progress_bar()
        model.save_pretrained(at)
        self.tokenizer.save_pretrained(at)

    def pretrain(self, model: Any, step: Step) -> float:
        streams = {name: self._stream(name) for name in self.texts}
        return language_training.pretrain(
            model, streams, self.recipe, generator(self.seed, BASE), step
        )

    def fine_tune(
        self, model: Any, task: str, rate: float, draw: torch.Generator, step: Step
    ) -> float:
        return language_training.fine_tune(
            model, self._stream(task), self.recipe, rate, draw, step
        )

    def _base(self, at: Path, step: Step) -> dict[str, Any]:
        """Says what the base goes on from, by its hash, and no loss where nothing is trained."""
        found, start = super()._base(at, step), self.recipe.start
        if not self.recipe.base_steps:
            del found["loss"]
        if start:
            found["start"] = sha256((self.below / start).read_bytes()).hexdigest()
        return found

    def _stream(self, task: str) -> Tensor:
        return language_data.tokens_of(self.tokenizer, self.texts[task])


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

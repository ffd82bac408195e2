"""The pool of ``text-mini``: a small encoder and its tokenizer, experts, heads of prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fusewright.bench.pools import parts
from fusewright.bench.pools.builder import Builder, read_parameters
from fusewright.bench.pools.texts import (
    Corpus,
    TextRecipe,
    Texts,
    encoded,
    load_corpora,
    train_tokenizer,
)
from fusewright.bench.suite_file import SuiteSpec
from fusewright.extras import needs

TOKENIZER = "tokenizer"


def build_text(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True
) -> None:
    """The folders that :class:`Builder` names, and ``tokenizer/``, which is also beside every
    model: it depends on the texts alone and is the same for every seed.

    Raises what :func:`fusewright.bench.pools.build` says.
    """
    for module in ("transformers", "pyarrow", "tokenizers"):
        needs(module, "demo")
    _TextBuilder(spec, out, read_recipe(spec), seed).run(data, progress)


def read_recipe(spec: SuiteSpec) -> TextRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    return read_parameters(spec, TextRecipe)


class _TextBuilder(Builder[TextRecipe]):
    libraries = ("tokenizers",)
    corpora: Mapping[str, Corpus]

    def load(self, data: Path | None) -> dict[str, Texts]:
        self.corpora = load_corpora(self.spec.tasks, data)
        self.made[TOKENIZER] = parts.make_part(self.out / TOKENIZER, self._tokenizer)
        self.tokenizer = needs("transformers", "demo").AutoTokenizer.from_pretrained(
            self.out / TOKENIZER
        )
        return {
            task: encoded(corpus, self.tokenizer, self.recipe, task)
            for task, corpus in self.corpora.items()
        }

    def digest(self, task: str) -> str:
        return self.corpora[task].digest()

    def new_model(self) -> Any:
        return new_model(self.recipe, self.seed, len(self.tokenizer), self.tokenizer.pad_token_id)

    def open_model(self, path: Path) -> Any:
        return open_model(path)

    def save(self, model: Any, at: Path) -> None:
        needs("transformers", "demo").utils.logging.disable_progress_bar()
        model.save_pretrained(at)
        self.tokenizer.save_pretrained(at)

    def _tokenizer(self, at: Path) -> dict[str, Any]:
        began = perf_counter()
        made = train_tokenizer(self.corpora, self.recipe)
        made.save_pretrained(at)
        return {"seconds": perf_counter() - began, "tokens": len(made)}


def new_model(recipe: TextRecipe, seed: int, vocabulary: int, pad: int) -> Any:
    """A ``transformers.BertModel`` (Devlin et al. 2019, arXiv:1810.04805) with fresh weights,
    without a pooler: heads see mean hidden states."""
    transformers = needs("transformers", "demo")
    width = recipe.width
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, width // 32), intermediate_size=4 * width,
        max_position_embeddings=recipe.length, hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=0.0, initializer_range=0.05, pad_token_id=pad,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertModel(config, add_pooling_layer=False)


def open_model(path: Path) -> Any:
    """The model of a folder, read by ``transformers`` alone."""
    transformers = needs("transformers", "demo")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)

"""The pools of ``text-mini`` and its kin: a small BERT or GPT-2 with heads of prototypes, or a
small T5 without heads, each with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from fusewright.bench.pools import architectures, parts
from fusewright.bench.pools.builder import Builder
from fusewright.bench.pools.classifiers import ClassifierBuilder
from fusewright.bench.pools.making import read_parameters
from fusewright.bench.pools.text_to_text import TextToText
from fusewright.bench.pools.texts import (
    Corpus,
    TextRecipe,
    Texts,
    encoded,
    load_corpora,
    start_from_cooccurrence,
    train_tokenizer,
)
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.errors import nearest
from fusewright.extras import needs

TOKENIZER = "tokenizer"


def build_text(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True,
    device: str = "cpu",
) -> None:  # fmt: skip
    """The folders that :class:`Builder` names, and ``tokenizer/``, which is also beside every
    model: it depends on the texts alone and is the same for every seed.

    Raises what :func:`fusewright.bench.pools.build` says.
    """
    for module in ("transformers", "pyarrow", "tokenizers"):
        needs(module, "demo")
    recipe = read_recipe(spec)
    builder = _T5Builder if recipe.architecture == "t5" else _ClassifierBuilder
    builder(spec, out, recipe, seed, device).run(data, progress)


def read_recipe(spec: SuiteSpec) -> TextRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for what is not known."""
    recipe = read_parameters(spec, TextRecipe)
    known = list(architectures.ARCHITECTURES)
    if recipe.architecture not in known:
        close = nearest(recipe.architecture, known)
        raise SuiteError("there is no such architecture", where="build.parameters.architecture",
                         found=recipe.architecture, expected=", ".join(known),
                         fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    return recipe


class _TextBuilder(Builder[TextRecipe]):
    """What all have: corpora and a tokenizer."""

    libraries = ("tokenizers",)
    corpora: Mapping[str, Corpus]

    def open(self, data: Path | None) -> None:
        """The texts, and the tokenizer, learnt from them if there is none yet."""
        self.corpora = load_corpora(self.spec.tasks, data)
        self.made[TOKENIZER] = parts.make_part(self.out / TOKENIZER, self._tokenizer)
        self.tokenizer = needs("transformers", "demo").AutoTokenizer.from_pretrained(
            self.out / TOKENIZER
        )

    def read(self) -> dict[str, dict[str, Any]]:
        return {name: {"count": len(c.labels), "sha256": c.digest()}
                for name, c in self.corpora.items()}  # fmt: skip

    def new_model(self) -> Any:
        model = architectures.new_model(self.recipe, self.seed, self.tokenizer)
        if self.recipe.window:
            start_from_cooccurrence(model, self.corpora, self.tokenizer, self.recipe.window)
        return model

    def save(self, model: Any, at: Path) -> None:
        needs("transformers", "demo").utils.logging.disable_progress_bar()
        model.save_pretrained(at)
        self.tokenizer.save_pretrained(at)

    def _tokenizer(self, at: Path) -> dict[str, Any]:
        began = perf_counter()
        made = train_tokenizer(self.corpora, self.recipe)
        made.save_pretrained(at)
        return {"seconds": perf_counter() - began, "tokens": len(made)}


class _ClassifierBuilder(_TextBuilder, ClassifierBuilder[TextRecipe]):
    def examples(self, data: Path | None) -> dict[str, Texts]:
        for task, said in self.spec.tasks.items():
            pooling = said.options.get("pooling")
            if pooling != self.recipe.pooling:
                raise SuiteError("models learn through another pooling than the task has",
                                 where=f"tasks.{task}.options.pooling", found=str(pooling),
                                 expected=f"{self.recipe.pooling}, as build.parameters say"
                                 )  # fmt: skip
        self.open(data)
        return {
            task: encoded(corpus, self.tokenizer, self.recipe, task)
            for task, corpus in self.corpora.items()
        }


class _T5Builder(_TextBuilder, TextToText):
    def load(self, data: Path | None) -> None:
        self.open(data)
        self.prepare(data)

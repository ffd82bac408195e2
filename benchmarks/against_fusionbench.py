"""The same pool, data and seeds through Fusewright and through FusionBench's own code.

    git clone https://github.com/tanganke/fusion_bench && git -C fusion_bench checkout 54c9e8c
    pip install hydra-core lightning bidict    # and what FusionBench asks for besides
    python benchmarks/against_fusionbench.py --peer fusion_bench [--work DIR] [--json FILE]

A tiny CLIP (transformers' own classes, saved as ordinary folders) is trained for a moment on three
made-up tasks at once, then one expert on each. Every method that both have merges them: Fusewright
from disk to disk, FusionBench through its model pool; Fusewright's suite scores the one,
FusionBench's CLIP task pool the other (its class names, templates, zero-shot heads and image
processor). What is random in DARE is given to both: our streams replace FusionBench's draws.

"weights" is the largest difference of any weight; scores are mean accuracies and mean losses over
the tasks. "same": no weight differs by more than 1e-5, no task's accuracy by a single item, no loss
by more than 1e-5. FusionBench's loss is the mean of its batches' means, so that a short last batch
counts too much: here a task is one batch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fusionbench_cases import WEIGHTS, cases
from tiny_clip import ITEMS, OPTIONAL, TASKS, Words, make_data, make_pool, write_suite
from torch import Tensor, nn

import fusewright as fw
from fusewright.methods.outputs import MaxEnsemble, SimpleEnsemble, WeightedEnsemble
from fusewright.methods.random import Stream, threshold

SEED = 0
Scores = dict[str, tuple[float, float]]
"""Task: (accuracy, loss)."""


@dataclass
class Row:
    method: str
    peer: str
    weights: float | None
    ours: Scores
    theirs: Scores
    note: str = ""

    @property
    def same(self) -> bool:
        pairs = list(zip(self.ours.values(), self.theirs.values(), strict=True))
        alike = all(abs(a - b) * ITEMS["test"] < 0.5 for (a, _), (b, _) in pairs)
        close = all(abs(x - y) <= 1e-5 for (_, x), (_, y) in pairs)
        return alike and close and (self.weights is None or self.weights <= 1e-5)

    def line(self) -> str:
        (a, x), (b, y) = mean(self.ours), mean(self.theirs)
        change = "-" if self.weights is None else f"{self.weights:.1e}"
        return (f"| {self.method} | {self.peer} | {change} | {a:.4f} / {x:.5f} | {b:.4f} / {y:.5f} "
                f"| {'yes' if self.same else 'NO'} | {self.note} |")  # fmt: skip


def mean(scores: Scores) -> tuple[float, float]:
    accuracies, losses = zip(*scores.values(), strict=True)
    return sum(accuracies) / len(scores), sum(losses) / len(scores)


class Ours:
    """Fusewright: merges from disk to disk, scored by a suite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.suite = fw.suite(folder / "suite.yaml", pool=folder / "pool", data=folder / "data")

    def merge(self, method: Any, experts: tuple[str, ...]) -> nn.Module:
        out = self.folder / "merged"
        fw.merge(method, base=self.suite.base, experts={t: self.suite.experts[t] for t in experts},
                 optional=OPTIONAL, out=out, seed=SEED, overwrite=True)  # fmt: skip
        return self.suite.open(out)

    def score(self, model: nn.Module) -> Scores:
        found = {task: self.suite.evaluate(model, task) for task in TASKS}
        return {t: (float(o.score.mean()), float(o.columns["loss"].mean()))
                for t, o in found.items()}  # fmt: skip

    def ensemble(self, combine: Any) -> Scores:
        """Scores of all experts' logits, combined."""
        experts = [self.suite.open(path) for path in self.suite.experts.values()]
        found = {}
        for name in TASKS:
            task: Any = self.suite.tasks[name]
            batch = next(task.batches(self.suite.split(name), 10_000))
            with torch.inference_mode():
                logits = combine([task.logits(model, batch) for model in experts])
            loss = nn.functional.cross_entropy(logits, batch["labels"]).item()
            found[name] = ((logits.argmax(1) == batch["labels"]).double().mean().item(), loss)
        return found


class Peer:
    """FusionBench: its algorithms on its CLIP model pool, scored by its CLIP task pool."""

    def __init__(self, folder: Path) -> None:
        from datasets import Image, load_dataset
        from fusion_bench.modelpool import CLIPVisionModelPool
        from fusion_bench.taskpool import CLIPVisionModelTaskPool
        from transformers import CLIPProcessor

        self.base = str(folder / "pool" / "clip-vit-base-patch32")
        self.paths = {t: f"{self.base}_{t}" for t in TASKS}
        self.pool_class = CLIPVisionModelPool
        rows = {
            t: load_dataset("parquet", data_files=str(folder / f"data/vision/{t}/test.parquet"),
                            split="train", cache_dir=str(folder / "cache"),
                            ).cast_column("image", Image())
            for t in TASKS
        }  # fmt: skip
        processor = CLIPProcessor.from_pretrained(self.base)
        self.tasks = CLIPVisionModelTaskPool(
            rows, processor=processor, clip_model=self.base,
            dataloader_kwargs={"batch_size": ITEMS["test"]},
        )  # fmt: skip
        self.tasks.setup()  # its batches are kept, or every model would decode all pictures anew
        loaders = self.tasks.test_dataloaders
        self.tasks.test_dataloaders = {task: list(batches) for task, batches in loaders.items()}

    def merge(self, algorithm: Any, experts: tuple[str, ...], base: bool = True) -> nn.Module:
        models = {"_pretrained_": self.base} if base else {}
        pool = self.pool_class({**models, **{t: self.paths[t] for t in experts}})
        merged: nn.Module = algorithm.run(pool)
        return merged

    def open(self, path: str) -> nn.Module:
        from transformers import CLIPVisionModel

        return CLIPVisionModel.from_pretrained(path).eval()

    def score(self, model: nn.Module) -> Scores:
        report = self.tasks.evaluate(model)
        return {t: (report[t]["accuracy"], report[t]["loss"]) for t in TASKS}

    def ensemble_of_classifiers(self, wrap: Any) -> Scores:
        """Scores of its ensemble modules around whole classifiers."""
        from fusion_bench.models.hf_clip import HFCLIPClassifier
        from fusion_bench.tasks.clip_classification import get_classnames_and_templates
        from transformers import CLIPModel

        classifiers = []
        for path in self.paths.values():
            clip = CLIPModel.from_pretrained(self.base).eval()
            clip.vision_model = self.open(path)
            classifiers.append(HFCLIPClassifier(clip, self.tasks.processor))
        both, found = wrap(classifiers), {}
        for name in TASKS:
            names, templates = get_classnames_and_templates(name)
            for each in classifiers:
                each.set_classification_task(names, templates)
            images, labels = next(iter(self.tasks.test_dataloaders[name]))
            with torch.inference_mode():
                logits = both(images)
            loss = nn.functional.cross_entropy(logits, labels).item()
            found[name] = ((logits.argmax(1) == labels).double().mean().item(), loss)
        return found


@contextlib.contextmanager
def our_draws(model: nn.Module, density: float) -> Iterator[None]:
    """FusionBench drops where our streams say, expert after expert, parameter after parameter."""
    prefix = "" if next(iter(model.state_dict())).startswith("vision_model.") else "vision_model."
    names = [(t, prefix + name) for t in TASKS for name, _ in model.named_parameters()]
    queue = iter(names)

    def drawn(like: Tensor) -> Tensor:
        task, name = next(queue)
        words = Stream.of(SEED, task, name).words(0, like.numel())
        return (words < threshold(density)).float().reshape(like.shape)  # kept: 1 > sparsity

    with patch("torch.rand_like", drawn):
        yield
    assert next(queue, None) is None, "FusionBench drew less often than there are tensors"


def model_rows(ours: Ours, peer: Peer) -> Iterator[Row]:
    """The models themselves: only the evaluations differ."""
    for name, path in {"base": ours.suite.base, **ours.suite.experts}.items():
        mine, its = ours.suite.open(path), peer.open(str(path))
        yield Row(f"(model) {name}", "-", apart(mine, its), ours.score(mine), peer.score(its))


def merge_rows(ours: Ours, peer: Peer) -> Iterator[Row]:
    start = peer.open(peer.base)
    for name, case in cases(sum(p.numel() for p in start.parameters())).items():
        mine = ours.merge(case.method, case.experts)
        draws = our_draws(start, case.density) if case.density else contextlib.nullcontext()
        words = type(case.peer).__name__
        try:
            with draws:
                its = peer.merge(case.peer, case.experts, case.base)
        except AssertionError as error:
            nothing = dict.fromkeys(TASKS, (float("nan"), float("nan")))
            note = f"it stops with {str(error)!r}: {case.note}"
            yield Row(name, words, None, ours.score(mine), nothing, note)
            continue
        its = its.eval()
        yield Row(name, words, apart(mine, its), ours.score(mine), peer.score(its), case.note)


def ensemble_rows(ours: Ours, peer: Peer) -> Iterator[Row]:
    import fusion_bench.method as their
    from fusion_bench.models.wrappers import ensemble as wrappers

    weights = list(WEIGHTS)
    plain = ours.ensemble(SimpleEnsemble(of="logits"))
    features = "in its task pool it combines pooled features, before projection and head"
    of = "around whole classifiers, its modules combine logits, as `of: logits` does"
    pooled = peer.merge(their.SimpleEnsembleAlgorithm(), TASKS)
    yield Row("ensemble simple, of: logits", "SimpleEnsembleAlgorithm", None, plain,
              peer.score(pooled), features)  # fmt: skip
    yield Row("ensemble simple, of: logits", "EnsembleModule", None, plain,
              peer.ensemble_of_classifiers(wrappers.EnsembleModule), of)  # fmt: skip
    yield Row("ensemble weighted, of: logits", "WeightedEnsembleModule", None,
              ours.ensemble(WeightedEnsemble(tuple(weights), of="logits")),
              peer.ensemble_of_classifiers(lambda c: wrappers.WeightedEnsembleModule(c, weights)),
              of)  # fmt: skip
    yield Row("ensemble max", "MaxModelPredictor", None, ours.ensemble(MaxEnsemble()),
              peer.ensemble_of_classifiers(wrappers.MaxModelPredictor))  # fmt: skip


def their_words() -> Words:
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    both = {task: get_classnames_and_templates(task) for task in TASKS}
    return {t: (list(names), [make("{}") for make in makes]) for t, (names, makes) in both.items()}


def apart(mine: nn.Module, its: nn.Module) -> float:
    a, b = mine.state_dict(), its.state_dict()
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def table(folder: Path) -> list[Row]:
    silent = io.StringIO()  # FusionBench prints every tensor it merges
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        words = their_words()
        make_data(folder / "data", words)
        make_pool(folder / "pool", folder / "data", words)
        write_suite(folder, words)
        ours, peer = Ours(folder), Peer(folder)
        return [*model_rows(ours, peer), *merge_rows(ours, peer), *ensemble_rows(ours, peer)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of FusionBench")
    parser.add_argument("--work", type=Path, help="keep models and data here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.peer))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    with contextlib.ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = table(folder)
    print("| Fusewright | FusionBench | weights | ours: accuracy / loss | theirs | same | note |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(row.line() for row in rows))
    if args.json:
        args.json.write_text(json.dumps([{**asdict(r), "same": r.same} for r in rows], indent=1))


if __name__ == "__main__":
    main()

"""Trained models on disk: ordinary Hugging Face directories, kept for as long as they are valid."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusewright
from fusewright.bench.digits import train
from fusewright.bench.digits.model import save_model, threads
from fusewright.bench.digits.tasks import TASKS, Task
from fusewright.bench.digits.train import Training
from fusewright.weights.folders import make_folder

HEADS = "heads.safetensors"
BASE, MULTITASK = "base", "multitask"


@dataclass(frozen=True)
class Trained:
    """Where one seed's models lie: ``base/``, a folder for each expert, ``heads.safetensors``."""

    root: Path
    seed: int

    @property
    def base(self) -> Path:
        return self.root / BASE

    @property
    def multitask(self) -> Path:
        return self.root / MULTITASK

    @property
    def experts(self) -> dict[str, Path]:
        return {task.name: self.root / task.name for task in TASKS}

    def heads(self) -> dict[Task, Tensor]:
        """The frozen head (classes, width) of each task."""
        stored = load_file(self.root / HEADS)
        return {task: stored[task.name] for task in TASKS}


def key_of(training: Training) -> str:
    """Twelve hex digits that change with anything the trained numbers depend on: the recipe, the
    tasks, the code that trains, the versions of fusewright and torch."""
    here = Path(__file__).parent
    files = ("tasks.py", "model.py", "train.py", "../descent.py")
    code = [(here / name).read_text("utf-8") for name in files]
    facts = [asdict(training), fusewright.__version__, torch.__version__, code]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(cache: Path, training: Training, seed: int) -> Path:
    """Where the cache keeps one seed's models."""
    return cache / key_of(training) / f"seed-{seed}"


def is_trained(cache: Path, training: Training, seed: int) -> bool:
    """Whether the cache holds one seed's models."""
    return folder_of(cache, training, seed).is_dir()


def trained(
    cache: Path, training: Training, seed: int, step: Callable[[str], None] = lambda name: None
) -> Trained:
    """The models of one seed, from the cache or trained now; ``step`` hears of each model.

    A folder appears in the cache complete or not at all.
    """
    root = folder_of(cache, training, seed)
    if not root.is_dir():
        partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial, "choose another --pool")
        with threads(training.threads):
            _train_into(partial, training, seed, step)
        partial.rename(root)
    return Trained(root, seed)


def names() -> list[str]:
    """Everything that is trained for one seed, in order: what ``step`` will hear."""
    return [BASE, *(task.name for task in TASKS), MULTITASK]


def _train_into(
    root: Path, training: Training, seed: int, step: Callable[[str], None]
) -> None:
    def keep(name: str, model: Any) -> None:
        save_model(model, root / name)
        step(name)

    base = train.pretrain(training, seed)
    keep(BASE, base)
    heads = {task: train.frozen_head(base, task, training, seed) for task in TASKS}
    save_file({task.name: head for task, head in heads.items()}, root / HEADS)
    for task, head in heads.items():
        keep(task.name, train.expert(base, task, head, training, seed))
    keep(MULTITASK, train.multitask(base, heads, training, seed))

"""Outcomes of models on the tasks: one truth value for each task and image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.bench.digits.model import features
from fusewright.bench.digits.tasks import Split, Task, seen

Outcomes = NDArray[np.bool_]


Scores = dict[Task, Tensor]
"""For each task the logits or probabilities (images, classes)."""


def outcomes(model: Any, heads: Mapping[Task, Tensor], split: Split) -> Outcomes:
    """Whether the model is right: (tasks, images)."""
    return right(logits(model, heads, split), split)


@torch.inference_mode()
def logits(model: Any, heads: Mapping[Task, Tensor], split: Split) -> Scores:
    """What the model says; each view passes through it once, however many tasks use it."""
    views = list(dict.fromkeys(task.view for task in heads))
    shown = torch.cat([seen(split.images, view) for view in views])
    tokens = dict(zip(views, features(model, shown).split(len(split)), strict=True))
    return {task: tokens[task.view] @ head.T for task, head in heads.items()}


def ensemble(each: Sequence[Scores]) -> Scores:
    """The mean of several models' predicted distributions, from their logits."""
    return {t: torch.stack([one[t].softmax(dim=1) for one in each]).mean(dim=0) for t in each[0]}


def right(scores: Scores, split: Split) -> Outcomes:
    """Whether the largest score is that of the true class: (tasks, images)."""
    found = [s.argmax(dim=1) == task.labels(split.digits) for task, s in scores.items()]
    return torch.stack(found).numpy()

"""Outcomes of models on the tasks: one truth value for each task and image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.bench.digits.model import features
from fusewright.bench.digits.tasks import Split, Task, seen

Outcomes = NDArray[np.bool_]


def outcomes(model: Any, heads: Mapping[Task, Tensor], split: Split) -> Outcomes:
    """Whether the model is right: (tasks, images)."""
    return _right(_logits(model, heads, split), heads, split)


def ensemble_outcomes(
    models: Iterable[Any], heads: Mapping[Task, Tensor], split: Split
) -> Outcomes:
    """Whether the mean of the models' predicted distributions is right: (tasks, images)."""
    each = [_logits(model, heads, split) for model in models]
    mean = {t: torch.stack([one[t].softmax(dim=1) for one in each]).mean(dim=0) for t in heads}
    return _right(mean, heads, split)


@torch.no_grad()
def _logits(model: Any, heads: Mapping[Task, Tensor], split: Split) -> dict[Task, Tensor]:
    """Each view passes through the model once, however many tasks use it."""
    views = dict.fromkeys(task.view for task in heads)
    tokens = {view: features(model, seen(split.images, view)) for view in views}
    return {task: tokens[task.view] @ head.T for task, head in heads.items()}


def _right(scores: Mapping[Task, Tensor], heads: Iterable[Task], split: Split) -> Outcomes:
    right = [scores[task].argmax(dim=1) == task.labels(split.digits) for task in heads]
    return torch.stack(right).numpy()
